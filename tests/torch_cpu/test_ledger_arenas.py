"""The ledger over real arenas: whatever fails, and wherever, the budget holds and the next phase works.

What is on the device is counted by the kernel, page by page for each arena, and for the process as a whole.
"""

import gc
import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime import arena, device_lock, early, ledger, tenants
from memplan.runtime.arena import Arena, HostPages
from memplan.runtime.ledger import PHASES, Ledger, Restored, RLPhase
from memplan.runtime.tenants import ArenaTenant

ROOT = Path(__file__).parents[2]
# tag -> size in units, the phases that need it, how it is restored
LEASES: dict[str, tuple[int, tuple[RLPhase, ...], Restored]] = {
    "weights": (3, PHASES, "copy"),
    "kv_cache": (6, ("rollout",), "nothing"),
    "reference": (4, ("score",), "recompute"),
    "optimizer": (5, ("train",), "copy"),
    "arena": (1, ("train",), "nothing"),
}
BUDGET = 10  # units: one more than rollout needs, and train; all together are 19
NEEDED = {phase: {tag for tag, (_, phases, _) in LEASES.items() if phase in phases} for phase in PHASES}
ERRORS = (RuntimeError, MemplanError, OSError, KeyboardInterrupt)


class Faults:
    """Points of a transition, in order. At those in `at` (counted from `arm`), something goes wrong."""

    def __init__(self) -> None:
        self.at: dict[int, type[BaseException]] = {}
        self.passed = 0
        self.fired: list[str] = []  # names of those that did
        self.look: Callable[[], None] = lambda: None

    def arm(self, at: dict[int, type[BaseException]]) -> None:
        self.at, self.passed, self.fired = at, 0, []

    def due(self, name: str) -> type[BaseException] | None:
        self.look()
        self.passed += 1
        error = self.at.get(self.passed)
        self.fired += [name] if error is not None else []
        return error

    def point(self, name: str) -> None:
        if (error := self.due(name)) is not None:
            raise error("boom")


class FaultyPages(HostPages):
    """Half of a range may be done when it fails."""

    faults: Faults

    def map(self, start: int, size: int) -> None:
        self.faults.point("map: nothing")
        super().map(start, self.chunk)
        self.faults.point("map: a chunk")
        super().map(start, size)

    def release(self, start: int, size: int) -> None:
        error = self.faults.due("release: nothing")
        if error is OSError:
            return  # and says that it has
        if error is not None:
            raise error("boom")
        super().release(start, self.chunk)
        self.faults.point("release: a chunk")
        super().release(start, size)


class Faulty(ArenaTenant):
    """What it has copied back may be rubbish when it fails."""

    def __init__(self, pages: FaultyPages, **how: Any) -> None:
        super().__init__(Arena(pages), **how)
        self.faults = pages.faults

    def release(self) -> int:
        self.faults.point("release: before")
        moved = super().release()
        self.faults.point("release: after")
        return moved

    def restore(self) -> int:
        if self._away:
            self.arena.map()
            self._there.fill_(99)
            self.faults.point("restore: rubbish")
        moved = super().restore()
        self.faults.point("restore: after")
        return moved


