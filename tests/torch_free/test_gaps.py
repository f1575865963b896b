"""A gap in a plan's timeline is the gap in its Step: policies see what is then counted."""

from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import MemplanError
from memplan.ir import Block, Budget, Gap, Held, Moment, Step, Timeline
from memplan.passes import policies
from memplan.passes.gaps import with_gap
from memplan.passes.pipeline import evaluate
from memplan.passes.schedule import moved_ahead, saved_by
from memplan.passes.simulate import followed
from tests.torch_free.random_steps import MACHINE, steps

SIZES = st.integers(0, 300)
BUILT_IN = ("save-all", "block-checkpoint", "sqrt-n", "greedy")


def gaps() -> st.SearchStrategy[Gap]:
    return st.builds(lambda a, b, c, d: Gap("outside", max(a, b), b, max(c, d), d), SIZES, SIZES, SIZES, SIZES)


@given(step=steps(), gap=gaps(), policy=st.sampled_from(BUILT_IN))
def test_the_timeline_is_that_of_the_step(step: Step, gap: Gap, policy: str) -> None:
    decisions = policies.find(policy)(step, Budget(0), MACHINE)
    try:
        plan = evaluate(step, decisions, Budget(0), MACHINE, "eager", policy)
    except MemplanError:
        return  # no plan for this step at all
    if not plan.backward or moved_ahead(step, saved_by(step, decisions)):
        return  # what is moved into forward may come after the gap there
    counted = with_gap(plan, gap)
    simulated = evaluate(counted.step, decisions, Budget(0), MACHINE, "eager", policy)
    first = len(plan.forward)
    tangents = sum(step.tensors[t].bytes for t in step.backward.inputs)  # which the gap computes
    expected = list(counted.timeline.totals)
    expected[first + 1] += tangents
    assert expected == list(simulated.timeline.totals), (expected, simulated.timeline.totals)
    assert len(counted.timeline.moments) == len(plan.timeline.moments) + 2


@given(step=steps(), gap=gaps(), policy=st.sampled_from(BUILT_IN))
def test_policies_keep_what_is_kept(step: Step, gap: Gap, policy: str) -> None:
    plan = evaluate(step, {}, Budget(0), MACHINE, "eager", "save-all")
    step = with_gap(plan, gap).step
    found = evaluate(step, policies.find(policy)(step, Budget(0), MACHINE), Budget(0), MACHINE, "eager", policy)
    kept = next(t for t, tensor in enumerate(step.tensors) if tensor.name == "outside, kept")
    assert kept in found.saved
    assert any(run.op == next(i for i, op in enumerate(step.ops) if op.name == "outside") for run in found.forward)


def test_what_follows_a_step_is_beside_its_results_alone() -> None:
    blocks = (
        Block("activation", 100, "activation", 0, 2),
        Block("gradient", 10, "gradient", 2, 3),
        Block("another", 7, "gradient", 1, 3),
        Block("result", 1, "temporary", 0, 3),
    )
    timeline = Timeline("step", "predicted", tuple(Moment(str(i), i) for i in range(3)), blocks)
    gaps = (Gap("AdamW.step()", 50),)
    assert followed(timeline, Held((), gaps)).totals == (101, 108, 18, 68)
    assert followed(timeline, Held((), gaps, fresh=10)).totals == (101, 108, 18, 68)  # a view of what is larger
    assert followed(timeline, Held((("gradient", 17),), gaps, fresh=0)).totals == (101, 108, 18, 51)
    assert followed(timeline, Held((("gradient", 10),), gaps, fresh=7)).totals == (101, 108, 18, 58)


def test_room_for_what_is_held_is_room_for_less() -> None:
    """A plan that holds with all gradients there holds with some and with none, and not with more of anything."""
    gaps, kinds = (Gap("AdamW.step()", 50),), (("gradient", 17), ("optimizer_state", 30))
    most = Held(kinds, gaps, fresh=0).extent
    fewer = [Held((("gradient", 10), kinds[1]), gaps, fresh=7), Held(kinds[1:], gaps, fresh=17)]
    more = [Held(kinds, gaps, fresh=1), Held(kinds, (Gap("", 51),), fresh=0), Held(kinds[1:], gaps)]
    assert all(a <= b for held in fewer for a, b in zip(held.extent, most, strict=True))
    assert all(any(a > b for a, b in zip(held.extent, most, strict=True)) for held in more)
