"""Every corruption of a valid plan is found, each by its own rule."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir import Budget, Graph, Keep, Op, Plan, Recompute, Run, Step, Tensor
from memplan.passes.check import check
from memplan.passes.pipeline import evaluate
from tests.torch_free.random_steps import MACHINE, any_steps


def storage(name: str, kind: str = "activation") -> Tensor:
    return Tensor(name, 10, kind)  # type: ignore[arg-type]


def planned() -> Plan:
    """x -> a -> b -> c -> loss; backward reads b and c; b is recomputed from a, c is kept."""
    names = ("x", "a", "b", "c", "loss", "tangent", "gc", "gb")
    forward = tuple(Op(n, "op", (i,), (i + 1,), traffic=1, dtype="float32") for i, n in enumerate(names[1:5]))
    backward = (
        Op("gc", "op", (3, 5), (6,), traffic=1, dtype="float32"),
        Op("gb", "op", (2, 6), (7,), traffic=1, dtype="float32"),
        Op("effect", "op", (7,), (), traffic=1, dtype="float32"),
    )
    graphs = (Graph("forward", forward, (0,), (4,)), Graph("backward", backward, (5,), (6, 7), "backward"))
    step = Step("chain", tuple(map(storage, names)), graphs, (0,))
    return evaluate(step, {1: Keep(), 2: Recompute(), 3: Keep()}, Budget(10**6), MACHINE, "eager", "by hand")


def corrupted(plan: Plan, **changes: Any) -> Plan:
    """`forward` and `backward` stand for the runs of the two graphs."""
    runs = changes.pop("forward", plan.forward), changes.pop("backward", plan.backward)
    return dataclasses.replace(plan, runs=runs, **changes)


def without(runs: tuple[Run, ...], op: int) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.op != op)


def fixed(plan: Plan, op: int) -> Step:
    ops = [*plan.step.forward.ops]
    ops[op] = dataclasses.replace(ops[op], fixed="a collective")
    forward = dataclasses.replace(plan.step.forward, ops=tuple(ops))
    return dataclasses.replace(plan.step, graphs=(forward, plan.step.backward))


VALID = planned()  # forward a b c loss (0 to 3), backward gc, b again, gb, effect (4, 1, 5, 6)
DECIDED, AHEAD, BEHIND = VALID.decisions, VALID.forward, VALID.backward
CORRUPT = {
    "b: runs 0 times in forward, not once": {"forward": without(AHEAD, 1)},
    "b: runs 2 times in forward, not once": {"forward": (*AHEAD, Run(1))},
    "gc: runs twice in forward": {"forward": (*AHEAD, Run(4), Run(4))},
    "b: reads a in forward, which is not there": {"forward": (AHEAD[1], AHEAD[0], *AHEAD[2:])},
    "a: marked as recomputed in forward": {"forward": (Run(0, again=True), *AHEAD[1:])},
    "loss: leaves forward and was never made there": {"forward": without(AHEAD, 3)},
    "gb: reads b in backward, which is not there": {"backward": without(BEHIND, 1)},
    "gb: an output of backward that is never made": {"backward": without(BEHIND, 5)},
    "effect: runs for its effects, and never runs": {"backward": without(BEHIND, 6)},
    "b: runs twice in backward": {"backward": (*BEHIND, Run(1, again=True))},
    "b: reads a in backward, which is not there": {"decisions": tuple(d for d in DECIDED if d[0] != 1)},
    "b: wrongly marked as running first": {"backward": tuple(Run(run.op) for run in BEHIND)},
    "gc: wrongly marked as recomputed": {"backward": (Run(4, again=True), *BEHIND[1:])},
    "b: recomputed, and must not be: a collective": {"step": fixed(VALID, 1)},
    "x: Keep() for a activation that is always there": {"decisions": (*DECIDED, (0, Keep()))},
    "gc: Recompute() for a storage that exists only in backward": {"decisions": (*DECIDED, (6, Recompute()))},
    "c: two decisions": {"decisions": (*DECIDED, (3, Keep()))},
    "decision for storage 8, and the step has 8": {"decisions": (*DECIDED, (8, Keep()))},
    "decision for storage -1, and the step has 8": {"decisions": (*DECIDED, (-1, Keep()))},
}


def test_a_valid_plan_breaks_nothing() -> None:
    assert [(run.op, run.again) for run in BEHIND] == [(4, False), (1, True), (5, False), (6, False)]
    assert check(VALID) == []


@pytest.mark.parametrize("says", CORRUPT)
def test_a_corrupt_plan_is_found(says: str) -> None:
    assert says in check(corrupted(VALID, **CORRUPT[says]))


def test_a_recomputation_after_its_use_is_found() -> None:
    late = (BEHIND[0], BEHIND[2], BEHIND[1], BEHIND[3])
    assert check(corrupted(VALID, backward=late)) == ["gb: reads b in backward, which is not there"]


@settings(deadline=None, max_examples=60)
@given(any_steps(), st.data())
def test_random_decisions_make_valid_plans(step: Step, data: st.DataObject) -> None:
    """Any Keep or Recompute is valid as long as nothing runs again that must not."""
    decisions = {
        t: data.draw(st.sampled_from((Keep(), Recompute()))) for t in sorted(step.saveable)
    } if not any(op.fixed for op in step.ops) else {}  # fmt: skip
    plan = evaluate(step, decisions, Budget(10**9), MACHINE, "eager", "random")
    assert check(plan) == []
    # Running anything twice breaks a rule.
    for k, runs in enumerate(plan.runs):
        for run in runs:
            twice = dataclasses.replace(plan, runs=(*plan.runs[:k], (*runs, run), *plan.runs[k + 1 :]))
            assert check(twice), (k, run)