class World:
    """A ledger and its tenants, and what has to be in them. `real`: the device is the process's resident memory."""

    def __init__(self, folder: Path, unit: int, real: bool) -> None:
        self.unit, self.faults, self.real = unit, Faults(), real
        self.earlier = 0  # transitions before `early`
        self.expected: dict[str, torch.Tensor] = {}
        self.tenants: dict[str, Faulty] = {}
        for number, (tag, (units, _, restored)) in enumerate(LEASES.items()):
            pages = FaultyPages(units * unit, unit)
            pages.faults = self.faults
            fill = (lambda: self.tenants["reference"]._there.copy_(self.expected["reference"])) if number == 2 else None
            self.tenants[tag] = Faulty(pages, restored=restored, fill=fill)
            if restored != "nothing":
                self.expected[tag] = torch.full((units * unit,), number, dtype=torch.uint8)
                self.tenants[tag]._away = restored == "recompute"
        self.addresses = {tag: tenant._there.data_ptr() for tag, tenant in self.tenants.items()}
        self.ledger = Ledger(BUDGET * unit, measure=self.measure, tolerance=self.tolerance, folder=folder)
        for tag, (units, phases, _) in LEASES.items():
            self.ledger.lease(tag, self.tenants[tag], units * unit, phases)
        self.beside = self.device()
        self.faults.look = self.look
        with self.ledger.phase("train"):  # the first contents
            for tag in ("weights", "optimizer"):
                self.tenants[tag]._there.copy_(self.expected[tag])

    @property
    def tolerance(self) -> int:
        return 3 * self.unit if self.real else 1

    def on_device(self) -> int:
        return sum(tenant.arena.resident for tenant in self.tenants.values())

    def device(self) -> int:
        return memory.resident() if self.real else self.on_device()

    def measure(self) -> int:
        if threading.current_thread() is not threading.main_thread():  # which looks when it likes
            return self.device()
        error = self.faults.due("measure")
        if error is OSError:
            return self.device() + 4 * self.unit
        if error is not None:
            raise error("boom")
        return self.device()

    def look(self) -> None:
        """The budget holds, by both counts."""
        assert self.on_device() <= BUDGET * self.unit
        if self.real:
            assert self.device() - self.beside <= BUDGET * self.unit + self.tolerance

    def check(self, phase: str, early: int = 0) -> None:
        """All that a phase needs is there and as it was left, at its old address; and nothing else is, but for so many
        bytes that came early.
        """
        self.look()
        for tag, tenant in self.tenants.items():
            if tag in NEEDED[phase] or not early:
                assert tenant.arena.resident == (tenant.arena.size if tag in NEEDED[phase] else 0), tag
            early -= tenant.arena.resident if tag not in NEEDED[phase] else 0
            assert tenant._there.data_ptr() == self.addresses[tag]
            if tag in NEEDED[phase] and tag in self.expected:
                assert torch.equal(tenant._there, self.expected[tag]), tag
        assert early >= 0

    def work(self, phase: str) -> None:
        """What is there is changed."""
        for tag in NEEDED[phase]:
            self.tenants[tag]._there.add_(7)
            if tag in self.expected:
                self.expected[tag].add_(7)

    def enter(self, phase: str) -> None:
        with self.ledger.phase(phase):
            self.check(phase)
            self.work(phase)

    def early(self, draw: random.Random) -> None:
        """A step in the phase that is left says now and then what it leaves, and the next phase's things come."""
        name = self.ledger.at or "train"
        self.earlier += 1
        with self.ledger.phase(name):
            self.ledger.prefetch(draw.choice(PHASES))
            spare = (BUDGET - sum(LEASES[tag][0] for tag in NEEDED[name])) * self.unit
            left = sorted(draw.randint(0, spare) for _ in range(4))
            incoming = self.ledger._incoming
            incoming.begun("step", left)
            for mark in draw.sample(range(4), draw.randint(0, 4)):
                incoming.passed("step", mark)
                if draw.random() < 0.5:
                    time.sleep(0.001)
                self.look()
            if draw.random() < 0.5:
                time.sleep(0.005)

    def fail(self, phase: str, at: dict[int, type[BaseException]]) -> list[str]:
        """Enter a phase where something goes wrong at some points, which are returned: it is said and recorded, and
        after one failure all is as it was.
        """
        self.faults.arm(at)
        before = self.ledger.at
        try:
            self.enter(phase)
        except (MemplanError, KeyboardInterrupt):
            assert self.faults.fired
            assert self.ledger.transitions[-1].failed and self.ledger.transitions[-1].wanted == phase
            assert self.ledger.at in (before, "") and self.ledger.transitions[-1].after == self.ledger.at
            if len(self.faults.fired) == 1:
                assert self.ledger.at == before
            if self.ledger.at:
                self.check(self.ledger.at, early=self.ledger.transitions[-1].early)
        else:
            assert not self.ledger.transitions[-1].failed
        fired = self.faults.fired
        self.faults.arm({})
        return fired


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Worlds; what is left of them would come and go in other tests."""
    worlds = []
    gc.collect()

    def make(unit: int, real: bool) -> World:
        worlds.append(World(tmp_path, unit, real))
        return worlds[-1]

    yield make
    for world in worlds:
        world.faults.arm({})
        world.ledger.close()
        for tenant in world.tenants.values():
            tenant.arena.release()


def sequences(folder: Path, count: int) -> None:
    """Six transitions each, of which three go wrong."""
    world = World(folder, 2**20, real=True)
    for seed in range(count):
        draw = random.Random(seed)
        world.ledger.transitions.clear()  # they grow, and count
        try:
            for _ in range(3):
                if draw.random() < 0.5:
                    world.early(draw)
                first = draw.randint(1, 22)
                at = {first: draw.choice(ERRORS)}
                if draw.random() < 0.4:  # the way back fails too
                    at[first + draw.randint(1, 8)] = draw.choice(ERRORS)
                world.fail(draw.choice(PHASES), at)
                world.enter(draw.choice(PHASES))
        except BaseException as error:
            error.add_note(f"in the sequence of seed {seed}")
            raise
        assert len(world.ledger.transitions) == 6 + world.earlier
        world.earlier = 0
    print("all")


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_sequences_of_phases_with_anything_failing(tmp_path: Path, count: int) -> None:
    """In a process of its own, whose resident memory is nobody else's."""
    code = "import pathlib, sys, torch; torch.set_num_threads(1)\n"
    code += "from tests.torch_cpu.test_ledger_arenas import sequences\n"
    code += "sequences(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path), str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "all\n", done.stderr


