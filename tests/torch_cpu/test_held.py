"""Gradients and optimizer states that appear after the step was compiled count against its budget."""

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit
from memplan.runtime import optimizers

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def network() -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 1))


ROWS = torch.linspace(-1, 1, 128 * 64).view(128, 64)


def smallest(net: nn.Module) -> int:
    with pytest.raises(DoesNotFit) as refused:
        memplan.plan(lambda x: net(x).square().mean(), ROWS, budget=1, inner="eager")
    return refused.value.smallest


def total_peak(net: nn.Module, held: int, step) -> int:
    """The measured peak of a call, with the parameters, the batch and what is held beside them."""
    with memplan.record("cpu") as seen:
        step(ROWS).backward()
    return seen.timeline.peak_above_base + held + ROWS.nbytes + sum(p.nbytes for p in net.parameters())


def planned(net: nn.Module, budget: int):
    options = {"budget": budget, "inner": "eager"}
    return torch.compile(lambda x: net(x).square().mean(), backend=memplan_backend, options=options)


def test_gradients_that_are_added_to(made) -> None:
    net = network()
    gradients = sum(p.nbytes for p in net.parameters())
    budget = smallest(net) + gradients + 20_000
    step = planned(net, budget)
    step(ROWS).backward()
    first = [p.grad.clone() for p in net.parameters()]
    step(ROWS).backward()  # compiles the plan that leaves room for the gradients
    assert [dict(p.step.held.kinds) for p in made] == [{}, {"gradient": gradients}]
    assert made[1].overhead > made[0].overhead
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(net.parameters(), first, strict=True))
    assert total_peak(net, gradients, step) <= budget
    net.zero_grad()
    assert total_peak(net, 0, step) <= budget
    assert len(made) == 2


def test_states_count_before_they_are_there(made) -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    step = planned(net, 10**8)
    for _ in range(3):
        step(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert [dict(p.step.held.kinds) for p in made] == [{"optimizer_state": states}]


class Own(torch.optim.AdamW):
    """Not torch's own: nothing is known of what its step does."""


class Two(nn.Module):
    """Two heads; an optimizer that has one of them leaves the other's gradient where it is."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(ROWS.shape[1], 256, bias=False)
        self.one, self.other = (nn.Linear(256, 4096, bias=False) for _ in range(2))
        self.breaks = breaks

    def forward(self, x):
        y = torch.tanh(self.body(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.one(y).square().mean() + self.other(y).square().mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("breaks", [False, True])
def test_gradients_of_which_some_are_added_to(breaks) -> None:
    torch._dynamo.reset()
    net = Two(breaks)
    optimizer = torch.optim.AdamW([*net.body.parameters(), *net.one.parameters()])

    def train(step) -> None:
        step(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()

    def planned(budget):
        return memplan.compile(lambda x: net(x), budget=budget, inner="eager")

    ample = planned(10**9)
    for _ in range(3):  # the last head's gradient is there, and the optimizer has its states
        train(ample)
    assert [p.grad is None for p in net.parameters()] == [True, True, False]
    held = [net.other.weight.grad, *(s for of in optimizer.state.values() for s in of.values())]
    budget, step = 1, planned(1)
    for _ in range(8):  # of several graphs the later ones are refused later
        try:
            train(step)
            break
        except (DoesNotFit, torch._dynamo.exc.BackendCompilerFailed) as error:
            refused = error if isinstance(error, DoesNotFit) else error.inner_exception
            assert isinstance(refused, DoesNotFit) and refused.smallest > budget
            budget, step = refused.smallest, planned(refused.smallest)
    train(step)
    with memplan.record("cpu") as seen:
        train(step)
    base = sum(t.nbytes for t in (*held, *net.parameters(), ROWS))
    assert budget - 400_000 < seen.timeline.peak_above_base + base <= budget  # 131_072 are one activation


def test_states_of_others_optimizers_are_learned(made) -> None:
    net = network()
    optimizer = Own(net.parameters())
    budget = smallest(net) + 2 * sum(p.nbytes for p in net.parameters()) + 20_000
    step = planned(net, budget)
    for _ in range(3):
        step(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert [dict(p.step.held.kinds) for p in made] == [{}, {"optimizer_state": states}]
    assert total_peak(net, states, step) <= budget


def test_no_room_for_what_is_held(made) -> None:
    net = network()
    step = planned(net, smallest(net) + 1000)
    step(ROWS).backward()
    optimizer = Own(net.parameters())
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(DoesNotFit, match="does not fit"):
        step(ROWS)
    optimizer.state.clear()  # with the states gone the step runs again
    step(ROWS).backward()
    assert len(made) == 1


def test_plan_counts_what_is_there() -> None:
    net = network()

    def step(x):
        return net(x).square().mean()

    before = memplan.plan(step, ROWS, inner="eager").peak
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    step(ROWS).backward()
    optimizer.step()
    parameters = sum(p.nbytes for p in net.parameters())
    assert memplan.plan(step, ROWS, inner="eager").peak == before + 2 * parameters


def test_objects_are_walked_a_few_times_only(monkeypatch) -> None:
    """Looking for optimizers takes up to 0.3 s: without one it is given up."""
    looked = []
    monkeypatch.setattr("memplan.runtime.optimizers.instances", lambda *classes: looked.append(1) or [])
    net = network()
    step = planned(net, 10**8)
    for _ in range(10):
        step(ROWS).backward()
    assert 1 <= len(looked) <= 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_graphs_of_one_step_walk_them_once(monkeypatch, made) -> None:
    """Of any number: what is around is looked for as the first graph is made, and as it runs. One made later counts."""
    looked, find = [], optimizers.instances
    monkeypatch.setattr("memplan.runtime.optimizers.instances", lambda *classes: looked.append(1) or find(*classes))
    net = network()

    def loss(x: torch.Tensor) -> torch.Tensor:
        x = net[:4](x)
        torch._dynamo.graph_break()
        x = net[4:8](x)
        torch._dynamo.graph_break()
        return net[8:](x).square().mean()

    step = torch.compile(loss, backend=memplan_backend, options={"inner": "eager", "budget": 10**8})
    step(ROWS).backward()
    assert len(made) == 3 and len(looked) == 2
    optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
    step(ROWS).backward()
    held = dict(made[-1].step.held.kinds)
    assert len(made[-1].step.graphs) == 6 and held["optimizer_state"] == sum(p.nbytes for p in net.parameters())
    optimizer.zero_grad()
