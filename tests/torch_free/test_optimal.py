"""The planner: never worse than another policy, near the best plan there is, and inside the bounds it is asked for."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import steps as recorded_steps
from memplan.errors import DoesNotFit
from memplan.ir import Budget, Machine, Plan, Step
from memplan.passes.bound import bound
from memplan.passes.chain import chain
from memplan.passes.check import check
from memplan.passes.master import pick
from memplan.passes.pipeline import evaluate, make_plan, smallest_plan
from memplan.passes.policies import Policy, name_of
from memplan.passes.policies.block_checkpoint import BlockCheckpoint, SqrtN
from memplan.passes.policies.chunked import Chunked
from memplan.passes.policies.greedy import Greedy
from memplan.passes.policies.offload import HandBack, OffloadAll, OffloadLayerInputs, decided
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.save_all import SaveAll
from memplan.steps.generated import layered
from tests.torch_free.oracle import outcomes
from tests.torch_free.random_steps import any_steps
from tests.torch_free.test_bound import ROOFLINE, machines, small_steps

SIZES = {13.97: 2.0, 11.97: 2.5, 9.86: 3.1, 7.73: 4.2, 5.59: 7.0, 3.82: 9.8}  # budget in GB -> most overhead in %
OTHERS: tuple[Policy, ...] = (SaveAll(), BlockCheckpoint(), SqrtN(), Chunked(small=0), Greedy(small=0))
MOVING: tuple[Policy, ...] = (OffloadAll(small=0), OffloadLayerInputs(small=0), HandBack(small=0))


def planned(step: Step, policy: Policy, budget: Budget, machine: Machine) -> Plan:
    return evaluate(step, policy(step, budget, machine), budget, machine, "eager", name_of(policy))


@settings(deadline=None, max_examples=60)
@given(small_steps(), machines(), st.booleans(), st.data())
def test_within_two_percent_of_the_best_plan_there_is(
    step: Step, machine: Machine, offload: bool, data: st.DataObject
) -> None:
    every = outcomes(step, machine, offload=offload)
    one = data.draw(st.sampled_from(every))
    budget = Budget(one.peak, host_bytes=one.host_peak)
    best = min(o.seconds for o in every if o.peak <= one.peak and o.host_peak <= one.host_peak)
    plan = planned(step, Optimal(small=0), budget, machine)
    assert plan.fits
    assert check(plan) == []
    assert plan.timeline.seconds <= 1.02 * best + 1e-15


@settings(deadline=None, max_examples=40)
@given(any_steps(), machines(), st.booleans(), st.data())
def test_never_worse_than_another_policy(step: Step, machine: Machine, offload: bool, data: st.DataObject) -> None:
    large = Budget(2**40, host_bytes=2**40 if offload else 0)
    rivals = OTHERS + (MOVING if offload else ())
    peaks = sorted({planned(step, rival, large, machine).peak for rival in rivals})
    budget = dataclasses.replace(large, bytes=data.draw(st.sampled_from(peaks)))
    plan = planned(step, Optimal(small=0), budget, machine)
    for rival in rivals:
        other = planned(step, rival, budget, machine)
        if other.fits:
            assert plan.fits, name_of(rival)
            assert plan.timeline.seconds <= other.timeline.seconds + 1e-12, name_of(rival)


def smallest(step: Step, policy: Policy, budget: Budget, machine: Machine) -> int:
    with pytest.raises(DoesNotFit) as refused:
        make_plan(step, policy, budget, machine, inner="eager")
    return refused.value.smallest


@settings(deadline=None, max_examples=25)
@given(any_steps(), machines(), st.booleans(), st.data())
def test_the_budget_that_a_refusal_names_is_enough(
    step: Step, machine: Machine, offload: bool, data: st.DataObject
) -> None:
    """So is each larger one; and every refusal, of whatever policy and budget, names the same."""
    nothing = Budget(-1, host_bytes=2**40 if offload else 0)
    optimal = Optimal()
    least = smallest(step, optimal, nothing, machine)
    assert least <= smallest_plan(step, machine, "eager", nothing).peak
    above = least + data.draw(st.integers(0, 2 * (least - step.base_bytes)))
    for size in (least, above):
        assert make_plan(step, optimal, dataclasses.replace(nothing, bytes=size), machine, inner="eager").fits
    below = dataclasses.replace(nothing, bytes=data.draw(st.integers(-1, least - 1)))
    for policy in (optimal, SaveAll()):
        assert smallest(step, policy, below, machine) == least


def test_a_search_for_the_least_goes_below_every_other_policy() -> None:
    """By a tenth of greedy's room and more, on a step that has no clear blocks. Greedy's refusal names its own."""
    step = layered(16)
    of_greedy = smallest(step, Greedy(), Budget(1), ROOFLINE)
    assert make_plan(step, Greedy(), Budget(of_greedy), ROOFLINE, inner="eager").peak == of_greedy
    least = smallest(step, Optimal(), Budget(1), ROOFLINE)
    assert least - step.base_bytes <= 0.9 * (of_greedy - step.base_bytes)


@pytest.fixture(scope="module")
def recorded() -> Step:
    return recorded_steps.load("llama8b_layers_4k_v32000")


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] * (size in (13.97, 9.86, 5.59))) for size in SIZES]
)
def test_the_recorded_step(recorded: Step, size: float) -> None:
    """Overheads and gaps that were asked for, at the peaks of torch's own plans."""
    budget = Budget(int(size * 1e9), host_bytes=100 * 10**9)
    plan = make_plan(recorded, Optimal(), budget, ROOFLINE, inner="eager")
    least = bound(recorded, budget, ROOFLINE)
    assert 100 * plan.overhead <= SIZES[size]
    assert least.seconds <= plan.timeline.seconds
    assert 100 * (plan.timeline.seconds - least.seconds) / plan.base_seconds <= 1.5


def test_the_same_plan_every_time(recorded: Step) -> None:
    budget = Budget(8 * 10**9, host_bytes=100 * 10**9)
    first, second = (Optimal()(recorded, budget, ROOFLINE) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("every", [1, 2, 4])
def test_options_of_blocks_do_not_depend_on_each_other(recorded: Step, every: int) -> None:
    """Whatever is picked for the blocks, the whole takes the sum of their times, and the memory that was allowed."""
    links = chain(recorded, ROOFLINE, every, 0)
    for room in (5 * 10**9, 9 * 10**9, 14 * 10**9, 25 * 10**9):
        picked = pick(links, room, 0, ROOFLINE, math.inf)
        assert picked is not None
        saved = frozenset[int]().union(*(option.saved for option, _ in picked))
        decisions = decided(recorded.read_in_backward | saved, saved, {})
        plan = evaluate(recorded, decisions, Budget(2**40), ROOFLINE, "eager", "picked")
        again = sum(ROOFLINE.seconds(recorded.ops[run.op]) for run in plan.backward if run.again)
        assert again == pytest.approx(sum(option.seconds for option, _ in picked))
        assert plan.peak - recorded.base_bytes == pytest.approx(room, rel=0.05)
        assert plan.peak - recorded.base_bytes <= 1.005 * room