POINTS = {"measure", "map: nothing", "map: a chunk", "restore: rubbish", "restore: after"}
POINTS |= {f"release: {point}" for point in ("before", "nothing", "a chunk", "after")}


def test_every_point_of_a_transition_can_fail(made: Callable[..., World]) -> None:
    """Each in turn, alone: all is as it was."""
    world, seen = made(2**16, real=False), set()
    for at in itertools.count(1):
        world.enter("rollout")
        fired = world.fail("train", {at: RuntimeError})
        if world.ledger.at == "train":
            break
        assert world.ledger.at == "rollout"
        seen |= set(fired)
    assert seen == POINTS


SOURCES = {module.__file__ for module in (arena, device_lock, early, ledger, tenants)}


@contextmanager
def interrupted_at(line: int) -> Iterator[Callable[[], bool]]:
    """KeyboardInterrupt before the given line that runs in the ledger or in what it calls; whether it came."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in SOURCES:
            return None
        if event == "line" and left > 0:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: left == 0
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("before", "after", "fault"), [("train", "score", 0), ("rollout", "train", 5), ("train", "rollout", 16)]
)
def test_interrupted_before_any_line(
    before: str, after: str, fault: int, made: Callable[..., World], one_thread: None
) -> None:
    """Of a transition, and of the way back from one that fails at a point; until no line is left."""
    world = made(2**14, real=False)
    for line in itertools.count(1):
        world.enter(before)
        world.faults.arm({fault: RuntimeError})
        with interrupted_at(line) as came:
            try:
                with world.ledger.phase(after):
                    sys.settrace(None)
                    world.check(after)
            except (KeyboardInterrupt, MemplanError):
                pass
        world.faults.arm({})
        world.enter(PHASES[line % 3])
        if not came():
            break
    assert line > 100


def test_interrupted_while_things_come_early(made: Callable[..., World], one_thread: None) -> None:
    """Before any line of the thread that waits for them."""
    world, came_early = made(2**14, real=False), 0
    for line in itertools.count(1):
        world.enter("train")
        with interrupted_at(line) as came:
            try:
                with world.ledger.phase("train"):
                    world.ledger.prefetch("rollout")
                    incoming = world.ledger._incoming
                    incoming.begun("step", (0, 2**14, 2**14))
                    for mark in (0, 1, 2, 1):
                        incoming.passed("step", mark)
                        world.look()
                with world.ledger.phase("rollout"):
                    sys.settrace(None)
                    world.check("rollout")
                    came_early += world.ledger.transitions[-1].early
            except (KeyboardInterrupt, MemplanError):
                pass
        world.enter(PHASES[line % 3])
        if not came():
            break
    assert line > 100 and came_early


def test_what_never_leaves_has_all_phases_and_what_is_reserved_is_never_there(tmp_path: Path) -> None:
    ledger = Ledger(100, measure=lambda: 7, tolerance=1, folder=tmp_path)
    ledger.lease("weights", tenants.Resident(7), 7, PHASES)
    ledger.lease("activations", tenants.Reserved(), 93, ("train",))
    for phase in ("train", "rollout", "train"):
        with ledger.phase(phase):
            assert ledger.leases["weights"].state == "resident"
    assert ledger.needed("train") == {"weights": 7, "activations": 93}
    with pytest.raises(MemplanError, match="budget 100 B is smaller than what phase 'train' needs, 101 B"):
        ledger.lease("more", tenants.Reserved(), 1, ("train",))
    with pytest.raises(MemplanError, match="it cannot leave the device: its lease has to name all phases"):
        tenants.Resident(7).release()
    ledger.close()
