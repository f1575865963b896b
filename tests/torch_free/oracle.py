"""The best plan of a small step by looking at every one: what planners and bounds are judged by.

All sets of storages that cross, all subsets of these off the device, over the host, with each way of passes/copies.py
to place their copies. Exponential: for steps of at most `MOST` storages that can cross.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memplan.ir import Machine, Offload, Run, Step
from memplan.passes import copies
from memplan.passes.schedule import schedule
from memplan.passes.simulate import copying, peak

MOST = 6


class Outcome(NamedTuple):
    peak: int
    host_peak: int
    seconds: float


def outcomes(step: Step, machine: Machine, *, offload: bool = True) -> list[Outcome]:
    """What every valid plan comes to, of equal or better ones one: by peak, each faster than those before."""
    assert len(step.saveable) <= MOST
    best, fastest = list[Outcome](), float("inf")
    for outcome in sorted(_all(step, machine, offload)):
        if outcome.seconds < fastest:
            best.append(outcome)
            fastest = outcome.seconds
    return best


def _all(step: Step, machine: Machine, offload: bool) -> Iterator[Outcome]:
    for saved in map(frozenset, _subsets(sorted(step.saveable))):
        runs = schedule(step, saved)
        order = [run for own in runs for run in own]
        if any(step.ops[run.op].fixed for run in order if run.again):
            continue
        if not saved <= read_later(step, runs):  # it is not kept then, and the same as without
            continue
        busy = sum(machine.seconds(step.ops[run.op]) for run in order)
        for away in _subsets(sorted(saved & step.offloadable)) if offload else [()]:
            for in_flight in (None, 0, 1) if away else (None,):
                placed = copies.placed(step, runs, {t: Offload() for t in away}, machine, in_flight)
                host = sum(step.tensors[t].bytes for t in placed)  # at most: micro-batches take turns
                yield Outcome(
                    peak(step, saved, placed), host, busy + (copying(step, runs, placed, machine) if placed else 0.0)
                )


def read_later(step: Step, runs: tuple[tuple[Run, ...], ...]) -> set[int]:
    """What backward graphs read, or return."""
    backward = [run for graph, own in zip(step.graphs, runs, strict=True) if graph.phase == "backward" for run in own]
    return {t for run in backward for t in step.ops[run.op].inputs} | set(step.backward.outputs)


def _subsets(of: Iterable[int]) -> Iterator[tuple[int, ...]]:
    items = tuple(of)
    return itertools.chain.from_iterable(itertools.combinations(items, n) for n in range(len(items) + 1))
