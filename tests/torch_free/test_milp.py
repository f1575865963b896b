"""Integer programs know the best plan of steps beyond enumeration: they agree with it below, and judge the planner."""

import dataclasses
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan.ir import Budget, Graph, Machine, Op, Step, Tensor
from memplan.passes.bound import bound
from memplan.passes.pipeline import evaluate, smallest_plan
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.polish import Judge
from memplan.passes.simulate import peak
from tests.torch_free.checkmate import chain, fewest_runs
from tests.torch_free.milp import Kept, Moved
from tests.torch_free.oracle import MOST, outcomes
from tests.torch_free.random_steps import LAYOUTS, MACHINE, backpropagated, steps
from tests.torch_free.test_bound import machines


@st.composite
def small(draw: st.DrawFn) -> Step:
    """Steps of every layout that no compiler fuses."""
    step = draw(steps(layout=draw(st.sampled_from(sorted(LAYOUTS))), max_ops=6))
    assume(0 < len(step.saveable) <= MOST)
    return step


@settings(deadline=None, max_examples=100)
@given(small())
def test_the_program_finds_what_enumeration_finds(step: Step) -> None:
    """Inside each budget at which the best plan changes, and inside a byte less."""
    every = outcomes(step, MACHINE, offload=False)
    for size in sorted({one.peak - less for one in every for less in (0, 1)}):
        fitting = [o.seconds for o in every if o.peak <= size]
        found = Kept(step, Budget(size), MACHINE).solved()
        assert (found is not None) == bool(fitting)
        if found is not None:
            assert found.seconds == pytest.approx(min(fitting), rel=1e-6, abs=1e-15)
            assert peak(step, found.saved) <= size


def test_a_plan_that_fills_the_room_to_the_byte_is_found() -> None:
    """51 bytes, of which 50 are a workspace: HiGHS's presolve lost it, and the op ran again."""
    tensors = (Tensor("x", 0, "input"), Tensor("a", 1, "activation"), Tensor("b", 0, "activation"))
    once = Op("once", "op", (0,), (1, 2), traffic=1, workspace_bytes=50)
    forward, backward = Graph("f", (once,), (0,), ()), Graph("b", (Op("read", "op", (1,), (), traffic=1),), (), ())
    step = Step("full", tensors, (forward, dataclasses.replace(backward, phase="backward")), (0,))
    found = Kept(step, Budget(51), MACHINE).solved()
    assert found is not None
    assert found.seconds == pytest.approx(sum(map(MACHINE.seconds, step.ops)))


@settings(deadline=None, max_examples=50)
@given(steps(max_ops=6), machines())
def test_no_plan_with_copies_is_faster_than_the_program(step: Step, machine: Machine) -> None:
    assume(0 < len(step.saveable) <= MOST)
    every = outcomes(step, machine)
    for one in every:
        budget = Budget(one.peak, host_bytes=one.host_peak)
        best = min(o.seconds for o in every if o.peak <= one.peak and o.host_peak <= one.host_peak)
        found = Moved(step, budget, machine).solved()
        assert found is not None
        assert found.seconds <= best * (1 + 1e-6) + 1e-15


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_planner_beside_the_best_plan(seed: int, *, copies: bool) -> None:
    """Steps of 24 to 60 ops: the bound is below the best plan, the program's own plan is it, and `optimal` is near."""
    step = backpropagated(Random(seed), 20 if copies else 40)
    machine = dataclasses.replace(MACHINE, host_bandwidth=(1e7, 1e8)[seed % 2], contention=float(seed % 2))
    most = peak(step, step.read_in_backward)
    host = 10**6 if copies else 0
    least = smallest_plan(step, machine, "eager", Budget(0, host_bytes=host)).peak
    budget = Budget(least + (most - least) * (seed + 1) // 6, host_bytes=host)
    program = Moved(step, budget, machine) if copies else Kept(step, budget, machine)
    found = program.solved()
    assert found is not None
    offloads = program.placed(found) if isinstance(program, Moved) else {}
    own = Judge(step, budget, machine).candidate(found.saved, offloads)
    base = sum(map(machine.seconds, step.ops))
    assert own.over == 0
    assert base + own.seconds == pytest.approx(found.seconds, rel=1e-6)
    assert bound(step, budget, machine).seconds <= found.seconds * (1 + 1e-6)
    plan = evaluate(step, Optimal(small=0)(step, budget, machine), budget, machine, "eager", "optimal")
    assert plan.fits
    assert found.seconds * (1 - 1e-6) <= plan.timeline.seconds <= 1.02 * found.seconds


def unit_chain(length: int) -> Step:
    """Checkmate's chain as a step: bytes and seconds of 1, and an input that is there throughout."""
    names = ("x", *(f"t{i}" for i in range(2 * length)), "loss'")
    tensors = tuple(Tensor(name, int(name != "loss'"), "activation") for name in names)
    ops = [
        Op(f"op{i}", "op", tuple(t + 1 for t in reads) or (0,), (i + 1,), traffic=1, dtype="float32")
        for i, reads in enumerate(chain(length))
    ]
    tangent = len(names) - 1
    ops[length] = dataclasses.replace(ops[length], inputs=(*ops[length].inputs, tangent))
    forward = Graph("forward", tuple(ops[:length]), (0,), ())
    backward = Graph("backward", tuple(ops[length:]), (tangent,), (tangent - 1,), "backward")
    return Step("chain", tensors, (forward, backward), (0,))


@pytest.mark.parametrize(("budget", "fewest"), [(6, 21), (7, 19), (8, 18), (10, 16)])
def test_chains_have_the_optima_of_checkmate(budget: int, fewest: int) -> None:
    """Known: 18 runs of a chain of 8 inside 8. Where running once again is enough, the planner's class has it too."""
    assert fewest_runs(chain(8), budget - 1) == fewest  # the input takes one
    machine = Machine("unit", "cpu", 2**40, 1.0, (("float32", 1e30),), unified=True)
    found = Kept(unit_chain(8), Budget(budget), machine).solved()
    if budget < 7:
        assert found is None
    else:
        assert found is not None
        assert found.seconds == pytest.approx(fewest)
