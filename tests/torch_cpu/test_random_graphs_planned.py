"""Random programs under random decisions and every policy: the plan is valid, the bits are the program's, the next
random number after it too, and the bytes are those predicted, exactly.

Tracing, capture and measuring take most of the time, so each program is traced once and its different plans run inside
one recording. CI draws 50 programs; `-m slow` draws 1,000.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan.ir import Budget, Keep, Offload, Recompute
from memplan.passes.check import check
from memplan.passes.policies import FunctionPolicy, builtin
from memplan.passes.policies.offload import OffloadAll
from tests.planned import NOTHING, Joint
from tests.random_graphs import Program, programs

SEED = 2


def expected(program: Program) -> list[torch.Tensor | None]:
    tensors = program.inputs(seed=1)
    torch.manual_seed(SEED)
    loss = program.run(tensors)
    loss.backward()
    return [loss.detach(), *(t.grad for t in tensors), torch.empty(1).uniform_()]


def random_policy(draw) -> FunctionPolicy:
    """A decision for every storage that may have one; what must not run twice is kept."""

    def decide(step, budget, machine):
        some = [Keep(), Recompute(), Offload(), Offload("disk")]
        chosen = {t: draw(st.sampled_from(some[: 4 if t in step.offloadable else 2])) for t in sorted(step.saveable)}
        fixed = {t for op in step.ops if op.fixed for t in op.outputs}
        return {t: Keep() if t in fixed else d for t, d in chosen.items()}

    return FunctionPolicy("random", decide)


def check_program(program: Program, data) -> None:
    joint = Joint.of(program.run, program.inputs(seed=1))
    everything = [joint.plan(policy) for policy in builtin()] + [joint.plan("greedy", NOTHING)]
    smallest, largest = everything[-1].peak, everything[0].peak
    everything.append(joint.plan("greedy", Budget((smallest + largest) // 2)))
    everything += [joint.plan(random_policy(data.draw)) for _ in range(2)]
    everything += [joint.plan(OffloadAll(in_flight=n, small=0)) for n in (0, None)]
    assert [check(plan) for plan in everything] == [[]] * len(everything)
    plans = list({(p.forward, p.backward, p.decisions): p for p in everything}.values())

    results, peaks = joint.run(plans, SEED)
    wanted = expected(program)
    for plan, result, peak in zip(plans, results, peaks, strict=True):
        assert len(result) == len(wanted)
        for a, b in zip(result, wanted, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), plan.policy
        assert peak == plan.timeline.peak_above_base, plan.policy


quick = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(programs(), st.data())
def test_every_plan_keeps_bits_and_bytes(program, data):
    check_program(program, data)


@pytest.mark.slow
@settings(quick, max_examples=1000)
@given(programs(), st.data())
def test_a_thousand_programs(program, data):
    check_program(program, data)
