"""Built-in policies make valid plans that fit when they can; wrong policies are refused by name."""

import dataclasses
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings

from memplan import steps as recorded_steps
from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Budget, Decisions, Keep, Machine, Plan, Recompute, Step
from memplan.passes import policies
from memplan.passes.check import check
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies.block_checkpoint import BlockCheckpoint, SqrtN
from memplan.passes.policies.chunked import Chunked
from memplan.passes.policies.greedy import Greedy, Point, choose, path
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.save_all import SaveAll
from memplan.passes.policies.torch_saved import recorded
from memplan.passes.schedule import schedule
from memplan.passes.simulate import peak
from tests.torch_free.random_steps import MACHINE, any_steps

ROOFLINE = Machine("roofline-v1", "cuda", 80 * 10**9, 2.6e12, (("bfloat16", 600e12), ("float32", 600e12)))
BUILT_IN = (SaveAll(), BlockCheckpoint(), SqrtN(), Chunked(), Greedy(), Optimal())


def evaluated(step: Step, policy: policies.Policy, budget: int, machine: Machine = MACHINE) -> Plan:
    allowed = Budget(budget)
    return evaluate(step, policy(step, allowed, machine), allowed, machine, "eager", policies.name_of(policy))


@settings(deadline=None, max_examples=60)
@given(any_steps())
def test_every_built_in_policy_makes_valid_plans(step: Step) -> None:
    for policy in BUILT_IN:
        for budget in (0, 10**9):
            plan = evaluated(step, policy, budget)
            assert check(plan) == []
            assert plan.peak == peak(step, plan.saved)


