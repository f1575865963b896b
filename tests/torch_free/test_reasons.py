"""What would follow from the other choice is what follows when it is made: bytes by the simulator, asked otherwise."""

import dataclasses
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import serialize
from memplan.errors import MemplanError
from memplan.groups import groups
from memplan.ir import Budget, Keep, Machine, Offload, Op, Plan, Recompute, Step
from memplan.passes import reasons
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.reasons import with_reasons
from memplan.passes.schedule import schedule
from memplan.passes.simulate import peak, seconds
from memplan.report.text import WIDTH
from memplan.units import human
from tests.torch_free.conftest import MACHINE, make_step
from tests.torch_free.random_steps import steps

AMPLE = Budget(10**12)
BUS = dataclasses.replace(MACHINE, unified=False, host_bandwidth=1e9)


LARGE = 10**7


@pytest.fixture
def step() -> Step:
    """Its activations are what decides about its peak."""
    made = make_step()
    large = (dataclasses.replace(t, bytes=LARGE) if t.name.startswith(("mm", "tanh")) else t for t in made.tensors)
    return dataclasses.replace(made, tensors=tuple(large))


def planned(step: Step, *recomputed: str, budget: Budget = AMPLE, machine: Machine = MACHINE) -> Plan:
    """Keep all but what has such a name."""
    decisions = {
        t: Recompute() if step.tensors[t].name.startswith(recomputed) else Keep() for t in step.read_in_backward
    }
    return evaluate(step, decisions, budget, machine, "eager", "by hand")


def said(plan: Plan, name: str) -> str:
    instead = with_reasons(plan).instead
    return next(reason for t, reason in instead.items() if plan.step.tensors[t].name.startswith(name))


def time(step: Step, plan: Plan, saved: set[int] | frozenset[int]) -> float:
    runs = [run for own in schedule(step, saved) for run in own]
    return 1e6 * (seconds(step, runs, plan.machine) - seconds(step, (*plan.forward, *plan.backward), plan.machine))


def test_what_is_kept_could_be_recomputed(step: Step) -> None:
    plan = planned(step)
    added = time(step, plan, frozenset())
    assert added > 100
    assert said(plan, "tanh") == f"recompute: +{added / 1e3:.1f} ms"


def test_what_is_recomputed_could_be_kept(step: Step) -> None:
    plan = planned(step, "tanh_0")
    kept = peak(step, step.read_in_backward)
    assert kept - 1000 > plan.peak
    tight = dataclasses.replace(plan, budget=Budget(kept - 1000))
    assert said(tight, "tanh_0") == "keep: over by 1.000 KB"
    saved = -time(step, plan, step.read_in_backward)
    assert said(dataclasses.replace(plan, budget=Budget(kept)), "tanh_0") == f"keep: fits, -{saved / 1e3:.1f} ms"


def test_what_must_not_run_again(step: Step) -> None:
    def fixed(op: Op) -> Op:
        return dataclasses.replace(op, fixed="it draws the random seed") if op.name == "mm_0" else op

    forward = dataclasses.replace(step.forward, ops=tuple(map(fixed, step.forward.ops)))
    plan = planned(dataclasses.replace(step, graphs=(forward, step.backward)))
    assert said(plan, "tanh_0") == "recompute: not, mm_0: it draws the random seed"
    own = dataclasses.replace(forward, ops=tuple(dataclasses.replace(op, fixed="a collective") for op in forward.ops))
    plan = planned(dataclasses.replace(step, graphs=(own, step.backward)))
    assert said(plan, "tanh_0").startswith("recompute: not, ")


def test_the_host_where_it_is_cheaper(step: Step) -> None:
    """With a slow bus it is computed again, and without room on the host nothing leaves."""
    for bandwidth, verb in ((1e15, "offload"), (1e3, "recompute")):
        machine = dataclasses.replace(BUS, host_bandwidth=bandwidth, bandwidth=1e15)
        plan = planned(step, budget=dataclasses.replace(AMPLE, host_bytes=10**9), machine=machine)
        assert said(plan, "tanh").startswith(f"{verb}: +")
    assert said(planned(step, machine=dataclasses.replace(machine, host_bandwidth=1e15)), "tanh").startswith(
        "recompute: "
    )


def test_what_is_offloaded_could_be_kept(step: Step) -> None:
    away = {t: Offload() for t in step.read_in_backward & step.offloadable}
    plan = evaluate(step, away, dataclasses.replace(AMPLE, host_bytes=10**9), BUS, "eager", "by hand")
    assert plan.offloads and plan.timeline.stalled
    assert re.fullmatch(r"keep: fits, -\d+\.\d [mu]s", said(plan, "tanh"))
    kept = peak(step, step.read_in_backward)
    tight = dataclasses.replace(plan, budget=Budget(kept - LARGE, host_bytes=10**9))
    assert said(tight, "tanh") == f"keep: over by {human(LARGE)}"


