"""A ledger with a real engine: whatever fails, the budget holds, the next phase works, and tokens are the same."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime.arena import Arena
from memplan.runtime.ledger import PHASES, Ledger
from memplan.runtime.tenants import ArenaTenant

from .conftest import started

MIB = 2**20
CACHE, STATES = 96 * MIB, 64 * MIB
PROMPTS = [[3, 4, 5, 6 + k] for k in range(4)]
SAMPLING: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "seed": 7}
ERRORS = (RuntimeError, OSError, KeyboardInterrupt)


class World:
    """An engine and an optimizer's states, inside a budget that has room for one of them."""

    def __init__(self, folder: Path) -> None:
        self.engine = started(folder, kv_cache=CACHE)
        self.engine.fixed = 3 * MIB  # in a process that had an engine before it may be nothing
        self.tokens = self.engine.generate(PROMPTS, **SAMPLING)
        self.states = ArenaTenant(Arena.reserve(STATES), "copy")
        self.held = self.states.arena.tensor(0, (STATES // 4,), torch.float32)
        self.engine.release()
        fixed = self.engine.fixed + self.engine.weight_bytes
        self.ledger = Ledger(fixed + CACHE, tolerance=16 * MIB, folder=folder)
        self.beside = memory.resident()
        self.engine.join(self.ledger)
        self.ledger.lease("optimizer", self.states, STATES, ("train",))

    def resident(self) -> int:
        """Of cache and states, as the system says."""
        return memory.resident() - self.beside

    def early(self, draw: random.Random) -> None:
        """In a phase, a step says now and then what it leaves; what another phase needs may come."""
        self.ledger.prefetch(draw.choice(PHASES))
        there = sum(lease.bytes for lease in self.ledger.leases.values() if lease.state == "resident")
        left = sorted(draw.randint(0, self.ledger.budget - there) for _ in range(4))
        self.ledger._incoming.begun("step", left)
        for mark in draw.sample(range(4), draw.randint(0, 4)):
            self.ledger._incoming.passed("step", mark)
            if draw.random() < 0.5:
                time.sleep(0.005)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    there = World(tmp_path_factory.mktemp("world"))
    yield there
    there.ledger.close()
    there.engine.close()


def test_phases(world: World) -> None:
    with world.ledger.phase("train"):
        world.held.fill_(7)
        assert world.engine.resident == 0
        assert abs(world.resident() - STATES) < 8 * MIB
        with pytest.raises(MemplanError, match="the engine's KV cache is not on the device"):
            world.engine.generate(PROMPTS, **SAMPLING)
    with world.ledger.phase("rollout"):
        assert world.engine.resident == CACHE
        assert abs(world.resident() - CACHE) < 8 * MIB
        assert world.engine.generate(PROMPTS, **SAMPLING) == world.tokens
    with world.ledger.phase("train"):
        assert world.held.eq(7).all()


def fail_at(world: World, patch: pytest.MonkeyPatch, draw: random.Random) -> str:
    """Let one of the things that a transition does go wrong, before or after it is done, once or twice."""
    name, what = draw.choice(
        [("discard", world.engine._worker), ("wake_up", world.engine._worker), ("sleep", world.engine.llm),
         ("wake_up", world.engine.llm), ("reset_prefix_cache", world.engine.llm.llm_engine),
         ("step", world.engine.llm.llm_engine), ("map", world.states.arena.pages),
         ("release", world.states.arena.pages)]
    )  # fmt: skip
    real, left, error, late = getattr(what, name), [draw.choice([1, 2])], draw.choice(ERRORS), draw.random() < 0.5

    def fails(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs) if late else None
        if left[0]:
            left[0] -= 1
            raise error("boom")
        return result if late else real(*args, **kwargs)

    patch.setattr(what, name, fails)
    return f"{type(what).__name__}.{name} {'after' if late else 'before'}, {error.__name__}"


def test_sequences_of_phases_in_which_the_engine_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, failed, rolled, early = random.Random(0), set[str](), 0, 0
    with world.ledger.phase("train"):
        world.held.fill_(0)
    trained = 0
    for _ in range(300):
        name = draw.choice([phase for phase in PHASES if phase != world.ledger.at])
        with monkeypatch.context() as patch:
            point = fail_at(world, patch, draw) if draw.random() < 0.7 else ""
            try:
                with world.ledger.phase(name):
                    pass
            except (MemplanError, KeyboardInterrupt):
                assert point, "nothing was to fail"
                failed.add(point)
        assert world.engine.resident + world.states.resident <= CACHE
        with world.ledger.phase(name):  # the next one works
            assert world.engine.resident == (CACHE if name == "rollout" else 0)
            assert world.resident() < CACHE + 12 * MIB
            if name == "rollout":
                rolled += 1
                assert world.engine.generate(PROMPTS, **SAMPLING) == world.tokens
            elif name == "train":
                assert world.held.eq(trained).all()
                trained += 1
                world.held.fill_(trained)
            if draw.random() < 0.5:
                world.early(draw)
                assert world.resident() < CACHE + 12 * MIB
        early += world.ledger.transitions[-2].early > 0
    assert early > 5  # it depends on the machine how many
    assert len({point.split()[0] for point in failed}) == 8 and len(failed) > 25, sorted(failed)
    assert rolled > 60 and trained > 60


def test_a_rollout_goes_on_after_the_trainer_had_the_memory(world: World) -> None:
    with world.ledger.phase("rollout"):
        world.engine.submit(PROMPTS, **SAMPLING)
        done = world.engine.advance(5)
    with world.ledger.phase("train"):
        world.held.zero_()
    with world.ledger.phase("rollout"):
        done += world.engine.advance()
    assert [c.tokens for c in done] == [c.tokens for c in world.tokens]


def test_a_budget_for_less_than_the_engine_is_refused_and_nothing_is_leased(world: World, tmp_path: Path) -> None:
    always = world.engine.weight_bytes + world.engine.fixed
    for budget, what in (
        (world.engine.weight_bytes // 2, "weights"),
        (always - 1, "engine_fixed"),
        (always + CACHE - 1, "kv_cache"),
    ):
        ledger = Ledger(budget, folder=tmp_path)
        with pytest.raises(MemplanError, match=f"is smaller than what .*{what}"):
            world.engine.join(ledger)
        assert not ledger.leases
        ledger.close()