@settings(deadline=None, max_examples=60)
@given(any_steps())
def test_greedy_on_random_steps(step: Step) -> None:
    every = [evaluated(step, policy, 0) for policy in BUILT_IN if not isinstance(policy, Optimal)]
    least = min(plan.peak for plan in every)
    assert evaluated(step, Greedy(), least).fits  # as small as any built-in policy
    budgets = [*range(least, every[0].peak, max(1, (every[0].peak - least) // 5)), every[0].peak]
    plans = [make_plan(step, Greedy(), Budget(b), MACHINE, inner="eager") for b in budgets]
    assert all(plan.fits for plan in plans)
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.peak <= larger.peak
        assert smaller.overhead >= larger.overhead - 1e-12
    assert plans[-1].overhead <= every[0].overhead + 1e-12  # save-all's: negative if nothing needs some op


@cache
def llama() -> tuple[Step, list[Point]]:
    step = recorded_steps.load("llama8b_layers_4k_v32000")
    return step, path(step, ROOFLINE, Greedy().points)


def on_llama(available: int) -> Plan:
    """What greedy answers; the path is made once, as it does not depend on the budget."""
    step, points = llama()
    saved = choose(step, points, available).saved
    decisions = {t: Keep() if t in saved else Recompute() for t in step.read_in_backward | saved}
    return evaluate(step, decisions, Budget(available), ROOFLINE, "eager", "greedy")


def test_greedy_beats_torch_at_equal_peak() -> None:
    """By 7 % and more, except at the largest peak, where torch's own set is the best point of the path."""
    step, _ = llama()
    lines = []
    for ratio in (0.8, 0.4, 0.3, 0.2, 0.1):
        torchs = evaluate(step, recorded(step, f"torch-budget-{ratio}"), Budget(0), ROOFLINE, "eager", "torch")
        ours = on_llama(torchs.peak)
        lines.append(f"{torchs.peak / 1e9:6.2f} GB  torch {torchs.overhead:.2%}  greedy {ours.overhead:.2%}")
        assert ours.fits
        assert ours.overhead <= torchs.overhead * (1.0 if ratio == 0.8 else 0.93) + 1e-9, lines[-1]
    print("\n".join(lines))


def test_greedy_is_monotone_on_a_recorded_step() -> None:
    step, points = llama()
    least = on_llama(0).peak
    plans = [on_llama(int(b)) for b in (least, 1.05 * least, 4e9, 9e9, 29.7e9)]
    assert all(plan.fits and check(plan) == [] for plan in plans)
    assert [p.peak for p in plans] == sorted(p.peak for p in plans)
    assert [p.overhead for p in plans] == sorted((p.overhead for p in plans), reverse=True)
    assert plans[-1].overhead == 0
    assert least <= min(evaluated(step, p, 0, ROOFLINE).peak for p in (BlockCheckpoint(), SqrtN(), SaveAll()))
    assert [p.seconds for p in points] == sorted(p.seconds for p in points)


def test_a_points_seconds_and_bytes_are_the_plans() -> None:
    step, points = llama()
    for point in points[:: len(points) // 5]:
        _, backward = schedule(step, point.saved)
        assert point.seconds == pytest.approx(sum(ROOFLINE.seconds(step.ops[r.op]) for r in backward if r.again))
        assert point.crossing <= peak(step, point.saved)


@pytest.mark.parametrize("reserve", [0.0, 0.02])
@pytest.mark.parametrize("policy", ["save-all", "greedy", "sqrt-n"])
def test_the_smallest_budget_named_fits(step: Step, policy: str, reserve: float) -> None:
    with pytest.raises(DoesNotFit) as e:
        make_plan(step, policy, Budget(1, 1000, reserve), MACHINE, inner="eager")
    first = str(e.value).splitlines()[0]
    assert f'at least "{e.value.smallest}B"' in first
    assert e.value.budget == 1
    assert e.value.smallest <= e.value.needed
    assert make_plan(step, "greedy", Budget(e.value.smallest, 1000, reserve), MACHINE, inner="eager").fits
    assert make_plan(step, policy, Budget(e.value.needed, 1000, reserve), MACHINE, inner="eager").fits
    with pytest.raises(DoesNotFit):
        make_plan(step, "greedy", Budget(e.value.smallest - 1, 1000, reserve), MACHINE, inner="eager")


def fixed_pair() -> Step:
    """One op makes two storages, and must not run twice."""
    from memplan.ir import Graph, Op, Tensor

    names = ("x", "first", "second", "tangent", "gradient")
    forward = (Op("pair", "op", (0,), (1, 2), traffic=1, dtype="float32", fixed="a collective"),)
    backward = (Op("gradient", "op", (1, 2, 3), (4,), traffic=1, dtype="float32"),)
    graphs = (Graph("forward", forward, (0,), ()), Graph("backward", backward, (3,), (4,), "backward"))
    return Step("pair", tuple(Tensor(n, 10, "activation") for n in names), graphs, (0,))


def fails(step: Step, budget: Budget, machine: Machine) -> Decisions:
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (fails, "policy 'fails' raised KeyError: 'layer'"),
        ([Keep()], "returned a list; it must return a mapping"),
        ({"frist": Keep()}, "'frist' that the step does not have; did you mean 'first'?"),
        ({99: Keep()}, "99 that the step does not have: the step has 5"),
        ({"first": "keep"}, "gives 'keep' for 'first'; it must be Keep"),
        ({"x": Keep()}, "'x', which cannot cross"),
        ({"gradient": Keep()}, "'gradient', which cannot cross"),
        ({"first": Recompute(), "second": Recompute()}, "pair: recomputed, and must not be: a collective"),
        ({"first": Keep(), "second": Recompute()}, "pair: recomputed, and must not be: a collective"),
    ],
)
def test_wrong_policies_are_refused(policy: Any, says: str) -> None:
    chosen = policy if callable(policy) else policies.policy("mine")(lambda *_: policy)
    with pytest.raises(MemplanError) as e:
        make_plan(fixed_pair(), chosen, Budget(10**6), MACHINE, inner="eager")
    first = str(e.value).splitlines()[0]
    assert says in first
    assert "policy" in first


def test_names_stand_for_storages() -> None:
    step = fixed_pair()
    by_name: Mapping[Any, Any] = {"first": Keep(), "second": Keep()}
    plan = make_plan(step, policies.policy("mine")(lambda *_: by_name), Budget(10**6), MACHINE, inner="eager")
    assert (plan.saved, plan.policy) == ({1, 2}, "mine")


def test_policies_are_found_by_name() -> None:
    assert policies.find("greedy") == Greedy()
    assert {"greedy", "save-all", "block-checkpoint", "sqrt-n", "torch-min-cut"} <= set(policies.builtin())
    with pytest.raises(MemplanError, match=r"'gredy'.*did you mean 'greedy'"):
        policies.find("gredy")
    with pytest.raises(MemplanError, match="neither a name nor callable"):
        policies.find(3)  # type: ignore[arg-type]
    with pytest.raises(MemplanError, match="no saved set 'torch-min-cut'"):
        make_plan(dataclasses.replace(fixed_pair()), "torch-min-cut", Budget(10**6), MACHINE, inner="eager")
