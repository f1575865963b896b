"""What an optimizer will hold and allocate is known before its first step, and is what is measured then."""

import gc

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit, MemplanError
from memplan.options import Options
from memplan.runtime.optimizers import declared, foresee

SCALARS = 200  # bytes of the real optimizers' scalars that ops on meta do not make

NAMES = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "Muon"]
MORE = {"SGD": {"momentum": 0.9}}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(
        [nn.Linear(96, 64, bias=False), nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False)]
    )


def stepped(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of states, and the peak of two steps beside them, as measured."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    peaks = []
    for _ in range(2):
        before = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        with memplan.record("cpu") as seen:
            optimizer.step()
        peaks.append(before + seen.timeline.peak_above_base)
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    return states, max(peaks) - states


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}, {}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_foreseen_is_measured(name: str, how: dict[str, bool]) -> None:
    try:
        optimizer = getattr(torch.optim, name)(network().parameters(), **how, **MORE.get(name, {}))
    except TypeError:
        return  # this one has no such option
    there = len(optimizer.state)  # some make it at once
    found = foresee(optimizer)
    assert len(optimizer.state) == there
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])
    states, transient = stepped(optimizer)
    assert found.states == states > 0
    if name != "Muon":  # its products of bfloat16 take memory inside
        assert transient - SCALARS <= found.transient <= transient


def test_foreseen_again_with_states_there() -> None:
    optimizer = torch.optim.AdamW(network().parameters(), foreach=True)
    before = foresee(optimizer)
    stepped(optimizer)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a hook of the real optimizer was called"))
    state = [v.clone() for s in optimizer.state.values() for v in s.values()]
    assert foresee(optimizer) == before
    assert all(
        torch.equal(a, b) for a, b in zip(state, (v for s in optimizer.state.values() for v in s.values()), strict=True)
    )


def test_declared_by_name_class_and_itself() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    parameters = list(net.parameters())
    trained = sum(p.nbytes for p in parameters[1:])
    expected = 2 * trained + 4 * 2  # and two step counters
    for given in ("AdamW", "adamw", torch.optim.AdamW, lambda p: torch.optim.AdamW(p, lr=1.0)):
        assert declared(given, parameters).states == expected
    assert declared(torch.optim.AdamW(parameters), parameters).states == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [("adamm", "did you mean 'adam'"), (torch.optim.LBFGS, "leave option 'optimizer' out"), (list, "made a list"),
     (lambda p: 1 / 0, "cannot be made")],
)  # fmt: skip
def test_declared_wrongly(given: object, says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        declared(given, list(network().parameters()))
    with pytest.raises(MemplanError, match="option 'optimizer' is 3"):
        Options.read({"optimizer": 3}, {})


ROWS = torch.linspace(-1, 1, 4 * 64).view(4, 64)


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 1))


def test_a_plan_counts_a_declared_optimizer() -> None:
    net = trained()

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x).square().mean()

    none = memplan.plan(step, ROWS, inner="eager")
    plan = memplan.plan(step, ROWS, inner="eager", optimizer="adamw")
    parameters = sum(p.nbytes for p in net.parameters())
    assert dict(plan.step.held.kinds) == {"optimizer_state": 2 * parameters + 4 * len(list(net.parameters()))}
    assert plan.timeline.moments[-1].phase == "optimizer" and plan.peak > none.peak
    assert "AdamW.step()" in str(plan)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_step_of_the_optimizer_is_the_peak(made) -> None:
    """With few rows, foreach copies of the parameters are what is largest: refused before the first run."""
    net = trained()
    optimizer = torch.optim.AdamW(net.parameters(), foreach=True)

    def step_of(budget: int):
        torch._dynamo.reset()
        options = {"budget": budget, "inner": "eager"}
        return torch.compile(lambda x: net(x).square().mean(), backend=memplan_backend, options=options)

    def train(step) -> None:
        step(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as refused:
        train(step_of(1000))
    error = refused.value.inner_exception
    assert isinstance(error, DoesNotFit)
    assert "AdamW.step() (foreach; foreach=False or fused=True takes less)" in str(error)
    assert not optimizer.state
    step = step_of(error.smallest)
    train(step)
    assert len(made) == 1  # the states were known: no plan is made again for them
    gc.collect()
    with memplan.record("cpu") as seen:
        train(step)
    assert len(made) == 1
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    measured = seen.timeline.peak_above_base + ROWS.nbytes + states + sum(p.nbytes for p in net.parameters())
    assert measured - SCALARS <= error.smallest
    assert measured >= 0.97 * error.smallest
    assert seen.timeline.moments[seen.timeline.peak_moment].phase == "optimizer"
