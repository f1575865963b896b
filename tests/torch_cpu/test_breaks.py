"""A step that Dynamo splits into several graphs: from the second call on they are planned as one. The peak is the
whole step's, gradients are the unplanned step's, and what departs from the plan is looked at before it runs.
"""

import functools
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import memplan
from memplan import Keep, Recompute
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit
from memplan.runtime.window import Session
from tests.accuracy import exact_gradients, gradients, rms_error
from tests.models import ONE_LAYER, Sample

# Dynamo's own, when it compiles a graph that begins with the result of another, here even under aot_eager.
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WIDTH, ROWS = 32, 512
SIZE = 4 * ROWS * WIDTH  # the residual stream


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


def break_graph() -> None:
    torch._dynamo.graph_break()


class Straight(nn.Module):
    """Three graphs: two breaks between its blocks, and more blocks than breaks leave alone."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        break_graph()
        x = self.blocks[2](x)
        break_graph()
        for block in self.blocks[3:]:
            x = block(x)
        return x.logsumexp(-1).mean()


class Looped(Straight):
    """A break in a loop: Dynamo gives the frame up, and compiles one graph for the blocks, which runs for each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            break_graph()
        return x.logsumexp(-1).mean()


class Skipped(Straight):
    """What the first graph makes is read by the third too; the first weight is used by both."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:4]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.blocks[0](x)
        break_graph()
        x = self.blocks[2](self.blocks[1](x))
        break_graph()
        x = self.blocks[3](x * first)
        return (x @ self.blocks[0].up.weight.T).logsumexp(-1).mean()


def rows(count: int = ROWS) -> torch.Tensor:
    return torch.linspace(-1, 1, count * WIDTH).sin().view(count, WIDTH)


def resident(net: nn.Module, x: torch.Tensor) -> int:
    return x.nbytes + sum(p.nbytes for p in net.parameters())


def peak_of(step: Callable[[torch.Tensor], torch.Tensor], net: nn.Module, x: torch.Tensor, held: int = 0) -> int:
    """The measured peak of a step, with the parameters, the batch and what is held beside them."""
    gc.collect()
    with memplan.record("cpu") as seen:
        step(x).backward()
    return seen.timeline.peak_above_base + resident(net, x) + held


def planned(net: nn.Module, budget: int | None, inner: str = "eager", **options) -> Callable:
    return torch.compile(net, backend=memplan_backend, options={"budget": budget, "inner": inner, **options})


@functools.cache
def least(network: type[nn.Module], inner: str) -> int:
    """The budget that the first call asks for when there is none."""
    net, budget, x = network(), 10**5, rows()
    for _ in range(10):
        torch._dynamo.reset()
        step = planned(net, budget, inner)
        try:
            for _ in range(2):
                step(x).backward()
                net.zero_grad()
            torch._dynamo.reset()
            return budget
        except Exception as e:
            inner_error = getattr(e, "inner_exception", e)
            assert isinstance(inner_error, DoesNotFit), e
            budget = inner_error.smallest
    raise AssertionError("asked for more ten times")


@pytest.mark.parametrize(
    ("network", "inner"),
    [
        (Straight, "eager"),
        pytest.param(Straight, "inductor", marks=pytest.mark.slow),
        pytest.param(Looped, "eager", marks=pytest.mark.slow),
        pytest.param(Skipped, "inductor", marks=pytest.mark.slow),
    ],
)
def test_the_budget_is_the_whole_steps(network, inner, made) -> None:
    net, x = network(), rows()
    unplanned = torch.compile(net, backend="aot_eager")
    unplanned(x).backward()
    used = [p for p in net.parameters() if p.grad is not None]
    expected = [p.grad for p in used]
    net.zero_grad()
    everything = peak_of(unplanned, net, x)
    smallest = least(network, inner)
    assert smallest < 0.6 * everything
    for part in (0.0, 0.5):
        budget = int(smallest + part * (everything - smallest))
        torch._dynamo.reset()
        made.clear()
        step = planned(net, budget, inner)
        for _ in range(2):  # the second call compiles
            net.zero_grad()
            step(x).backward()
        whole = made[-1]
        assert len(whole.step.graphs) >= 6
        for p, g in zip(used, expected, strict=True):
            assert torch.equal(p.grad, g) if inner == "eager" else torch.allclose(p.grad, g, atol=1e-6)
        for _ in range(2):
            net.zero_grad()
            peak = peak_of(step, net, x)
            assert peak <= whole.peak <= budget
            assert whole.peak - peak <= 2 * SIZE  # results are counted until the backward of their graph has run


def test_what_is_reported(made, caplog) -> None:
    net, x = Straight(), rows()
    step = planned(net, int(1.3 * least(Straight, "eager")))
    made.clear()
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        step(x).backward()
        net.zero_grad()
    first, whole = made[:-1], made[-1]
    assert len(first) == 3
    assert all("they are planned together at the second call" in plan.step.notes[0] for plan in first)
    assert [g.name for g in whole.step.graphs] == [
        "forward 1", "forward 2", "forward 3", "backward 3", "backward 2", "backward 1"
    ]  # fmt: skip
    count = torch._dynamo.utils.counters["memplan"]["recompiles"]
    assert 0 < count <= 3
    assert f"3 graphs were planned as one step, and {count} of them compiled again" in whole.notes[-1]


def test_random_numbers_are_drawn_again(made) -> None:
    net, x = Straight(dropout=0.2), rows()
    step = planned(net, None, policy="block-checkpoint")
    results = []
    for compiled in (step, torch.compile(net, backend="aot_eager")):
        for _ in range(3):
            net.zero_grad()
            torch.manual_seed(7)
            compiled(x).backward()
        results.append([*(p.grad for p in net.parameters()), torch.rand(3)])
        torch._dynamo.reset()
    assert any(run.again and made[-1].step.ops[run.op].rng_bytes for run in made[-1].backward)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_policy_decides_on_the_whole_step(made) -> None:
    seen = []

    def policy(step, budget, machine):
        seen.append(step)
        return {t: Keep() if step.tensors[t].bytes <= SIZE else Recompute() for t in step.read_in_backward}

    net, x = Straight(), rows()
    step = planned(net, None, policy=policy)
    for _ in range(2):
        step(x).backward()
    assert len(seen[-1].graphs) == 6
    whole = made[-1].step
    assert made[-1].saved == {t for t in whole.read_in_backward if whole.tensors[t].bytes <= SIZE}


def test_a_budget_that_only_the_first_graph_meets(made) -> None:
    """The step stops before the graph that is too much runs, and nothing of it is left."""
    net, x = Straight(), rows()
    budget = least(Straight, "eager") - 1000
    torch._dynamo.reset()
    made.clear()
    step = planned(net, budget)
    with pytest.raises(Exception, match=f"the step does not fit .*{budget / 1e6:.3f}") as refused:
        step(x)
    assert "what the first 3 graphs of the step need: those after" in str(refused.value)
    assert made and all(plan.fits for plan in made)  # each graph alone
    assert all(p.grad is None for p in net.parameters())


def test_gradients_wait_for_the_end_of_the_step(made) -> None:
    """With few rows the gradients of parameters are all there is."""
    net, x = Straight(), rows(4)
    step = planned(net, None)
    for _ in range(2):
        step(x).backward()
        net.zero_grad()
    peak = peak_of(step, net, x)
    assert 0 <= made[-1].peak - peak <= 0.02 * peak
    assert peak > resident(net, x) + sum(p.nbytes for p in net.parameters())


def test_gradients_that_are_there_already(made) -> None:
    net, x = Straight(), rows()
    held = sum(p.nbytes for p in net.parameters())
    budget = least(Straight, "eager") + held
    step = planned(net, budget)
    for _ in range(4):
        step(x).backward()
    once = [p.grad / 4 for p in net.parameters()]
    assert peak_of(step, net, x, held) <= budget
    net.zero_grad()
    torch.compile(net, backend="aot_eager")(x).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(once, net.parameters(), strict=True))


def test_lengths_that_change(made) -> None:
    net = Straight()
    top = ROWS + 100
    smallest = least(Straight, "eager")
    budget = int(1.5 * smallest)
    step = planned(net, budget)
    unplanned = torch.compile(net, backend="aot_eager")
    for count in (200, 64, top):
        results = []
        for compiled in (step, unplanned):
            net.zero_grad()
            compiled(rows(count)).backward()
            results.append([p.grad for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), count
        del results
        net.zero_grad()
        step(rows(count)).backward()  # what was refused a place in the plan is planned for at the next call
        net.zero_grad()
        assert peak_of(step, net, rows(count)) <= budget, count
    with pytest.raises(Exception, match="does not fit"):
        for _ in range(2):
            step(rows(8 * ROWS)).backward()


class Branching(Straight):
    def forward(self, x: torch.Tensor, deep: bool) -> torch.Tensor:
        x = self.blocks[0](x)
        if x.sum().item() > 0 or deep:
            x = self.blocks[1](x)
            x = self.blocks[2](x)
        else:
            x = self.blocks[3](x)
        return x.logsumexp(-1).mean()


def test_graphs_that_differ_from_call_to_call(made) -> None:
    net, x = Branching(), rows()
    budget = resident(net, x) + 40 * SIZE
    step = planned(net, budget)
    eager = torch.compile(net, backend="aot_eager")
    for deep in (True, True, False, False, True, False, True, True):
        results = []
        for compiled in (step, eager):
            net.zero_grad()
            compiled(x if deep else -x.abs(), deep).backward()
            results.append([p.grad for p in net.parameters()])
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def model(dtype: torch.dtype = torch.float32) -> Sample:
    """A language model of one layer, whose head and loss are graphs of their own."""
    sample = ONE_LAYER(dtype=dtype)
    whole, body = sample.step, sample.module.model.forward

    def split(*args, **kwargs):
        out = body(*args, **kwargs)
        break_graph()
        return out

    sample.module.model.forward = split
    return Sample(sample.module, whole, sample.batch)


def test_a_model_with_breaks(made) -> None:
    sample = model()
    reference = gradients(torch.compile(sample.step, backend="aot_eager"), sample)
    torch._dynamo.reset()
    step = torch.compile(sample.step, backend=memplan_backend, options={"inner": "eager"})
    for _ in range(2):
        gradients(step, sample)
    everything = made[-1].peak
    torch._dynamo.reset()
    budget = int(made[-1].step.base_bytes + 0.8 * (everything - made[-1].step.base_bytes))
    step = torch.compile(sample.step, backend=memplan_backend, options={"inner": "eager", "budget": budget})
    for _ in range(2):
        found = gradients(step, sample)
    assert made[-1].overhead > 0 and len(made[-1].step.graphs) >= 4
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    sample.module.zero_grad()
    with memplan.record("cpu") as seen:
        step(sample.batch).backward()
    assert seen.timeline.peak_above_base + made[-1].step.base_bytes <= budget


@pytest.mark.slow
def test_a_model_with_breaks_under_inductor(made) -> None:
    sample = model()
    exact = exact_gradients(sample, ONE_LAYER(dtype=torch.float64))
    torch._dynamo.reset()
    unplanned = rms_error(gradients(torch.compile(sample.step), sample), exact)
    torch._dynamo.reset()
    step = torch.compile(sample.step, backend=memplan_backend, options={"policy": "block-checkpoint"})
    for _ in range(2):
        found = gradients(step, sample)
    assert made[-1].step.fused and len(made[-1].step.graphs) >= 4
    assert rms_error(found, exact) <= 1.1 * unplanned


def test_planned_while_another_step_is_measured():
    """What measures outside of another step's graphs does not take traced gradients for a backward."""
    net, x = Straight(), rows()
    step = planned(net, None)
    step(x).backward()
    net.zero_grad()
    session = Session()
    step(x).backward()  # planned as one, outside of Dynamo
    assert not session.open
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    net(x).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), found, strict=True))


def test_each_compile_has_graphs_of_its_own():
    """Two of the same net with equal options: a step runs no graph of the other's, whose plan knows nothing of it."""
    net, x = Straight(), rows()
    for _ in range(2):
        before = counters["stats"]["unique_graphs"]
        memplan.compile(net.forward, budget=10**9, inner="eager")(x)
        assert counters["stats"]["unique_graphs"] - before == 3
