"""Steps and budgets that cannot be are refused with a sentence that says what is wrong; small steps are planned."""

import dataclasses
import gzip
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings

from memplan import steps as recorded_steps
from memplan.errors import DoesNotFit, MemplanError, Stopped
from memplan.ir import Budget, Decisions, Graph, Machine, Op, Plan, Recompute, Step, Tensor
from memplan.passes.blocks import boundaries
from memplan.passes.pipeline import make_plan
from memplan.passes.policies import optimal, policy
from memplan.passes.policies.optimal import Optimal
from memplan.ranking import rank
from memplan.serialize import from_json, to_json
from memplan.sound import unsound
from memplan.units import human
from tests.torch_free.conftest import MACHINE, make_step
from tests.torch_free.random_steps import any_steps

POLICIES = (
    "optimal",
    "greedy",
    "block-checkpoint",
    "sqrt-n",
    "save-all",
    "offload-layer-inputs",
    "hand-back",
    "chunked",
)


def refused(step: Step, policy: Any, budget: int) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as e:
        make_plan(step, policy, Budget(budget), MACHINE, inner="eager")
    return e.value


@pytest.mark.parametrize("policy", ["optimal", "greedy", "save-all"])
def test_an_infeasible_budget_names_the_moment_the_tensors_and_what_fits(step: Step, policy: str) -> None:
    error = refused(step, policy, step.base_bytes + 1)
    best = make_plan(step, policy if policy != "save-all" else "greedy", Budget(error.smallest), MACHINE, inner="eager")
    first, where, *largest = str(error).splitlines()
    assert f'at least "{error.smallest}B"' in first
    moment = best.timeline.moments[best.timeline.peak_moment]
    assert where.startswith(f"alive at that peak, at {moment.name} in {moment.phase}, beyond {human(step.base_bytes)}")
    names = [block.name for block in best.timeline.alive()[:3]]
    assert all(name in line for name, line in zip(names, largest, strict=False))


@settings(deadline=None, max_examples=40)
@given(any_steps())
def test_the_planner_fits_the_smallest_budget_that_it_named(step: Step) -> None:
    assume(step.saveable)
    try:
        make_plan(step, Optimal(small=0), Budget(step.base_bytes), MACHINE, inner="eager")
    except DoesNotFit as error:
        assert make_plan(step, Optimal(small=0), Budget(error.smallest), MACHINE, inner="eager").fits
        assert error.smallest <= refused(step, "greedy", step.base_bytes).smallest


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_with_no_blocks_is_planned(policy: str) -> None:
    forward = Op("mm", "op", (0,), (1, 2), traffic=9, dtype="float32")
    backward = Op("mm'", "op", (1, 2, 3), (4,), traffic=9, dtype="float32")
    graphs = (Graph("forward", (forward,), (0,), ()), Graph("backward", (backward,), (3,), (4,), "backward"))
    step = Step("one op", tuple(Tensor(name, 100, "activation") for name in ("x", "a", "b", "a'", "x'")), graphs, (0,))
    assert boundaries(step) == []
    machine = dataclasses.replace(MACHINE, host_bandwidth=1e9, unified=False)
    for size in (10**9, make_plan(step, "greedy", Budget(10**9), MACHINE, inner="eager", smallest=True).peak):
        plan = make_plan(step, policy, Budget(size, host_bytes=10**9), machine, inner="eager", fit=False)
        assert plan.fits or policy not in ("optimal", "greedy")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_with_nothing_in_it_is_planned(policy: str) -> None:
    graphs = (Graph("forward", (), (), ()), Graph("backward", (), (), (), "backward"))
    plan = make_plan(Step("empty", (), graphs, ()), policy, Budget(1), MACHINE, inner="eager")
    assert (plan.peak, plan.decisions) == (0, ())


def cyclic(value: dict[str, Any]) -> None:
    """The first op reads what the last makes."""
    value["graphs"][0]["ops"][0]["inputs"].append(value["graphs"][0]["ops"][-1]["outputs"][0])


def reversed_(value: dict[str, Any]) -> None:
    value["graphs"][0]["ops"].reverse()


def without_the_last_op(value: dict[str, Any]) -> None:
    del value["graphs"][0]["ops"][-1]


def without_the_last_tensors(value: dict[str, Any]) -> None:
    del value["tensors"][-2:]


def made_twice(value: dict[str, Any]) -> None:
    value["graphs"][0]["ops"].append(value["graphs"][0]["ops"][-1])


def negative(value: dict[str, Any]) -> None:
    value["graphs"][1]["ops"][0]["inputs"][0] = -1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cyclic, "which nothing before it makes: a cycle"),
        (reversed_, "which nothing before it makes: a cycle, or ops out of order"),
        (without_the_last_op, "which nothing "),
        (without_the_last_tensors, "and the step has .*: is it cut short?"),
        (made_twice, "which is there already: a storage is made once"),
        (negative, "names storage -1"),
    ],
)
def test_steps_that_cannot_run_are_refused(
    step: Step, plan: Plan, damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    document = json.loads(to_json(step))
    damage(document["value"])
    with pytest.raises(MemplanError, match=rf"a\.json holds a step that cannot run: .*{says}"):
        from_json(json.dumps(document), Step, "a.json")
    saved = json.loads(to_json(plan))
    damage(saved["value"]["step"])
    with pytest.raises(MemplanError, match="cannot run"):
        from_json(json.dumps(saved), Plan)


@settings(deadline=None, max_examples=60)
@given(any_steps())
def test_steps_of_every_layout_can_run(step: Step) -> None:
    assert unsound(step) == ""
    assert from_json(to_json(step), Step) == step


def test_recorded_steps_that_are_cut_short_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(to_json(make_step(2)).encode())
    (tmp_path / "half.json.gz").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(recorded_steps, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(MemplanError, match=re.escape("cannot read the recorded step 'half'")):
        recorded_steps.load("half")


@policy("patient")
def patient(step: Step, budget: Budget, machine: Machine) -> Decisions:
    """Has something at once, and goes on looking."""
    try:
        time.sleep(30)
    except Stopped:
        return dict.fromkeys(step.read_in_backward, Recompute())
    return {}


def test_a_policy_that_is_stopped_keeps_its_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(4)
    [row] = rank({"toy": step}, [MACHINE], [patient], [10**9], limit=0.3).rows
    assert row.fits
    assert row.overhead > 0
    assert row.note == "policy 'patient' took longer than 0.3 seconds and was stopped: its best so far"

    def endless(*_: object) -> Any:
        while True:
            time.sleep(0.01)
            yield from ()

    monkeypatch.setattr(optimal, "polished", endless)
    least = make_plan(step, "greedy", Budget(0), MACHINE, inner="eager", fit=False).peak
    monkeypatch.setattr(optimal, "NEAR", -1.0)  # nothing is near enough: the search begins
    [row] = rank({"toy": step}, [MACHINE], ["optimal"], [least], limit=3).rows
    assert row.fits
    assert row.note.endswith("took longer than 3 seconds and was stopped: its best so far")
