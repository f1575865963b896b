"""The bound is below every plan that fits, whatever decided it, and exact where there is room for everything."""

import dataclasses
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan import steps as recorded_steps
from memplan.ir import Budget, Machine, Plan, Step
from memplan.passes.bound import bound, with_bound
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies.offload import OffloadAll
from memplan.passes.pricing import priced
from memplan.serialize import from_json, to_json
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
    if step.fused and draw(st.booleans()):
        step = priced(step, "fused")
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
    assert f" % time, gap {100 * plan.gap:.1f} (roofline-v1); " in text.splitlines()[-1]
    assert f"600.0 MB more could save {6e8 * plan.bound.per_byte * 1e3:.3g} ms" in text
    assert f"memory is shortest at {plan.bound.at}" in text
    assert from_json(to_json(plan), Plan).bound == plan.bound
    cheaper = bound(step, Budget(6 * 10**9 + 10**6), ROOFLINE)
    saved = plan.bound.seconds - cheaper.seconds
    assert saved == pytest.approx(1e6 * plan.bound.per_byte, rel=0.1)  # a slope is a slope


def test_what_is_outside_of_the_class_has_no_bound(step: Step) -> None:
    unlike = dataclasses.replace(MACHINE, host_bandwidth=1e9)
    large = Budget(2**40, host_bytes=2**40)
    disk = evaluate(step, OffloadAll("disk", small=0)(step, large, unlike), large, unlike, "eager", "disk")
    assert disk.offloads
    assert with_bound(disk).bound is None
    over = evaluate(step, {}, Budget(1), MACHINE, "eager", "save-all")
    assert with_bound(over).bound is None
    assert "gap" not in str(over)
