"""Offloaded storages: bytes follow from the points alone, points from the bandwidth, time from two copy engines."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Budget, Keep, Machine, Offload, Plan, Run, Step
from memplan.passes import copies
from memplan.passes.check import check
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies import policy
from memplan.passes.schedule import schedule
from memplan.passes.simulate import peak, simulate
from memplan.passes.totals import totals
from tests.torch_free.conftest import SIZE, make_step
from tests.torch_free.random_steps import LAYOUTS, MACHINE, any_steps, steps_and_saved

FAST = dataclasses.replace(MACHINE, host_bandwidth=1e18)
IN_FLIGHT = st.sampled_from((None, 0, 1, 2))


def offloaded(step: Step, machine: Machine = MACHINE, in_flight: int | None = None, **points: int) -> Plan:
    """All that can leave the device leaves it."""
    saved = step.read_in_backward
    wanted = {t: Offload(**points) for t in step.offloadable & saved}
    found = copies.placed(step, schedule(step, saved), wanted, machine, in_flight)
    return evaluate(step, {t: found.get(t, Keep()) for t in saved}, Budget(10**9), machine, "eager", "by hand")


def executed(plan: Plan) -> list[int]:
    """Bytes alive while each run runs, of one pair, by executing it: names are dropped after their last use, by the
    graph, by a release, and by backward.
    """
    step, totals, names = plan.step, list[int](), set[int]()
    size = {t: x.bytes for t, x in enumerate(step.tensors)}
    for graph, runs in zip(step.graphs, plan.runs, strict=True):
        ahead = graph.phase == "forward"
        returned = set(graph.outputs) | (plan.saved if ahead else set())
        if not ahead:
            names = (names & (plan.saved | set(step.forward.outputs))) - plan.offloads.keys()
        caller = set() if ahead else set(graph.inputs) | set(step.forward.outputs)
        for moment, run in enumerate(runs):
            op, rest = step.ops[run.op], runs[moment + 1 :]
            names |= {t for t, d in plan.offloads.items() if not ahead and d.reload_at == run.op}
            twice = [t for t in op.outputs if t in names]  # made anew beside the saved one, and dropped at once
            names |= set(op.outputs)
            inside = op.workspace_bytes + sum(size[t] for t in twice)
            totals.append(step.base_bytes + sum(size[t] for t in names | caller) + inside)
            later = {t for r in rest for t in step.ops[r.op].inputs} | returned
            held = {t for t, d in plan.offloads.items() if ahead and any(r.op == d.release_at for r in rest)}
            gone = {t for t, d in plan.offloads.items() if ahead and not any(r.op == d.release_at for r in rest)}
            names = {t for t in names if t in held or (t in later and t not in gone)}
    return totals


@settings(deadline=None, max_examples=100)
@given(steps_and_saved(), IN_FLIGHT)
def test_bytes_are_an_executors(case: tuple[Step, frozenset[int]], in_flight: int | None) -> None:
    plan = offloaded(case[0], in_flight=in_flight)
    if not any(op.rng_bytes for op in plan.step.ops):  # generator states are test_simulate's
        assert list(plan.timeline.totals) == executed(plan)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_peak_is_the_timelines(fused: bool, layout: str) -> None:
    @settings(deadline=None, max_examples=40)
    @given(steps_and_saved(fused=fused, layout=layout), IN_FLIGHT)
    def agree(case: tuple[Step, frozenset[int]], in_flight: int | None) -> None:
        plan = offloaded(case[0], in_flight=in_flight)
        assert peak(plan.step, plan.saved, plan.offloads) == plan.peak
        moved = copies.moments(plan.step, plan.runs, plan.offloads)
        found = totals(plan.step, plan.runs, plan.saved, moved) + plan.step.base_bytes
        assert found.tolist() == list(plan.timeline.totals)

    agree()


@settings(deadline=None, max_examples=60)
@given(any_steps(), IN_FLIGHT, st.data())
def test_bytes_do_not_depend_on_the_bandwidth(step: Step, in_flight: int | None, data: st.DataObject) -> None:
    """Placed once, a plan has the same bytes on every machine; and all it waits for is in its time."""
    plan = offloaded(step, in_flight=in_flight)
    other = dataclasses.replace(MACHINE, host_bandwidth=data.draw(st.sampled_from((1.0, 1e3, 1e18))))
    there = simulate(step, plan.runs, plan.saved, other, plan.offloads)
    assert there.totals == plan.timeline.totals
    own = sum(other.seconds(step.ops[run.op]) for runs in plan.runs for run in runs)
    moved = sum(step.tensors[t].bytes for t in plan.offloads)
    assert there.seconds == pytest.approx(own + there.stalled + 2 * moved / other.bandwidth)
    if other.host_bandwidth == 1e18:
        assert there.stalled == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(any_steps())
def test_more_in_flight_takes_more_memory_and_waits_less(step: Step) -> None:
    plans = [offloaded(step, in_flight=n) for n in (0, 1, None)]
    assert plans[0].peak <= plans[1].peak <= plans[2].peak
    assert plans[0].timeline.stalled >= plans[2].timeline.stalled - 1e-9


def test_the_chain_by_hand() -> None:
    """Four layers of a product and a tanh, backward reads each tanh, last first. Over a bus of a quarter of the
    memory's bandwidth a copy takes 4 times what the memory takes (`t`), of which 1 is the device's own time. A tanh
    leaves while the next product reads it, which takes longer, but the last leaves beside the loss, which takes 1.
    Coming back each is waited for.
    """
    step = make_step()
    kept = evaluate(step, {}, Budget(10**9), MACHINE, "eager", "save-all")
    bus = dataclasses.replace(MACHINE, host_bandwidth=MACHINE.bandwidth / 4)
    waiting, fast, t = offloaded(step, bus, in_flight=0), offloaded(step, FAST), SIZE / MACHINE.bandwidth
    assert kept.timeline.totals[7] - step.base_bytes == 5 * SIZE  # four tanh and the last product
    assert waiting.timeline.totals[7] - step.base_bytes == 2 * SIZE
    assert waiting.timeline.stalled == pytest.approx((4 - 1 - 1) * t + 4 * (4 - 1) * t)
    assert waiting.timeline.seconds == pytest.approx(kept.timeline.seconds + waiting.timeline.stalled + 8 * t)
    assert fast.timeline.stalled == pytest.approx(0, abs=1e-12)
    assert fast.timeline.totals[7] - step.base_bytes == 2 * SIZE
    assert {b.decision for b in fast.timeline.host} == {"host"}
    assert fast.timeline.host_peak == 4 * SIZE


def test_copies_back_start_ahead_of_their_use() -> None:
    """Where a copy takes less than an op of backward, all do but the first, which is read at once; nobody waits."""
    step = make_step()
    bus = dataclasses.replace(MACHINE, host_bandwidth=MACHINE.bandwidth / 2)
    plan = offloaded(step, bus)
    found = sorted(copies.moments(step, plan.runs, plan.offloads), key=lambda copy: copy.first_use)
    assert [copy.reload < copy.first_use for copy in found] == [False, True, True, True]
    assert plan.timeline.stalled < 1e-12 < offloaded(step, bus, in_flight=0).timeline.stalled


def test_a_slow_bus_holds_what_waits_for_it() -> None:
    step = make_step()
    slow = dataclasses.replace(MACHINE, host_bandwidth=MACHINE.bandwidth / 1e3)
    patient, hasty = offloaded(step, slow), offloaded(step, slow, in_flight=0)
    assert patient.timeline.totals[7] > hasty.timeline.totals[7]
    assert patient.timeline.stalled < hasty.timeline.stalled


VALID = offloaded(make_step(), in_flight=0)
TANH = next(t for t, x in enumerate(VALID.step.tensors) if x.name == "tanh_1")
POINT = VALID.offloads[TANH]
CORRUPT = {
    "mm_2: reads tanh_1 in forward, which is not there": {"release_at": POINT.start_after},
    "grad_2: reads tanh_2 in backward, which is not there": {"storage": "tanh_2", "reload_at": None},
    "grad_1: reads tanh_1 in backward, which is not there": {"reload_at": len(VALID.step.ops) - 1},
    "tanh_1: its copy starts where it is not there, in forward": {"start_after": 0},
    "tanh_1: freed before its copy starts, in forward": {"start_after": 8},
    "loss: Offload(tier='host', start_after=8, release_at=8, reload_at=9) for a result of forward, which the caller "
    "holds": {"storage": "loss", "start_after": 8, "release_at": 8, "reload_at": 9},
}


def test_a_valid_plan_breaks_nothing() -> None:
    assert check(VALID) == []


@pytest.mark.parametrize("says", CORRUPT)
def test_a_corrupt_plan_is_found(says: str) -> None:
    changes = dict(CORRUPT[says])
    name = changes.pop("storage", "tanh_1")
    storage = next(t for t, x in enumerate(VALID.step.tensors) if x.name == name)
    decisions = dict(VALID.decisions)
    decisions[storage] = dataclasses.replace(VALID.offloads.get(storage, Offload()), **changes)
    assert says in check(dataclasses.replace(VALID, decisions=tuple(decisions.items())))


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ({"start_after": 10**6}, "its copy starts where it is not there, in forward"),
        ({"start_after": -1}, "its copy starts where it is not there, in forward"),
        ({"start_after": 9}, "its copy starts where it is not there, in forward"),  # of backward
        ({"release_at": 10**6}, "freed where no op of forward runs"),
        ({"reload_at": 0}, "reads tanh_1 in backward, which is not there"),
        ({"reload_at": 10**6}, "reads tanh_1 in backward, which is not there"),
        ({"tier": "tape"}, "offloads to tier 'tape': there are host and disk"),
    ],
)
def test_wrong_points_are_named(points: dict[str, Any], says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        evaluate(make_step(), {TANH: Offload(**points)}, Budget(10**9), MACHINE, "eager", "mine")


def test_what_the_caller_holds_is_not_offloaded() -> None:
    step = make_step()
    with pytest.raises(MemplanError, match="offloads 'loss', which is a result of forward"):
        evaluate(step, {"loss": Offload()}, Budget(10**9), MACHINE, "eager", "mine")  # type: ignore[dict-item]


def test_what_the_host_has_no_room_for_is_refused() -> None:
    def everything(step: Step, *_: object) -> dict[int, Offload]:
        return dict.fromkeys(step.offloadable & step.read_in_backward, Offload())

    says = r"'everything' has 262.1 KB in the host's memory .* host_budget is 0 B, the default"
    with pytest.raises(DoesNotFit, match=says):
        make_plan(make_step(), policy("everything")(everything), Budget(10**9), MACHINE, inner="eager")


def test_the_report_says_what_is_off_the_device() -> None:
    text = str(dataclasses.replace(VALID, budget=Budget(10**9, host_bytes=10**6)))
    assert "off the device at most 262.1 KB on the host; host budget 1.000 MB; waits 0.0 ms for copies" in text
    assert "\noffload" in text


def test_a_storage_that_backward_makes_again_is_not_copied() -> None:
    """An offload of what backward does not read is no offload."""
    step = make_step()
    plan = evaluate(step, {"mm_0": Offload()}, Budget(10**9), MACHINE, "eager", "mine")  # type: ignore[dict-item]
    assert not plan.offloads
    assert all(isinstance(run, Run) for runs in plan.runs for run in runs)
