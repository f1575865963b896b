"""A step that calls backward itself is one graph: micro-batches, gradients added up and the optimizer are planned with
it, and the peak is inside the budget with the same bits.
"""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import memplan
from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Plan
from memplan.passes.check import check
from memplan.passes.phases import phases
from memplan.passes.phases import unplanned as unplanned_nodes
from tests.accuracy import rms_error
from tests.models import ONE_LAYER, Sample

# Dynamo's own, when it compiles a graph that begins with the result of another.
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WIDTH, ROWS = 64, 256


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(x))))


class Trainer:
    """A network, momentum, and a whole train step over two micro-batches."""

    def __init__(self, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*(Block(dropout) for _ in range(3))).to(dtype)
        self.parameters = list(self.net.parameters())
        self.momentum = [torch.zeros_like(p) for p in self.parameters]
        self.batches = [torch.randn(ROWS, WIDTH).to(dtype) for _ in range(2)]

    def step(self, *batches: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for x in batches:
            loss = self.net(x).logsumexp(-1).mean() / len(batches)
            loss.backward()
            total = total + loss.detach()
        with torch.no_grad():
            gradients = [p.grad for p in self.parameters]
            torch._foreach_mul_(self.momentum, 0.9)
            torch._foreach_add_(self.momentum, gradients)
            torch._foreach_add_(self.parameters, self.momentum, alpha=-0.1)
        for p in self.parameters:
            p.grad = None
        return total

    def run(self, step: Callable, times: int = 3) -> list[torch.Tensor]:
        """What the step returns each time, and what it leaves behind."""
        torch.manual_seed(7)
        losses = [step(*self.batches) for _ in range(times)]
        assert all(p.grad is None for p in self.parameters)
        return [*losses, *(p.detach().clone() for p in self.parameters), torch.rand(3)]

    def resident(self) -> int:
        return sum(t.nbytes for t in (*self.parameters, *self.momentum, *self.batches))

    def peak(self, step: Callable) -> int:
        gc.collect()
        with memplan.record("cpu") as seen:
            step(*self.batches)
        return seen.timeline.peak_above_base + self.resident()


def unplanned(trainer: Trainer, backend: str = "aot_eager") -> Callable:
    compiled = torch.compile(trainer.step, backend=backend, fullgraph=True)

    def run(*batches: torch.Tensor) -> torch.Tensor:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*batches)

    return run


def everything(made: list[Plan]) -> int:
    """The peak of the plan for an ample budget."""
    trainer = Trainer()
    trainer.run(memplan.compile(trainer.step, inner="eager", policy="save-all", fullgraph=True), 1)
    torch._dynamo.reset()
    return made.pop().peak


def smallest() -> int:
    """The least budget, as a refusal says it."""
    trainer = Trainer()
    try:
        memplan.compile(trainer.step, budget=trainer.resident(), inner="eager")(*trainer.batches)
    except DoesNotFit as e:
        torch._dynamo.reset()
        return e.smallest
    raise AssertionError("it fits into nothing")


def test_parts_of_one_graph(made) -> None:
    trainer = Trainer()
    trainer.run(memplan.compile(trainer.step, inner="eager", fullgraph=True), 1)
    (plan,) = made
    assert check(plan) == []
    parts = [(g.name, g.phase, g.unit) for g in plan.step.graphs]
    assert parts == [
        ("forward 1", "forward", 0),
        ("backward 1", "backward", 0),
        ("after backward 1", "backward", 0),
        ("forward 2", "forward", 1),
        ("backward 2", "backward", 1),
        ("after backward 2", "backward", 1),
    ]
    assert any("foreach" in op.target for op in plan.step.graphs[-1].ops)
    assert not plan.step.notes


def traced(*calls: tuple[str, str, bool]) -> torch.fx.GraphModule:
    """A graph of one placeholder x and calls of aten.add: (name, what it reads, whether it is of a backward)."""
    graph = torch.fx.Graph()
    nodes = {"x": graph.placeholder("x")}
    for name, reads, backward in calls:
        arguments = tuple(nodes[r] for r in reads.split())
        nodes[name] = graph.create_node("call_function", torch.ops.aten.add.Tensor, arguments, name=name)
        nodes[name].meta = {"autograd_backward": True} if backward else {}
    graph.output(nodes[calls[-1][0]])
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_a_forward_that_reads_an_update() -> None:
    """It is not planned, and capture says so. (Dynamo itself mixes up closures after it compiled such a step.)"""
    graph = traced(
        ("loss", "x x", False), ("grad", "loss x", True), ("update", "grad x", False),
        ("loss2", "update x", False), ("grad2", "loss2 x", True), ("update2", "grad2 update", False),
    )  # fmt: skip
    assert {n.name for n in unplanned_nodes(graph)} == {"update", "loss2"}
    assert [part.name for part in phases(graph)] == ["forward 1", "backward 1", "after backward 1"]
    apart = traced(("loss", "x x", False), ("grad", "loss x", True), ("sum", "grad x", False), ("loss2", "x x", False),
                   ("grad2", "loss2 x", True), ("sum2", "grad2 sum", False))  # fmt: skip
    assert not unplanned_nodes(apart)
    names = ["forward 1", "backward 1", "after backward 1", "forward 2", "backward 2", "after backward 2"]
    assert [part.name for part in phases(apart)] == names


