"""The bound is below every plan that fits, whatever decided it, and exact where there is room for everything."""

import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan import steps as recorded_steps
from memplan.ir import Bound, Budget, Machine, Plan, Step
from memplan.passes.bound import bound, with_bound
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies.offload import OffloadAll
from memplan.serialize import from_json, to_json
from memplan.units import human
from tests.torch_free.oracle import MOST, outcomes
from tests.torch_free.random_steps import LAYOUTS, MACHINE, steps

ROOFLINE = Machine(
    "roofline-v1",
    "cuda",
    80 * 10**9,
    2.6e12,
    (("bfloat16", 600e12), ("float32", 600e12)),
    host_bandwidth=50e9,
    contention=0.0,
)


@st.composite
def small_steps(draw: st.DrawFn) -> Step:
    """Steps of every layout, fused or not, some of whose ops must not run twice: in half of them none may."""
    step = draw(steps(layout=draw(st.sampled_from(sorted(LAYOUTS))), max_ops=6, fused=draw(st.booleans())))
    assume(0 < len(step.saveable) <= MOST)
    if draw(st.booleans()):  # copies are the only way
        graphs = tuple(
            dataclasses.replace(g, ops=tuple(dataclasses.replace(op, fixed="random") for op in g.ops))
            for g in step.graphs
        )
        step = dataclasses.replace(step, graphs=graphs)
    return step


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """A bus that is slow, as fast as the ops, or faster, whose copies cost the device time or not."""
    bus, contention = draw(st.sampled_from((1e7, 1e8, 1e9, 1e12))), draw(st.sampled_from((0.0, 1.0)))
    return dataclasses.replace(MACHINE, host_bandwidth=bus, contention=contention)


@settings(deadline=None, max_examples=60)
@given(small_steps(), machines(), st.booleans())
def test_no_plan_is_faster_than_the_bound(step: Step, machine: Machine, offload: bool) -> None:
    for best in outcomes(step, machine, offload=offload):
        budget = Budget(best.peak, host_bytes=best.host_peak)
        assert bound(step, budget, machine).seconds <= best.seconds * (1 + 1e-6) + 1e-15


def test_with_all_the_room_there_is_the_bound_is_the_step() -> None:
    step = recorded_steps.load("llama8b_layers_4k_v32000")
    found = bound(step, Budget(10**12), ROOFLINE)
    assert math.isclose(found.seconds, sum(map(ROOFLINE.seconds, step.ops)), rel_tol=1e-5)
    assert (found.per_byte, found.at) == (0.0, "")


def test_where_nothing_fits_the_bound_is_infinite(step: Step) -> None:
    assert bound(step, Budget(step.base_bytes + 1), MACHINE).seconds == math.inf


def test_a_plan_says_how_far_it_is_from_the_best() -> None:
    step = recorded_steps.load("llama8b_layers_4k_v32000")
    plan = with_bound(make_plan(step, "greedy", Budget(6 * 10**9), ROOFLINE, inner="eager"))
    assert plan.bound is not None and plan.gap is not None
    assert plan.gap == (plan.timeline.seconds - plan.bound.seconds) / plan.base_seconds > 0
    text = str(plan)
    assert f" % time, gap {100 * plan.gap:.1f} (estimate); " in text.splitlines()[-1]
    assert f"600.0 MB more could save {6e8 * plan.bound.per_byte * 1e3:.3g} ms" in text
    assert f"memory is shortest at {plan.bound.at}" in text
    assert from_json(to_json(plan), Plan).bound == plan.bound
    cheaper = bound(step, Budget(6 * 10**9 + 10**6), ROOFLINE)
    saved = plan.bound.seconds - cheaper.seconds
    assert saved == pytest.approx(1e6 * plan.bound.per_byte, rel=0.1)  # a slope is a slope


def test_more_of_what_binds_saves_what_the_advice_says() -> None:
    """Slopes are slopes: a little more memory, and a little faster bus, lower the bound by as much."""
    step, budget = recorded_steps.load("llama8b_layers_4k_v32000"), Budget(6 * 10**9, host_bytes=10**11)
    least = bound(step, budget, ROOFLINE)
    assert least.per_byte > 0
    assert least.per_bus > 0
    more = bound(step, dataclasses.replace(budget, bytes=budget.bytes + 10**6), ROOFLINE)
    assert least.seconds - more.seconds == pytest.approx(1e6 * least.per_byte, rel=0.1)
    faster = bound(step, budget, dataclasses.replace(ROOFLINE, host_bandwidth=50e9 * 1.001))
    assert least.seconds - faster.seconds == pytest.approx(1e-3 * least.per_bus, rel=0.1)


def advice(plan: Plan, **found: float) -> list[str]:
    """The lines between the budget and the verdict when the bound is short at the plan's first op."""
    least = Bound(plan.timeline.seconds, at=plan.step.ops[0].name)
    text = str(dataclasses.replace(plan, bound=dataclasses.replace(least, **found)))
    lines = text.partition("\nbudget ")[2].splitlines()[1:-1]
    return [line for line in lines if not line.startswith(("note: ", "off the device"))]


def test_advice_says_what_binds(plan: Plan) -> None:
    unit, first = plan.budget.bytes // 10, plan.step.ops[0].name
    memory, among = advice(plan, per_byte=2e-3 / unit)
    assert memory.startswith(f"{human(unit)} more could save 2 ms (estimate); memory is shortest at {first}")
    assert among.startswith(
        "gap: to plans of the same order of ops, each run again once at most, storages kept, copied or"
    )
    assert len(among) <= 120
    _, slices, _ = advice(plan, per_byte=2e-3 / unit, needs=2 * unit)
    assert slices.startswith(f"what runs there takes {human(2 * unit)} in any plan: slices (option tiles) could save ")
    assert slices.endswith("up to 4 ms (estimate)")
    bus = "a bus 10 % faster could save"
    assert f"{bus} 1 ms (estimate)" in advice(plan, per_byte=2e-3 / unit, per_bus=1e-2)
    assert f"{bus} 3 ms (estimate): the bus binds" in advice(plan, per_byte=2e-3 / unit, per_bus=3e-2)
    least = dataclasses.replace(plan, bound=Bound(plan.timeline.seconds))
    assert among in str(least)
    assert "could save" not in str(least)
    assert "gap" not in str(plan)


def test_what_is_outside_of_the_class_has_no_bound(step: Step) -> None:
    unlike = dataclasses.replace(MACHINE, host_bandwidth=1e9)
    large = Budget(2**40, host_bytes=2**40)
    disk = evaluate(step, OffloadAll("disk", small=0)(step, large, unlike), large, unlike, "eager", "disk")
    assert disk.offloads
    assert with_bound(disk).bound is None
    over = evaluate(step, {}, Budget(1), MACHINE, "eager", "save-all")
    assert with_bound(over).bound is None
    assert "gap" not in str(over)