def test_a_copy_that_waits_for_what_runs_no_more_is_placed_anew(step: Step) -> None:
    """tanh_1 comes back before mm_3 runs again, which it does not if tanh_3 is kept."""
    index = {t.name: i for i, t in enumerate(step.tensors)}
    again = next(i for i, op in enumerate(step.ops) if op.name == "mm_3")
    decisions = dict.fromkeys(step.read_in_backward, Keep()) | {
        index["tanh_1"]: Offload(reload_at=again),
        index["tanh_3"]: Recompute(),
    }
    budget = dataclasses.replace(AMPLE, host_bytes=10**9)
    plan = evaluate(step, decisions, budget, BUS, "eager", "by hand")
    with pytest.raises(MemplanError):
        evaluate(step, dict(plan.decisions) | {index["tanh_3"]: Keep()}, budget, BUS, "eager", "by hand")
    assert said(plan, "tanh_3").startswith("keep: fits, ")


@settings(max_examples=40, deadline=None)
@given(steps(), st.data())
def test_over_by_is_by_the_simulator(step: Step, data: st.DataObject) -> None:
    """Whatever was decided: a row is over by what the simulator has with just that row's storages saved too."""
    undecided = sorted(step.read_in_backward)
    recomputed = data.draw(st.sets(st.sampled_from(undecided))) if undecided else set()
    decisions = {t: Recompute() if t in recomputed else Keep() for t in undecided}
    try:
        plan = evaluate(step, decisions, Budget(0), MACHINE, "eager", "by hand")
    except MemplanError:  # of an op that must not run twice
        return
    instead = with_reasons(plan).instead
    for members in groups(plan):
        if isinstance(dict(plan.decisions)[members[0]], Recompute):
            more = peak(step, plan.saved.union(members))
            assert instead[members[0]] == (f"keep: over by {human(more)}" if more else "keep: fits, +0.0 us")
        elif "not" not in instead[members[0]]:
            less = peak(step, plan.saved.difference(members))
            assert less == 0 or instead[members[0]] == f"recompute: over by {human(less)}"


def test_they_are_in_the_table_and_in_files(step: Step) -> None:
    plan = planned(step, "tanh_0")
    assert "instead" not in str(plan)  # nobody has looked
    plan = with_reasons(dataclasses.replace(plan, budget=Budget(plan.peak)))
    head, *rows = str(plan).splitlines()
    row = next(row for row in rows if row.startswith("recompute") and "over by" in row)
    assert head.index("instead") == row.index("keep: over by ") and len(row) <= WIDTH
    text = serialize.to_json(plan)
    assert serialize.from_json(text, Plan) == plan
    before = serialize.to_json(dataclasses.replace(plan, reasons=()))
    assert "reasons" in text and "reasons" not in before
    assert serialize.from_json(before, Plan).reasons == ()


def test_every_storage_of_a_row_and_no_row_that_is_not_shown(plan_of: Callable[..., Plan]) -> None:
    plan = with_reasons(make_plan(plan_of(32).step, "save-all", AMPLE, MACHINE, inner="eager"))
    assert [members for members, _ in plan.reasons] == groups(plan)
    tensors = tuple(dataclasses.replace(t, source=f"toy.py:{i}") for i, t in enumerate(plan.step.tensors))
    many = dataclasses.replace(plan, step=dataclasses.replace(plan.step, tensors=tensors))
    assert len(groups(many)) == 32 and len(with_reasons(many).reasons) == 24


def test_it_ends_in_time(step: Step) -> None:
    plan = planned(step, "tanh_0")
    assert len(groups(plan)) == 3
    limit = 3 * sum(map(len, plan.runs))
    some = with_reasons(plan, limit - 1)
    assert len(some.reasons) == 2
    assert f"said of the 2 largest of 3 rows: for more, over {limit - 1:,} runs" in str(some)
    assert with_reasons(plan, limit).notes == plan.notes


@pytest.mark.parametrize("host", [0, 10**9])
def test_nothing_else_changes(step: Step, host: int) -> None:
    """The plan as it is, evaluated again, is the plan: what a reason says is due to its row alone."""
    plan = make_plan(step, "offload-all" if host else "sqrt-n", Budget(10**9, host_bytes=host), BUS, inner="eager")
    again = reasons._evaluated(plan, reasons._as_it_is(plan))
    assert again is not None and (again.runs, again.timeline) == (plan.runs, plan.timeline)
