"""Full checkpointing per block, and every sqrt(n)-th block (Chen et al. 2016).

Only the storages that cross the chosen block boundaries are kept; everything else that may be recomputed is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memplan.ir import Budget, Decisions, Keep, Machine, Recompute, Step
from memplan.passes.blocks import frontiers
from memplan.passes.schedule import closure


def keep_only(step: Step, wanted: Sequence[int] | frozenset[int]) -> Decisions:
    """Keep `wanted` and the results of ops that must not run twice; recompute the rest."""
    kept = frozenset(wanted) | _fixed_results(step, frozenset(wanted))
    return {t: Keep() if t in kept else Recompute() for t in step.read_in_backward | kept}


def _fixed_results(step: Step, kept: frozenset[int]) -> frozenset[int]:
    """What ops that must not run twice make, where recomputing backward's reads would run them again."""
    available = kept | step.given
    fixed: set[int] = set()
    for i in closure(step, step.read_in_backward - kept, available):
        if step.ops[i].fixed:
            fixed.update(step.ops[i].outputs)
    return step.saveable & fixed


@dataclass(frozen=True)
class BlockCheckpoint:
    """`every`: blocks per segment."""

    every: int = 1
    name: str = "block-checkpoint"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        boundaries = frontiers(step)[self.every - 1 :: self.every]
        return keep_only(step, frozenset().union(*boundaries))


@dataclass(frozen=True)
class SqrtN:
    name: str = "sqrt-n"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        every = max(1, round(math.sqrt(len(frontiers(step)))))
        return BlockCheckpoint(every)(step, budget, machine)
