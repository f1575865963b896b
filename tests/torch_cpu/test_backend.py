"""What memplan says to bad input through torch.compile, and which unusual steps it runs all the same."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Keep, Plan, Recompute
from memplan.passes.policies import FunctionPolicy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.second(self.first(x).tanh().sin()).square().mean()


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("MEMPLAN_BUDGET", "MEMPLAN_POLICY", "MEMPLAN_OUT"):
        monkeypatch.delenv(name, raising=False)
    torch._dynamo.reset()
    torch.manual_seed(0)


def planned(step, **options):
    return torch.compile(step, backend=memplan_backend, options={"inner": "eager", **options})


def complaint(step=None, **options) -> MemplanError:
    """The MemplanError that the step's first call raises; torch must show its first line."""
    with pytest.raises(BackendCompilerFailed) as raised:
        planned(step or Net(), **options)(torch.randn(4, 8))
    inner = raised.value.inner_exception
    assert isinstance(inner, MemplanError)
    assert str(inner).splitlines()[0] in str(raised.value)
    return inner


def policy(decide) -> FunctionPolicy:
    return FunctionPolicy("mine", lambda step, budget, machine: decide(step))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budgte": "24GB"}, "did you mean 'budget'"),
        ({"host_budget": "1"}, 'did you mean "1GB"'),
        ({"budget": "24"}, "24"),
        ({"budget": "0GB"}, "0GB"),
        ({"budget": "-1"}, "-1"),
        ({"budget": -1}, "-1"),
        ({"budget": float("nan")}, "nan"),
        ({"budget": True}, "True"),
        ({"policy": "gredy"}, "did you mean 'greedy'"),
        ({"policy": 3}, "3"),
        ({"machine": "h10"}, "h10"),
        ({"inner": "egaer"}, "'inductor' or 'eager'"),
        ({"out": 3}, "3"),
    ],
    ids=str,
)
def test_an_option_that_makes_no_sense(options, says) -> None:
    assert says in str(complaint(**options)).splitlines()[0]


def raises(step):
    raise KeyError("nothing here")


@pytest.mark.parametrize(
    ("decide", "says"),
    [
        (raises, "'mine' raised KeyError: 'nothing here'"),
        (lambda step: {"tahn": Recompute()}, "did you mean 'tanh'"),
        (lambda step: {10**6: Recompute()}, "1000000"),
        (lambda step: {-1: Recompute()}, "-1"),
        (lambda step: [Keep()], "a list; it must return a mapping"),
        (lambda step: None, "a NoneType; it must return a mapping"),
        (lambda step: {"tanh": "keep"}, "it must be Keep(), Recompute() or Offload()"),
        (lambda step: {step.resident[0]: Recompute()}, "cannot cross"),
        (lambda step: {step.backward.inputs[0]: Keep()}, "cannot cross"),
        (lambda step: {step.backward.outputs[0]: Keep()}, "cannot cross"),
    ],
)
def test_a_policy_that_is_wrong(decide, says) -> None:
    assert says in str(complaint(policy=policy(decide))).splitlines()[0]


def test_recompute_of_what_must_not_run_twice() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return (self.norm(self.inner(x)).tanh() * self.norm.running_mean).mean()

    everything = policy(lambda step: {t: Recompute() for t in step.saveable})
    assert "must not be" in str(complaint(Normed(), policy=everything)).splitlines()[0]


def test_an_output_path_that_cannot_be_written(tmp_path) -> None:
    path = tmp_path / "missing" / "plan.json"
    assert str(path) in str(complaint(out=path)).splitlines()[0]


def test_a_budget_that_is_too_small_names_one_that_is_not() -> None:
    error = complaint(budget=1)
    assert isinstance(error, DoesNotFit) and error.budget == 1
    first = str(error).splitlines()[0]
    smallest = int(re.search(r'at least "(\d+)B"', first)[1])
    assert smallest == error.smallest <= error.needed
    torch._dynamo.reset()
    planned(Net(), budget=smallest)(torch.randn(4, 8)).backward()
    assert complaint(budget=smallest - 1).smallest == smallest


def test_a_budget_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("MEMPLAN_BUDGET", "1B")
    assert isinstance(complaint(), DoesNotFit)
    planned(Net(), budget="1GB")(torch.randn(4, 8)).backward()