@pytest.mark.parametrize("part", [*(pytest.param(part, marks=pytest.mark.slow) for part in (1.0, 0.6)), 0.0])
def test_the_same_bits_inside_the_budget(part, made) -> None:
    """Dropout included: what is computed twice draws the same numbers."""
    expected = Trainer()
    results = expected.run(unplanned(expected))
    most, least = everything(made), smallest()
    assert least < 0.8 * most
    budget, trainer = int(least + part * (most - least)), Trainer()
    step = memplan.compile(trainer.step, budget=budget, inner="eager", fullgraph=True)
    found = trainer.run(step)
    (plan,) = made
    assert all(torch.equal(a, b) for a, b in zip(results, found, strict=True))
    assert part == 1.0 or plan.overhead > 0
    assert part > 0 or any(run.again and plan.step.ops[run.op].rng_bytes for run in plan.backward)
    for _ in range(2):
        assert trainer.peak(step) == plan.peak <= budget


@pytest.mark.parametrize(
    "policy",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("save-all", "sqrt-n")), "block-checkpoint", "greedy"],
)
def test_every_policy(policy, made) -> None:
    expected, trainer = Trainer(), Trainer()
    results = expected.run(unplanned(expected), 1)
    step = memplan.compile(trainer.step, policy=policy, inner="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(results, trainer.run(step, 1), strict=True))
    assert trainer.peak(step) == made[-1].peak


def test_under_inductor(made) -> None:
    """Far below what Inductor needs alone, as predicted to the byte, with an error no larger than its own."""
    exact, alone = Trainer(0.0, torch.float64), Trainer(0.0)
    for double, single in zip(exact.parameters + exact.batches, alone.parameters + alone.batches, strict=True):
        double.data.copy_(single)
    truth = [p.double() for p in exact.run(unplanned(exact))[3:-1]]
    step = unplanned(alone, "inductor")
    error = rms_error([p.double() for p in alone.run(step)[3:-1]], truth)
    torch._dynamo.reset()
    needs = alone.peak(step)
    budget = int(alone.resident() + 0.4 * (needs - alone.resident()))
    torch._dynamo.reset()
    trainer = Trainer(0.0)
    step = memplan.compile(trainer.step, budget=budget, fullgraph=True)
    assert rms_error([p.double() for p in trainer.run(step)[3:-1]], truth) <= 1.1 * error
    for _ in range(2):
        assert trainer.peak(step) == made[-1].peak <= budget


@pytest.mark.slow
def test_random_numbers_under_inductor(made) -> None:
    """What is computed twice draws the same: gradients agree with those of the plan that keeps everything."""
    results = []
    for policy in ("save-all", "block-checkpoint"):
        trainer = Trainer(0.3)
        results.append(trainer.run(memplan.compile(trainer.step, policy=policy, fullgraph=True), 1))
        torch._dynamo.reset()
    assert made[-1].peak < made[0].peak
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_with_attention(made) -> None:
    """Flash attention is recomputed inside one graph."""
    results = []
    for compiler in ("unplanned", "planned"):
        sample: Sample = ONE_LAYER()

        def step(batch, sample=sample):
            loss = sample.step(batch)
            loss.backward()
            return loss.detach()

        if compiler == "planned":
            run = memplan.compile(step, policy="block-checkpoint", inner="eager", fullgraph=True)
        else:
            compiled = torch.compile(step, backend="aot_eager", fullgraph=True)

            def run(batch, compiled=compiled):
                with torch._dynamo.config.patch(trace_autograd_ops=True):
                    return compiled(batch)

        loss = run(sample.batch)
        results.append([loss, *(p.grad for p in sample.module.parameters())])
        torch._dynamo.reset()
    again = [made[-1].step.ops[run.op].target for run in made[-1].backward if run.again]
    assert any("scaled_dot_product" in target for target in again)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_cannot_be_one_graph_still_runs() -> None:
    """torch.optim breaks the graph; a loss that is returned with its graph cannot be traced through backward."""
    trainer = Trainer(0.0)
    optimizer = torch.optim.SGD(trainer.net.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = trainer.net(x).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    other = copy.deepcopy(trainer.net)
    planned = memplan.compile(step, inner="eager")
    for _ in range(3):
        planned(trainer.batches[0])
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    trainer.net, mine = other, trainer.net
    for _ in range(3):
        torch.compile(step, backend="aot_eager")(trainer.batches[0])
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


def test_an_optimizer_that_breaks_the_graph(made) -> None:
    """Forward and backward are one graph, planned for the budget; torch.optim runs between it and the end."""
    trainer = Trainer(0.0)
    optimizer = torch.optim.SGD(trainer.net.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = trainer.net(x).logsumexp(-1).mean()
        loss.backward()
        loss = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    planned = memplan.compile(step, inner="eager")
    losses = [planned(trainer.batches[0]) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert made[0].step.closed
    assert made[0].overhead <= 0  # with room for everything, nothing is computed twice


def test_a_budget_that_is_too_small() -> None:
    trainer = Trainer()
    step = memplan.compile(trainer.step, budget=trainer.resident() + 10_000, inner="eager", fullgraph=True)
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(Exception, match=r"the step does not fit .*set a budget of at least"):
        step(*trainer.batches)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_options_are_read_at_once() -> None:
    with pytest.raises(MemplanError, match=r"no option 'bugdet'.*did you mean 'budget'"):
        memplan.compile(lambda x: x, bugdet="1GB")
