"""What a step leaves of its budget while it runs is left, and the other phase's memory comes there meanwhile."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import MemplanError
from memplan.ir import Budget, Plan, Timeline
from memplan.passes.marks import needed_after
from memplan.runtime import room
from memplan.runtime.arena import Arena
from memplan.runtime.early import Incoming
from memplan.runtime.ledger import Ledger
from memplan.runtime.tenants import ArenaTenant

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

MIB = 2**20
ROWS = torch.linspace(-1, 1, 4096 * 256).view(4096, 256)
BUDGET = 40 * MIB
SENTINEL = 999_983  # bytes of an allocation that marks a place in a recording


class Heard:
    """A listener that leaves a trace in a recording: for each mark, how much is said to be left."""

    wants = True

    def __init__(self) -> None:
        self.left, self.marks = list[tuple[int, ...]](), list[int]()

    def begun(self, step: str, left: Sequence[int]) -> None:
        self.step = step
        self.left.append(tuple(left))
        self.marks.clear()

    def passed(self, step: str, mark: int) -> None:
        assert step == self.step
        self.marks.append(mark)
        torch.empty(SENTINEL, dtype=torch.uint8)


def trainer(backend: Any, budget: Budget | None = None, **options: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(256, 256), nn.Tanh())), nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(net.parameters())
    net(ROWS[:2]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if budget is not None:
        options["options"] = {"budget": budget, **options.get("options", {})}
    return net, optimizer, torch.compile(lambda x: net(x).square().mean(), backend=backend, **options)


def held(net: nn.Module, optimizer: Any) -> int:
    states = [s for of in optimizer.state.values() for s in of.values()]
    return sum(t.nbytes for t in (*net.parameters(), *states, ROWS))


@pytest.mark.parametrize(
    ("inner", "megabytes"),
    [
        ("eager", 31),
        ("inductor", 31),
        *(pytest.param(inner, 40, marks=pytest.mark.slow) for inner in ("eager", "inductor")),
    ],
)
def test_what_is_said_to_be_left_is_left_until_the_end(inner: str, megabytes: int, made: list[Plan]) -> None:
    heard = Heard()
    budget = Budget(megabytes * MIB, listener=room.listen(heard))
    net, optimizer, loss = trainer(memplan_backend, budget, options={"inner": inner})
    for number in range(3):
        gc.collect()
        with memplan.record("cpu") if number == 2 else open("/dev/null") as seen:
            loss(ROWS).backward()
            optimizer.step()
        optimizer.zero_grad()
    timeline: Timeline = seen.timeline
    places = [b.start for b in timeline.blocks if b.bytes == SENTINEL]
    left = heard.left[-1]
    assert heard.marks == list(range(len(left))) and len(places) == len(left) >= 4
    assert list(left) == sorted(left) and left[-1] > 3 * MIB  # a fifth of what the network keeps, and more
    above = [n - timeline.base_bytes for n in timeline.totals]
    for place, size in zip(places, left, strict=True):
        assert held(net, optimizer) + max(above[place + 1 :]) <= budget.bytes - size
    if inner == "eager":  # no less than there is, either
        plan = made[-1]
        after = needed_after(plan.timeline.totals)
        assert [budget.bytes - after[m] for m in plan.marks] == list(left)


@pytest.mark.parametrize(
    ("inner", "rows"),
    [
        pytest.param("eager", [4096, 4000, 1000, 3000, 4090], marks=pytest.mark.slow),
        pytest.param("inductor", [4096, 4000, 1000, 3000, 4090], marks=pytest.mark.slow),
        ("eager", [1000, 900, 4096, 800, 4090]),
    ],
)
def test_lengths_that_change_leave_what_the_longest_one_leaves(inner: str, rows: list[int]) -> None:
    heard = Heard()
    budget = Budget(40 * MIB, listener=room.listen(heard))
    net, optimizer, loss = trainer(memplan_backend, budget, dynamic=True, options={"inner": inner})
    for number in rows:
        x = ROWS[:number].clone()
        gc.collect()
        with memplan.record("cpu") if number == rows[-1] else open("/dev/null") as seen:
            loss(x).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert len(set(heard.left)) < 4 and heard.left[-1][-1] > 3 * MIB
    timeline = seen.timeline
    above = [n - timeline.base_bytes for n in timeline.totals]
    places = [b.start for b in timeline.blocks if b.bytes == SENTINEL]
    for place, size in zip(places, heard.left[-1], strict=True):
        assert held(net, optimizer) + max(above[place + 1 :]) <= budget.bytes - size


def test_what_is_needed_after() -> None:
    assert needed_after((5, 3, 4, 1, 2)) == [4, 4, 2, 2, 2]
    assert needed_after(()) == []


class Watched(ArenaTenant):
    """Looks, whenever it is given pages early, whether they were left."""

    limit: Callable[[], int]
    most = 0

    def prefetch(self, size: int) -> None:
        super().prefetch(size)
        assert self.arena.resident <= self.limit()
        self.most = max(self.most, self.arena.resident)


def ledger_of(folder: Path, cache: ArenaTenant) -> Ledger:
    ledger = Ledger(BUDGET, tolerance="1GB", folder=folder)
    ledger.lease("kv_cache", cache, 32 * MIB, ("rollout",))
    ledger.lease("engine", ArenaTenant(Arena.reserve(4 * MIB)), 4 * MIB, ("rollout", "train"))
    return ledger


def wait(ledger: Ledger) -> None:
    """Until all has come that may; other tests' memory is not this budget's."""
    ledger._beside = ledger._measure()
    incoming = ledger._incoming
    incoming._ask(incoming._limit)
    while incoming.thread.there < incoming.thread.limit:
        time.sleep(0.001)
    incoming._ask(incoming._limit)  # the last piece is there


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_the_cache_comes_back_while_backward_runs(inner: str, tmp_path: Path) -> None:
    cache = Watched(Arena.reserve(32 * MIB))
    ledger = ledger_of(tmp_path, cache)
    cache.limit = lambda: ledger._incoming.thread.limit
    net, optimizer, loss = trainer(memplan_backend, ledger.budget_for("train", own=()), options={"inner": inner})
    other, its_optimizer, plain = trainer("aot_eager" if inner == "eager" else "inductor")
    for _ in range(3):
        with ledger.phase("rollout"):
            assert cache.resident == 32 * MIB
        with ledger.phase("train"):
            assert cache.resident == 0
            ledger.prefetch("rollout")
            loss(ROWS).backward()
            wait(ledger)
            early = cache.resident
            assert 3 * MIB < early <= ledger._incoming._left[-1] < early + 2 * MIB + 1  # to a whole chunk
            optimizer.step()
            optimizer.zero_grad()
        plain(ROWS).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    with ledger.phase("rollout"):
        assert cache.resident == 32 * MIB
    assert ledger.transitions[-1].early > 3 * MIB and not ledger.transitions[-1].failed
    ledger.close()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@torch._functorch.config.patch(donated_buffer=False)  # else no backward runs twice
def test_what_was_left_is_taken_back(tmp_path: Path) -> None:
    """By the next micro-batch, by a backward that runs again, by a graph of which nobody knows what it takes."""
    cache = Watched(Arena.reserve(32 * MIB))
    ledger = ledger_of(tmp_path, cache)
    cache.limit = lambda: ledger._incoming.thread.limit
    kept = trainer(memplan_backend, ledger.budget_for("train", own=()), options={"inner": "eager"})
    loss = kept[2]
    loss(ROWS).backward()
    seen = list[int]()
    real = ledger._incoming.passed

    def passed(step: str, mark: int) -> None:
        if mark == 0:
            real(step, mark)
            seen.append(cache.resident)
        else:
            real(step, mark)

    ledger._incoming.passed = passed  # type: ignore[method-assign]
    with ledger.phase("train"):
        ledger.prefetch("rollout")
        for _ in range(2):
            value = loss(ROWS)
            assert cache.resident == 0  # while it was computed
            value.backward()
            wait(ledger)
            assert cache.resident > 3 * MIB
        value = loss(ROWS)
        value.backward(retain_graph=True)
        wait(ledger)
        assert cache.resident > 3 * MIB
        value.backward()
        first = ledger._incoming._left[0]
        assert all(n <= first for n in seen) and len(seen) == 4
        wait(ledger)
        assert cache.resident > 3 * MIB
        with torch.no_grad():
            loss(ROWS[:8])
        assert cache.resident == 0
    with ledger.phase("rollout"):
        assert cache.resident == 32 * MIB
    ledger.close()


HOW = [
    "two graphs",
    "no optimizer",
    "never asked",
    "another's backward",
    "another inside",
    "another optimizer",
    "more parameters",
]


@pytest.mark.parametrize("how", [*HOW, "goes on"])
def test_what_is_not_known_leaves_nothing(how: str, tmp_path: Path) -> None:
    cache = Watched(Arena.reserve(32 * MIB))
    ledger = ledger_of(tmp_path, cache)
    budget = ledger.budget_for("train", own=())
    net, optimizer, loss = trainer(memplan_backend, budget, options={"inner": "eager"})
    if how == "two graphs":

        def broken(x: torch.Tensor) -> torch.Tensor:
            x = first(x)
            torch._dynamo.graph_break()
            return second(x).square().mean()

        first, second = net[:6], net[6:]

        loss = torch.compile(broken, backend=memplan_backend, options={"budget": budget, "inner": "eager"})
    if how == "another optimizer":
        there = Theirs(net.parameters(), {})
        assert there.param_groups
    if how == "more parameters":
        optimizer.add_param_group({"params": [nn.Parameter(ROWS[:2].clone())]})
    if how == "no optimizer":
        del optimizer
        gc.collect()
    options = {"budget": budget, "inner": "eager"}
    other = torch.compile(lambda x: net(x).square().sum(), backend=memplan_backend, options=options)
    cache.limit = lambda: 10**12
    for _ in range(3):
        with ledger.phase("train"):
            if how != "never asked":
                ledger.prefetch("rollout")
            value = loss(ROWS.clone().requires_grad_().mul(1) if how == "goes on" else ROWS)
            if how == "another's backward":
                other(ROWS[:64])  # which has told last
            if how == "another inside":
                other(ROWS[:64]).backward()  # while what this one has kept is there
                wait(ledger)
            value.backward()
            time.sleep(0.02)
            assert cache.resident == 0 and not cache.most
    with ledger.phase("rollout"):
        assert cache.resident == 32 * MIB and ledger.transitions[-1].early == 0
    ledger.close()


class Theirs(torch.optim.Optimizer):
    """Nobody knows what its step takes."""


def test_what_is_on_the_device_though_nobody_said_so_is_room_no_more(tmp_path: Path) -> None:
    """As what malloc has not given back, and what runs beside the step."""
    cache = ArenaTenant(Arena.reserve(32 * MIB))
    taken = [0]
    ledger = Ledger(BUDGET, measure=lambda: cache.resident + taken[0], tolerance="1GB", folder=tmp_path)
    ledger.lease("kv_cache", cache, 32 * MIB, ("rollout",))
    kept = trainer(memplan_backend, ledger.budget_for("train", own=()), options={"inner": "eager"})
    with ledger.phase("train"):
        ledger.prefetch("rollout")
        taken[0] = 30 * MIB
        kept[2](ROWS).backward()
        time.sleep(0.1)
        assert 8 * MIB <= cache.resident <= BUDGET - taken[0]
        taken[0] = 22 * MIB
        time.sleep(0.1)
        there = cache.resident
        assert 16 * MIB <= there <= BUDGET - taken[0]
    with ledger.phase("rollout"):
        assert cache.resident == 32 * MIB and ledger.transitions[-1].early == there
    ledger.close()


def test_planning_has_the_memory_to_itself(tmp_path: Path) -> None:
    cache = Watched(Arena.reserve(32 * MIB))
    ledger = ledger_of(tmp_path, cache)
    cache.limit = lambda: ledger._incoming.thread.limit
    kept = trainer(memplan_backend, ledger.budget_for("train", own=()), options={"inner": "eager"})
    net, loss = kept[0], kept[2]
    seen = list[int]()

    def policy(step: memplan.Step, budget: Budget, machine: memplan.Machine) -> dict[int, memplan.Keep]:
        seen.append(ledger._incoming.thread.there)
        return {}

    second = torch.compile(
        lambda x: net[:5](x).square().sum(),
        backend=memplan_backend,
        options={"budget": ledger.budget_for("train", own=()), "inner": "eager", "policy": policy},
    )
    with ledger.phase("train"):
        ledger.prefetch("rollout")
        loss(ROWS).backward()
        wait(ledger)
        assert cache.resident > 3 * MIB
        second(ROWS[:64]).backward()
    assert seen and set(seen) == {0}
    ledger.close()


def test_outside_of_a_phase_nothing_can_come(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, ArenaTenant(Arena.reserve(32 * MIB)))
    with pytest.raises(MemplanError, match="what 'rollout' needs can come early inside of another phase only"):
        ledger.prefetch("rollout")
    with ledger.phase("train"), pytest.raises(MemplanError, match=r"no phase 'rolout'.*did you mean 'rollout'"):
        ledger.prefetch("rolout")  # type: ignore[arg-type]
    ledger.close()


def test_pages_that_do_not_come_are_brought_by_the_transition(tmp_path: Path) -> None:
    class Failing(ArenaTenant):
        def prefetch(self, size: int) -> None:
            super().prefetch(size)
            if size > 2 * MIB:
                raise RuntimeError("boom")

    cache = Failing(Arena.reserve(32 * MIB))
    ledger = ledger_of(tmp_path, cache)
    _, _, loss = trainer(memplan_backend, ledger.budget_for("train", own=()), options={"inner": "eager"})
    with ledger.phase("train"):
        ledger.prefetch("rollout")
        loss(ROWS).backward()
        wait(ledger)
        assert ledger._incoming.thread.failed == "RuntimeError: boom"
    with ledger.phase("rollout"):
        assert cache.resident == 32 * MIB
    ledger.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_who_waits_is_answered_whatever_the_thread_is_hit_by(error: type[BaseException]) -> None:
    """While it brings, of which nobody knows until `settle`, and while it takes away, for which somebody waits."""

    class Hit:
        def __init__(self) -> None:
            self.sizes, self.at = list[int](), -1

        def prefetch(self, size: int) -> None:
            self.sizes.append(size)
            if size == self.at:
                raise error("boom")

    tenant = Hit()
    incoming = Incoming(lambda: BUDGET)
    incoming.want([(tenant, 32 * MIB)])
    thread = incoming.thread._thread
    tenant.at = 16 * MIB
    incoming.begun("step", (32 * MIB,))
    incoming.passed("step", 0)
    while 16 * MIB not in tenant.sizes:
        time.sleep(0.001)
    assert incoming.settle() == 16 * MIB  # at most: a piece may be half there
    assert incoming.thread.failed == "" and max(tenant.sizes) == 16 * MIB

    tenant.at = 0
    with pytest.raises(MemplanError, match=f"memory that came early does not leave: {error.__name__}: boom"):
        incoming.want([(tenant, 32 * MIB)])
    tenant.at = -1
    incoming.want([(tenant, 32 * MIB)])
    assert incoming.thread._thread is thread and thread is not None and thread.is_alive()