def test_other_arguments_of_torch_compile() -> None:
    with pytest.raises(BackendCompilerFailed, match="options="):
        torch.compile(Net(), backend=lambda g, i: memplan_backend(g, i, mode="default"))(torch.randn(4, 8))


# ---- unusual steps --------------------------------------------------------------------------------------------------


def agree(module, step, *batch, tmp_path, policy="block-checkpoint", reference="aot_eager") -> Plan:
    """Run twice under each, from the same state: outputs, gradients, buffers and inputs agree."""
    initial = {name: t.clone() for name, t in module.state_dict().items()}
    seen = []
    out = tmp_path / "plan.json"
    for compiled in (torch.compile(step, backend=reference), planned(step, policy=policy, out=out)):
        torch._dynamo.reset()
        module.load_state_dict(initial)
        module.zero_grad()
        inputs = [t.detach().clone() for t in batch]
        torch.manual_seed(1)
        for _ in range(2):  # the second time gradients are added to
            result = compiled(*inputs)
            (result[0] if isinstance(result, tuple) else result).backward()
        results = [t.detach() for t in (result if isinstance(result, tuple) else (result,))]
        seen.append([*results, *inputs, *(p.grad for p in module.parameters()), *module.state_dict().values()])
        seen[-1] = [None if t is None else t.clone() for t in seen[-1]]
    for a, b in zip(*seen, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    return Plan.load(out)


def test_a_step_that_returns_logits_too(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def step(x):
        logits = net(x)
        return logits.logsumexp(-1).mean(), logits, logits[:, 1:], x

    plan = agree(net, step, torch.randn(4, 8), tmp_path=tmp_path)
    assert len(plan.step.forward.outputs) == 2  # logits and its view are one storage, and x is there already


def test_a_step_that_writes_to_its_input(tmp_path) -> None:
    # Judged against plain eager: torch's own partitioner recomputes from the changed input, and its gradient is wrong.
    net = nn.Linear(8, 8)

    def step(x):
        loss = (net(x * 2).tanh().sin() * x.sin()).mean()
        x.mul_(0.5)
        return loss

    agree(net, step, torch.randn(4, 8), tmp_path=tmp_path, reference="eager")


def test_a_step_that_changes_a_buffer(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    agree(net, lambda x: net(x).square().mean(), torch.randn(4, 8), tmp_path=tmp_path)


@pytest.mark.parametrize("policy", ["save-all", "block-checkpoint", "sqrt-n", "greedy", "torch-min-cut"])
def test_a_buffer_that_is_changed_and_read(tmp_path, policy) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return (self.norm(self.inner(x)).tanh() * self.norm.running_mean.sin()).square().mean()

    net = Normed()
    agree(net, net.forward, torch.randn(4, 8), tmp_path=tmp_path, policy=policy)


@pytest.mark.parametrize("policy", ["save-all", "block-checkpoint"])
def test_random_numbers_that_nothing_reads_are_drawn(tmp_path, policy) -> None:
    # Judged against plain eager: torch's own compilers leave the first draw out, and the second one changes.
    net = nn.Linear(8, 8)

    def step(x):
        nn.functional.dropout(x, 0.5)
        return nn.functional.dropout(net(x).tanh(), 0.5).sin().mean()

    agree(net, step, torch.randn(4, 8), tmp_path=tmp_path, policy=policy, reference="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo asks
def test_two_graphs_around_a_break(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))

    def step(x):
        y = net[:2](x)
        torch._dynamo.graph_break()
        return net[2:](y).square().mean()

    agree(net, step, torch.randn(4, 8), tmp_path=tmp_path)


def test_a_step_without_a_backward(tmp_path) -> None:
    net, x = Net(), torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(planned(net)(x), net(x))
    torch._dynamo.reset()
    net.requires_grad_(False)
    assert torch.equal(planned(net, out=tmp_path / "plan.json")(x), net(x))
    assert not (tmp_path / "plan.json").exists()


def test_code_is_not_generated_twice_for_equal_plans() -> None:
    """The budget is not in the key of Inductor's cache; what follows from it, the planned graphs, is."""
    for budget in (10**6, 2 * 10**6):
        torch._dynamo.reset()
        counters.clear()
        planned(Net(), inner="inductor", budget=budget)(torch.randn(4, 8)).backward()
    assert counters["inductor"]["fxgraph_cache_hit"] == 2
