"""A step that memplan plans inside what the ledger leaves it, beside a cache that is there in the other phase."""

import contextlib

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.ir import Plan
from memplan.runtime.arena import Arena
from memplan.runtime.ledger import Ledger
from memplan.runtime.tenants import ArenaTenant, moved_in

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "one_thread")

MIB = 2**20
ROWS = torch.linspace(-1, 1, 4096 * 256).view(4096, 256)


def trainer(backend, **options):
    """A network, its optimizer with its states, and the loss as it is compiled."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(256, 256), nn.Tanh())), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(ROWS[:2]).square().mean().backward()
    optimizer.step()
    return net, optimizer, torch.compile(lambda x: net(x).square().mean(), backend=backend, **options)


def update(loss, optimizer) -> None:
    optimizer.zero_grad()
    loss(ROWS).backward()
    optimizer.step()


def test_rollout_and_training_share_a_budget(made: list[Plan], tmp_path) -> None:
    budget = 40 * MIB
    net, optimizer, _ = trainer("eager")
    weights = moved_in(net.parameters())
    states = moved_in(s for states in optimizer.state.values() for s in states.values())
    cache, engine = (ArenaTenant(Arena.reserve(size * MIB)) for size in (32, 4))
    ledger = Ledger(budget, tolerance="1GB", folder=tmp_path)  # what other tests have left goes meanwhile
    ledger.lease("weights", weights, weights.arena.size, ("rollout", "train"))
    ledger.lease("optimizer", states, states.arena.size, ("train",))
    ledger.lease("kv_cache", cache, 32 * MIB, ("rollout",))
    ledger.lease("engine", engine, 4 * MIB, ("rollout", "score", "train"))
    shared = ledger.budget_for("train", own=("weights", "optimizer"))
    assert shared.available == 36 * MIB
    loss = torch.compile(
        lambda x: net(x).square().mean(), backend=memplan_backend, options={"budget": shared, "inner": "eager"}
    )
    for number in range(3):
        with ledger.phase("rollout"):
            assert cache.resident == 32 * MIB and states.resident == 0
            net(ROWS[:8])
        with ledger.phase("train"):
            assert cache.resident == 0 and states.resident == states.arena.size
            with memplan.record("cpu") if number else contextlib.nullcontext() as seen:  # planning measures memory
                update(loss, optimizer)
        held = sum(t.nbytes for t in (*net.parameters(), ROWS)) + states.arena.size
        assert seen is None or seen.timeline.peak_above_base + held <= shared.available
    ledger.close()
    assert [t.after for t in ledger.transitions] == ["rollout", "train"] * 3
    plan = made[-1].with_others()
    assert [(b.name, b.bytes) for b in plan.timeline.others] == [("engine", 4 * MIB)]
    assert "held by others: engine" in str(memplan.report.summary(plan.timeline))
    assert plan.overhead > 0 and plan.peak + 32 * MIB > budget  # it recomputes, and could not stay beside the cache
    other, its_optimizer, plain = trainer("aot_eager")
    for _ in range(3):
        update(plain, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
