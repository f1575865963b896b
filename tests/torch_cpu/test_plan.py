"""memplan.plan looks and leaves no trace: on fake tensors, the same plan that the backend makes."""

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Plan
from tests.cases import cases
from tests.models import Case


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.dropout, self.second = nn.Dropout(0.1), nn.Linear(16, 1)

    def forward(self, x):
        return self.second(self.dropout(self.norm(self.first(x)).tanh())).square().mean()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def photograph(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> list[object]:
    """All that a call could disturb, as values that compare equal if it did not."""
    tensors = [*module.state_dict(keep_vars=True).values(), x]
    tensors += [t.grad for t in tensors if t.grad is not None]
    tensors += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    hooks = [len(h) for m in module.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    return [
        [(id(t), t.data_ptr(), t._version, t.requires_grad, t.tolist()) for t in tensors],
        torch.get_rng_state().tolist(),
        {k: dict(v) for k, v in torch._dynamo.utils.counters.items()},
        hooks,
        [m.training for m in module.modules()],
        [sorted(vars(m)) for m in module.modules()],
        (torch.is_grad_enabled(), torch.compiler.is_compiling(), torch.Tensor.backward),
    ]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("outcome", ["plan", "does not fit", "error in the step"])
def test_no_trace_is_left(inner: str, outcome: str) -> None:
    net, x = Net(), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(net.parameters())
    net(x).backward()
    optimizer.step()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    before = photograph(net, optimizer, x)

    def step(x):
        if outcome == "error in the step":
            raise KeyError("mine")
        return net(x)

    if outcome == "plan":
        memplan.plan(step, x, inner=inner)
    else:
        with pytest.raises(DoesNotFit if outcome == "does not fit" else KeyError):
            memplan.plan(step, x, budget=1, inner=inner)
    assert photograph(net, optimizer, x) == before
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        meta = Net()
    x = torch.randn(4, 8)
    net = Net()
    a, b = (memplan.plan(lambda x, m=m: m(x), x, inner="eager", machine="rtx4090") for m in (meta, net))
    assert a.peak == b.peak > sum(p.nbytes for p in net.parameters())
    assert all(p.is_meta and p.grad is None for p in meta.parameters())


@pytest.mark.parametrize("case", cases("llama", "qwen3_moe", "unet"))
def test_plan_is_what_the_backend_plans(case: Case, tmp_path) -> None:
    sample = case.make(dropout=0.1)
    options = {"policy": "block-checkpoint", "inner": "eager"}
    ahead = memplan.plan(sample.step, sample.batch, **options)
    step = torch.compile(sample.step, backend=memplan_backend, options={**options, "out": tmp_path / "plan.json"})
    step(sample.batch)
    planned = Plan.load(tmp_path / "plan.json")
    # Dynamo drops buffers that the step never reads; they are in memory all the same, and plan counts them
    unread = set(ahead.step.resident) - {t for op in ahead.step.ops for t in op.inputs}
    assert ahead.peak - planned.peak == sum(ahead.step.tensors[t].bytes for t in unread)
    assert [op.target for op in ahead.step.ops] == [op.target for op in planned.step.ops]


def test_a_function_is_called_with_each_plan(tmp_path) -> None:
    net, seen, x = Net(), list[Plan](), torch.randn(4, 8)
    for out in (seen.append, tmp_path / "plan.json"):
        torch._dynamo.reset()
        torch.compile(net, backend=memplan_backend, options={"inner": "eager", "out": out})(x)
    assert [plan.peak for plan in seen] == [Plan.load(tmp_path / "plan.json").peak]
    memplan.compile(net, inner="eager", out=seen.append)(x)
    assert len(seen) == 2 and seen[1].decisions == seen[0].decisions


def test_each_row_says_what_else_could_have_been_decided(tmp_path) -> None:
    net, x = Net(), torch.randn(4, 8)
    plan = memplan.plan(net, x, inner="eager", policy="save-all")
    assert {t for members, _ in plan.reasons for t in members} == {t for t, _ in plan.decisions}
    assert any("recompute: +" in reason for _, reason in plan.reasons)
    assert any("recompute: not" in reason for _, reason in plan.reasons)  # batch norm changes its buffers
    step = torch.compile(net, backend=memplan_backend, options={"inner": "eager", "out": tmp_path / "plan.json"})
    step(x)
    assert Plan.load(tmp_path / "plan.json").reasons == ()  # it costs time, and nobody may read it


def test_what_the_budget_leaves_to_others_is_in_the_timeline(tmp_path) -> None:
    net, x = Net(), torch.randn(4, 8)
    plan = memplan.plan(net, x, budget="2GB", machine="rtx4090")
    held = plan.budget.bytes - plan.budget.available
    assert set(plan.timeline.beside) == {held} and held > plan.machine.context_bytes > 0
    options = {"machine": "rtx4090", "budget": "2GB", "out": tmp_path / "plan.json", "inner": "eager"}
    torch.compile(net, backend=memplan_backend, options=options)(x)
    assert set(Plan.load(tmp_path / "plan.json").timeline.beside) == {held}


def test_a_buffer_that_forward_changes_is_known() -> None:
    net, x = Net(), torch.randn(4, 8)
    plan = memplan.plan(net, x, inner="eager")
    assert any(op.fixed for op in plan.step.ops if "batch_norm" in op.target)


def test_a_step_that_calls_backward_itself() -> None:
    net, x = Net(), torch.randn(4, 8)

    def step(x):
        net(x).backward()

    assert memplan.plan(step, x, inner="eager").peak == memplan.plan(net, x, inner="eager").peak
    assert all(p.grad is None for p in net.parameters())


def test_a_step_without_a_backward() -> None:
    net = Net()
    with pytest.raises(MemplanError, match="no backward"):
        memplan.plan(lambda x: net(x).detach(), torch.randn(4, 8), inner="eager")


def test_a_model_on_the_meta_device_runs_nothing(monkeypatch) -> None:
    def run(calls):
        raise AssertionError("an op was run")

    monkeypatch.setattr("memplan.passes.workspaces.run_alone", run)
    with torch.device("meta"):
        net, x = Net(), torch.empty(4, 8)
    assert any("meta device" in note for note in memplan.plan(net, x, inner="eager").step.notes)


def test_a_torch_policy_at_any_ratio_and_another_of_a_like_name() -> None:
    layers, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(4, 8)

    def net(x: torch.Tensor) -> torch.Tensor:
        return layers(x).square().mean()

    assert memplan.plan(net, x, inner="eager", policy="torch-budget-0.3").policy == "torch-budget-0.3"
    mine = memplan.policy("torch-mine")(lambda *_: {})
    assert memplan.plan(net, x, inner="eager", policy=mine).policy == "torch-mine"


def test_a_step_that_is_compiled_already() -> None:
    net, x = Net(), torch.randn(4, 8)
    peak = memplan.plan(net, x, inner="eager").peak
    assert memplan.plan(torch.compile(net, backend="eager"), x, inner="eager").peak == peak
    assert memplan.plan(torch.compile(lambda x: net(x), backend="eager"), x, inner="eager").peak == peak


def test_steps_that_cannot_be_planned() -> None:
    net, x = Net(), torch.randn(4, 8)
    with pytest.raises(MemplanError, match="3 is not a step"):
        memplan.plan(3, x)
    with pytest.raises(MemplanError, match=r"looks at a tensor's values at test_plan.py:\d+ in <lambda>"):
        memplan.plan(lambda x: net(x) * (1 if x.sum().item() > 0 else 2), x, inner="eager")


def test_the_smallest_budget_that_is_named_fits() -> None:
    net, x = Net(), torch.randn(4, 8)
    with pytest.raises(DoesNotFit) as refused:
        memplan.plan(net, x, budget=1, inner="eager")
    smallest = refused.value.smallest
    assert memplan.plan(net, x, budget=smallest, inner="eager").peak <= smallest
    with pytest.raises(DoesNotFit):
        memplan.plan(net, x, budget=smallest - 1, inner="eager")
