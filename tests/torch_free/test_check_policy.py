"""memplan.testing tells policies from what only looks like one."""

import itertools
import re
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from memplan.errors import MemplanError
from memplan.ir import Budget, Decisions, Keep, Machine, Offload, Recompute, Step
from memplan.passes.policies import policy
from memplan.testing import check_policy


@policy("cheap")
def cheap(step: Step, budget: Budget, machine: Machine) -> Decisions:
    """README's."""
    return {t: Recompute() for op in step.forward.ops if op.flops <= op.traffic and not op.fixed for t in op.outputs}


@dataclass
class Mutable:
    name: str = "mutable"
    seen: list[str] = field(default_factory=list)

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return {}


@policy("restless")
def restless(step: Step, budget: Budget, machine: Machine, turn: Any = itertools.count()) -> Decisions:  # noqa: B008
    return dict.fromkeys(step.read_in_backward, Keep() if next(turn) % 2 else Recompute())


@policy("confused")
def confused(step: Step, budget: Budget, machine: Machine) -> Decisions:
    return {step.backward.inputs[0]: Keep()}  # a tangent


@policy("careless")
def careless(step: Step, budget: Budget, machine: Machine) -> Decisions:
    return dict.fromkeys(step.offloadable, Offload("host", release_at=0))  # before most of them are made


@policy("slow")
def slow(step: Step, budget: Budget, machine: Machine) -> Decisions:
    time.sleep(0.3)
    return {}


@pytest.mark.parametrize("good", ["save-all", "block-checkpoint", "torch-budget-0.5", cheap])
def test_a_policy_passes(good: Any) -> None:
    ranking = check_policy(good)
    assert len(ranking.rows) == 6  # three budgets, fused or not


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Mutable(), "policy 'mutable' is not a value (unhashable type: 'Mutable'): make it a @dataclass(frozen=True)"),
        (restless, "policy 'restless' decides differently when it is asked twice about llama8b"),
        (confused, "policy 'confused' decides on 'tangent', which cannot cross"),
        (careless, "policy 'careless' made no valid plan"),
        ("gredy", "no policy is called 'gredy'"),
    ],
)
def test_what_only_looks_like_one_is_named(wrong: Any, says: str) -> None:
    with pytest.raises(MemplanError, match=re.escape(says)):
        check_policy(wrong)


def test_one_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(MemplanError, match=re.escape("policy 'slow' took longer than 0.2 seconds and was stopped")):
        check_policy(slow, limit=0.2)
