"""torch's selective checkpointing policies in memplan, and memplan's plans in torch's checkpoint."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import memplan
from memplan.ir import Keep, Offload, Plan, Recompute
from memplan.passes.policies.lists import Lists
from tests.torch_cpu.test_offload import bits, chain, compiled

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def save_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def of(plan: Plan, kind: type) -> set[str]:
    return {plan.step.producer[t][1].target for t, d in plan.decisions if isinstance(d, kind)}


@pytest.mark.parametrize(
    "policy",
    [memplan.from_sac(save_products), memplan.from_sac(lambda ctx, op: op in PRODUCTS), Lists(save=("aten.addmm*",))],
    ids=("torch's", "a bool", "a list"),
)
def test_what_it_saves_is_kept_and_the_rest_runs_again(policy, made) -> None:
    module, x = chain(), torch.randn(64, 256)
    step, planned = compiled(module, policy=policy)
    expected = bits(step, module, x)
    assert all(torch.equal(a, b) for a, b in zip(bits(planned, module, x), expected, strict=True))
    assert of(made[-1], Recompute) == {"aten.tanh.default"}
    assert of(made[-1], Keep) == {"aten.addmm.default"}


def test_what_it_offloads_is_offloaded(made) -> None:
    if not hasattr(CheckpointPolicy, "MUST_CPU_OFFLOAD"):
        pytest.skip("this torch's policies cannot say it")

    def move_tanh(ctx, op, *args, **kwargs):
        moved = op is torch.ops.aten.tanh.default
        return CheckpointPolicy.MUST_CPU_OFFLOAD if moved else CheckpointPolicy.PREFER_RECOMPUTE

    module, x = chain(), torch.randn(64, 256)
    step, planned = compiled(module, policy=memplan.from_sac(move_tanh))
    expected = bits(step, module, x)
    assert all(torch.equal(a, b) for a, b in zip(bits(planned, module, x), expected, strict=True))
    assert of(made[-1], Offload) == {"aten.tanh.default"}
    module.zero_grad()
    torch._dynamo.reset()
    listed = compiled(module, policy=Lists(offload=("aten.tanh*",)))[1]
    assert all(torch.equal(a, b) for a, b in zip(bits(listed, module, x), expected, strict=True))
    assert made[-1].offloads == made[0].offloads


def test_a_list_is_a_tuple() -> None:
    with pytest.raises(memplan.MemplanError, match=r"write \('aten.mm\*',\)"):
        Lists(save="aten.mm*")


def test_a_list_that_names_nothing(made) -> None:
    module, x = chain(), torch.randn(64, 256)
    _, planned = compiled(module, policy=Lists(save=("aten.convolution*",)))
    with pytest.raises(Exception, match=r"names 'aten.convolution\*', and no storage, op or module .*aten.addmm"):
        planned(x)


class Ran(TorchDispatchMode):
    """Counts the products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def test_a_plan_in_torchs_checkpoint() -> None:
    """torch runs again what the plan does, and no more."""
    module: nn.Module = nn.Sequential(chain(), nn.Linear(256, 1))
    x = torch.randn(64, 256, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        return module(x).square().mean()

    expected = bits(step, module, x)
    with Ran() as all_kept:
        step(x).backward()
    plan = memplan.plan(step, x, policy="sqrt-n", inner="eager")
    again = sum(op.target == "aten.addmm.default" for op in (plan.step.ops[r.op] for r in plan.backward if r.again))
    assert again

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(step, x, use_reentrant=False, context_fn=memplan.to_sac(plan))

    assert all(torch.equal(a, b) for a, b in zip(bits(checkpointed, module, x), expected, strict=True))
    with Ran() as ran:
        checkpointed(x).backward()
    assert all_kept.count + again <= ran.count <= all_kept.count + again + 1  # torch does not leave out the loss's own
