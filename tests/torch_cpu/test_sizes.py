"""A step whose lengths change: every call is inside the budget, few plans are made, and gradients stay the unplanned
step's, bit for bit under eager.
"""

import random

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit
from memplan.ir import Held, Plan
from memplan.passes.dispatch import Compiled
from memplan.passes.eager import compile_planned
from tests.models import CASES, Rollout, Sample

LENGTHS = (8, 160)
LLAMA = CASES[0]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_length(sample: Sample, tokens: int) -> Rollout:
    torch.manual_seed(tokens)
    ids, old = torch.randint(128, (2, tokens)), -4.8 + 0.1 * torch.randn(2, tokens - 1)
    return Rollout(ids, sample.batch.advantages_N, old)


def resident(sample: Sample, batch: Rollout) -> int:
    storages = {t.untyped_storage() for t in (*sample.module.parameters(), *sample.module.buffers(), *batch)}
    return sum(s.nbytes() for s in storages)


def plans(monkeypatch) -> list[Plan]:
    """The plans that the backend reports, as they come."""
    seen: list[Plan] = []
    monkeypatch.setattr("memplan.backend._report", lambda plan, options: seen.append(plan))
    return seen


def total_peak(sample: Sample, step, batch: Rollout) -> int:
    """The measured peak of one step, resident bytes included."""
    sample.module.zero_grad()
    with memplan.record("cpu") as seen:
        step(batch).backward()
    sample.module.zero_grad()
    return seen.timeline.peak_above_base + resident(sample, batch)


def smallest(sample: Sample, tokens: int, inner: str, policy: str = "optimal") -> int:
    """The smallest budget for one length, planned alone."""
    with pytest.raises(DoesNotFit) as refused:
        memplan.plan(sample.step, of_length(sample, tokens), budget=1, inner=inner, policy=policy)
    return refused.value.smallest


@pytest.mark.parametrize(
    "limits",
    [pytest.param({}, id="unknown lengths"), pytest.param({"tokens": LENGTHS[1]}, id="limits", marks=pytest.mark.slow)],
)
def test_lengths_in_any_order_under_eager(limits, monkeypatch) -> None:
    sample, made = LLAMA.make(), plans(monkeypatch)
    budget = int(1.05 * smallest(sample, LENGTHS[1], "eager"))
    generator = random.Random(4)
    lengths = [16, 24, *(generator.randint(*LENGTHS) for _ in range(6)), LENGTHS[1], LENGTHS[0]]
    options = {"budget": budget, "inner": "eager", "limits": limits}
    planned = torch.compile(sample.step, backend=memplan_backend, options=options)
    unplanned = torch.compile(sample.step, backend="aot_eager", dynamic=True)
    for tokens in lengths:
        batch = of_length(sample, tokens)
        results = []
        for step in (planned, unplanned):
            sample.module.zero_grad()
            loss = step(batch)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in sample.module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), tokens
        del results, loss
        assert total_peak(sample, planned, batch) <= budget, tokens
    assert len(made) <= (2 if limits else 4)
    assert made[-1].overhead > 0  # the budget was tight enough to matter
    with pytest.raises(Exception, match="does not fit"):
        planned(of_length(sample, 4 * LENGTHS[1]))


class Rows(nn.Module):
    """A few kernels for Inductor to generate, over rows of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.layers, self.leave = nn.Linear(8, 64), nn.ModuleList(map(_square, range(4))), nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.leave(x).square().mean()


def _square(_: int) -> nn.Linear:
    return nn.Linear(64, 64)


def test_rows_in_any_number_under_inductor(monkeypatch) -> None:
    net, made = Rows(), plans(monkeypatch)
    with pytest.raises(DoesNotFit) as refused:
        memplan.plan(net, torch.randn(900, 8), budget=1)
    budget = int(1.05 * refused.value.smallest)
    step = torch.compile(net, backend=memplan_backend, options={"budget": budget}, dynamic=True)
    for rows in (100, 120, 400, 900, 30):
        x = torch.randn(rows, 8)
        step(x).backward()
        net.zero_grad()
        with memplan.record("cpu") as seen:
            step(x).backward()
        net.zero_grad()
        assert seen.timeline.peak_above_base + x.nbytes + sum(p.nbytes for p in net.parameters()) <= budget, rows
    assert 1 < len(made) <= 3
    with pytest.raises(Exception, match="does not fit"):
        step(torch.randn(5000, 8))


@pytest.mark.parametrize("policy", ["greedy", pytest.param("block-checkpoint", marks=pytest.mark.slow)])
def test_the_plan_of_another_length_is_exact(policy, monkeypatch) -> None:
    """What entry checks rely on: the same decisions at another size, predicted to the byte."""
    sample, kept = LLAMA.make(), list[Compiled]()

    def compiler(*given):
        kept.append(compile_planned(*given))
        return kept[-1]

    monkeypatch.setattr("memplan.backend._compiler", lambda options: compiler)
    budget = int(1.05 * smallest(sample, 160, "eager", "greedy"))
    options = {"policy": policy, "inner": "eager", "budget": budget if policy == "greedy" else None}
    step = torch.compile(sample.step, backend=memplan_backend, options=options | {"limits": {"tokens": 160}})
    for tokens in (16, 24):
        step(of_length(sample, tokens)).backward()
        sample.module.zero_grad()
    [(symbol, size)] = kept[1].plan.step.sizes
    assert size == 160
    for tokens in (24, 9, 77, 160):
        batch = of_length(sample, tokens)
        above_base = kept[1].resized(((symbol, tokens - 1),), Held()).timeline.peak_above_base
        assert above_base + resident(sample, batch) == total_peak(sample, step, batch), tokens
