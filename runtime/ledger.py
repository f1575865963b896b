"""One budget for a device, and who has how much of it in which phase of RL: rollout, score or train.

    ledger = Ledger("24GB")
    ledger.lease("kv_cache", cache, "8GB", phases=("rollout",))
    ledger.lease("optimizer", states, "6GB", phases=("train",))
    with ledger.phase("rollout"): ...

In: tenants that can leave the device and come back, and the phases that need them. Out: in a phase those that it needs
are on the device, and no others. Each phase's room is reserved when its leases are made. A transition releases,
confirms on the device that the memory is free, and only then brings in what the phase needs; where anything fails, what
was there before is brought back.
What must hold, whatever fails or is interrupted and wherever: what is on the device stays inside the budget, and the
next phase works. So what a lease is about to become is written down before its tenant is called: one that was left
half-way counts whole until a later transition has finished it.
Bytes on the device are what `measure` says, above what it said beside the leases when the last of them was made: that
is not in the budget, as on a CPU nothing is that torch's allocator does not give. At a transition it must be what the
tenants have: what a block allocates is gone by then (gradients too), or has a lease, or is accepted.
"""

from __future__ import annotations

import contextlib
import os
import time
import typing
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from memplan import memory
from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Budget
from memplan.runtime import room
from memplan.runtime.device_lock import DeviceLock
from memplan.runtime.early import Early, Incoming
from memplan.units import human, parse_bytes

RLPhase = Literal["rollout", "score", "train"]
PHASES: tuple[RLPhase, ...] = typing.get_args(RLPhase)
State = Literal["resident", "backed up", "dropped", "between"]
Restored = Literal["nothing", "copy", "recompute"]
TOLERANCE = 64 * 2**20  # what the memory of a process varies by itself between two looks
RECORDED = 10_000  # transitions, the last ones


class Tenant(Protocol):
    """What can leave a device. `restored`: what makes its contents good when it is back: nothing (they are not
    needed), a copy, or computing them again.

    What must hold: release and restore may fail or be interrupted anywhere, and may then both be called, in any order
    and more than once; what was there before the first release is there after the last restore. There is never more of
    it on the device than its lease says.
    """

    restored: Restored

    @property
    def resident(self) -> int:
        """Bytes that it has on the device now, as the device says."""

    def release(self) -> int:
        """Leave the device. Returns the bytes that were copied for it."""

    def restore(self) -> int:
        """Come back, at the same addresses. Returns the bytes that were copied for it."""


@dataclass(frozen=True)
class Lease:
    """So many bytes of a device at most, for one tenant. `state` "between": it was left half-way, and counts whole."""

    tag: str
    bytes: int
    phases: frozenset[RLPhase]
    restored: Restored
    state: State

    @property
    def counted(self) -> int:
        return 0 if self.state in ("backed up", "dropped") else self.bytes


@dataclass(frozen=True)
class Transition:
    """What happened. `before` and `after` are phases, empty for none; `moved`, bytes that were copied, back too;
    `failed`, what did; empty: nothing; `early`, bytes that had come while the phase before still ran.
    """

    before: str
    wanted: str
    after: str
    seconds: float
    moved: int
    failed: str = ""
    early: int = 0


class Ledger:
    """The leases of one device. One process has a device's ledger at a time, and one thread a phase.

    budget: "24GB", or bytes as an int. measure: bytes in use on the device; None: of a CPU, this process's resident
    memory. tolerance: bytes by which that may differ from what tenants say they have. folder: see DeviceLock.
    """

    def __init__(
        self,
        budget: str | int,
        device: str = "cpu",
        *,
        measure: Callable[[], int] | None = None,
        tolerance: str | int = TOLERANCE,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if measure is None and device != "cpu":
            raise MemplanError(
                f"nobody says how much of {device!r} is in use: give measure, a function of no arguments"
            )
        self.budget, self.tolerance = parse_bytes(budget), parse_bytes(tolerance)
        self.device, self._measure = device, measure or memory.resident
        self.leases: dict[str, Lease] = {}
        self.transitions: deque[Transition] = deque(maxlen=RECORDED)
        self.at = ""  # the phase that all leases are as they should be for; empty: none
        self._tenants: dict[str, Tenant] = {}
        self._inside: dict[str, tuple[str, object]] = {}  # by device: the phase that a thread is in, and its visit
        self._moved = 0
        there = weakref.ref(self)
        self._incoming = Incoming(lambda: 0 if (ledger := there()) is None else ledger.spare)
        self._listener = room.listen(self._incoming)
        self._lock = DeviceLock(device, folder)
        self._beside = self._measure()

    def __str__(self) -> str:
        """For people: what is where now."""
        inside = self._inside.get(self.device)
        at = f"in phase {inside[0]}" if inside else f"set up for phase {self.at}" if self.at else "no phase is set up"
        width = max(map(len, self.leases), default=0)
        lines = [f"ledger of {human(self.budget)} on {self.device}, {human(self.spare)} free; {at}"]
        for lease in self.leases.values():
            phases = ", ".join(phase for phase in PHASES if phase in lease.phases)
            lines.append(f"  {lease.tag:{width}}  {human(lease.bytes):>10}  {lease.state:9}  {phases}")
        return "\n".join(lines)

    def close(self) -> None:
        """Let another process have the device."""
        self._incoming.settle()
        self._lock.close()

    # ---- leases

    def lease(self, tag: str, tenant: Tenant, size: str | int, phases: Iterable[RLPhase]) -> Lease:
        """Bytes for a tenant, in some phases. Raises MemplanError, and nothing is leased, where they are not there.

        What is on the device by now and belongs to no tenant is taken to stay. Tenants leave, and come back, in the
        order of their leases: one that is computed again from others comes after them.
        """
        for inside, _ in self._inside.values():
            raise MemplanError(f"{tag!r} cannot be leased inside phase {inside!r}: make leases between phases")
        if tag in self.leases:
            raise MemplanError(f"{tag!r} has a lease already, of {human(self.leases[tag].bytes)}: end it first")
        wanted = frozenset(_known(phase) for phase in ((phases,) if isinstance(phases, str) else phases))
        if not wanted:
            raise MemplanError(f"no phase needs {tag!r}: name some of {', '.join(PHASES)}")
        self._incoming.settle()
        there = tenant.resident
        made = Lease(tag, parse_bytes(size), wanted, tenant.restored, "resident" if there else "dropped")
        if there > made.bytes:
            raise MemplanError(f"{tag!r} has {human(there)} on the device, more than its lease of {human(made.bytes)}")
        self._check_budget(made)
        room = self.budget - sum(lease.counted for lease in self.leases.values())
        if there and made.bytes > room:
            raise MemplanError(
                f"{tag!r} is on the device, and its {human(made.bytes)} have no room beside the leases that are there, "
                f"{human(room)}: release it first, or enter a phase that leaves more"
            )
        self._tenants[tag] = tenant
        self.leases[tag] = made
        self._beside = self._measure() - sum(self._reported().values())
        self.at = ""
        return made

    def tenant(self, tag: str) -> Tenant | None:
        """Who has a lease of that tag."""
        return self._tenants.get(tag)

    def end(self, tag: str) -> None:
        """Forget a lease, as of an engine that died. What its tenant still has is then nobody's: see `accept`."""
        if tag not in self.leases:
            raise MemplanError(f"no lease {tag!r}: there are {sorted(self.leases)}{did_you_mean(tag, self.leases)}")
        self._incoming.settle()
        del self.leases[tag]
        del self._tenants[tag]

    def accept(self) -> None:
        """Take what is on the device as it is: what belongs to no tenant stays, and what a tenant has that should have
        left is released again by the next transition.
        """
        self._incoming.settle()
        reported = self._reported()
        for tag, lease in self.leases.items():
            if reported[tag] > lease.counted:
                self.leases[tag] = replace(lease, state="between")
        self._beside = self._measure() - sum(reported.values())

    def needed(self, phase: RLPhase) -> dict[str, int]:
        """Bytes by tag of what a phase needs."""
        return {lease.tag: lease.bytes for lease in self.leases.values() if _known(phase) in lease.phases}

    def budget_for(self, phase: RLPhase, own: Iterable[str]) -> Budget:
        """The budget of a step that runs in a phase: all of the ledger's, less what else the phase needs.

        own: tags of what the plan of the step counts itself: its parameters, gradients and optimizer states, the memory
        that it runs in. For option `budget`; timelines show the rest as held by others.
        """
        needed, counted = self.needed(phase), set((own,) if isinstance(own, str) else own)
        if unknown := counted - set(needed):
            tag = min(unknown)
            hint = did_you_mean(tag, needed)
            raise MemplanError(f"phase {phase!r} needs no {tag!r}: own has tags of its leases, {sorted(needed)}{hint}")
        others = tuple((tag, size) for tag, size in needed.items() if tag not in counted)
        return Budget(self.budget, others=others, listener=self._listener)

    def _check_budget(self, made: Lease) -> None:
        both = [*self.leases.values(), made]
        for phases in (PHASES, *((phase,) for phase in PHASES)):
            part = [lease for lease in both if lease.phases.issuperset(phases)]
            if (needed := sum(lease.bytes for lease in part)) > self.budget:
                what = "must always be resident" if phases == PHASES else f"phase {phases[0]!r} needs"
                raise MemplanError(
                    f"budget {human(self.budget)} is smaller than what {what}, {human(needed)}: "
                    + ", ".join(f"{lease.tag} {human(lease.bytes)}" for lease in part)
                )

    # ---- phases

    @contextlib.contextmanager
    def phase(self, name: RLPhase) -> Iterator[None]:
        """Inside the block, what the phase needs is on the device, and nothing else. It stays so after the block.

        Raises MemplanError where that cannot be, and what was there before is there again, if it can be.
        """
        visit = (_known(name), object())
        try:
            try:
                first = self._inside.setdefault(self.device, visit)  # at once, for threads and for interrupts
                if first is not visit:
                    raise MemplanError(
                        f"phase {name!r} is asked for inside phase {first[0]!r}: end that one first; a device is in "
                        "one phase at a time"
                    )
                self._enter(name)
                yield
            finally:
                self._leave(visit)
        finally:
            self._leave(visit)  # again, where that was interrupted

    def prefetch(self, name: RLPhase) -> None:
        """Inside a phase, before its last step: let what phase `name` needs come early, as that step leaves room.

        A step leaves room as its backward goes on, where its budget is of `budget_for`, its optimizer is known and
        updates nothing else, and no other compiled step runs in the block from here on. What runs after it, besides
        that optimizer, takes memory that nobody has reserved: run it before.
        """
        if self.device not in self._inside:
            raise MemplanError(f"what {name!r} needs can come early inside of another phase only: enter that one first")
        coming = list[tuple[Early, int]]()
        for tag in self.needed(name):
            lease, tenant = self.leases[tag], self._tenants[tag]
            if lease.state != "resident" and isinstance(tenant, Early):
                self.leases[tag] = replace(lease, state="between")
                coming.append((tenant, lease.bytes))
        self._incoming.want(coming)

    @property
    def spare(self) -> int:
        """Bytes of the budget that nothing has, as the device says."""
        return self.budget - (self._measure() - self._beside)

    def _leave(self, visit: tuple[str, object]) -> None:
        if self._inside.get(self.device) is visit:
            del self._inside[self.device]

    def _enter(self, name: RLPhase) -> None:
        start, before, failed = time.perf_counter(), self.at, ""
        self._moved = early = 0
        try:
            if self._incoming.settle():
                early = sum(n for tag, n in self._reported().items() if self.leases[tag].state == "between")
            self._confirm()  # nothing has moved: there is nothing to bring back
            self._transition(name)
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
            if isinstance(error, Exception):
                kept = f"{self.at!r} is as it was" if self.at else "no phase is set up, and the next starts from there"
                raise MemplanError(f"phase {name!r} is not entered: {error}; {kept}") from error
            raise
        finally:
            seconds = time.perf_counter() - start
            self.transitions.append(Transition(before, name, self.at, seconds, self._moved, failed, early))

    def _transition(self, name: RLPhase) -> None:
        before, resident = self.at, {lease.tag for lease in self.leases.values() if lease.state == "resident"}
        self.at = ""
        try:
            self._move(set(self.needed(name)))
        except BaseException as error:
            try:
                self._move(resident)
                self.at = before
            except Exception as second:
                error.add_note(f"and what was there before is not back: {second}")
            raise
        self.at = name

    def _move(self, wanted: set[str]) -> None:
        """Make these resident, and no others, from whatever is there."""
        for lease in list(self.leases.values()):
            if lease.tag not in wanted and lease.counted:
                self._release(lease)
        self._confirm()
        for lease in list(self.leases.values()):
            if lease.tag in wanted and lease.state != "resident":
                self._restore(lease)
        self._confirm()

    def _release(self, lease: Lease) -> None:
        self.leases[lease.tag] = replace(lease, state="between")
        with _named(lease, "left"):
            self._moved += self._tenants[lease.tag].release()
            if there := self._tenants[lease.tag].resident:
                raise MemplanError(f"it says so, and {human(there)} of it are on the device")
        self.leases[lease.tag] = replace(lease, state="backed up" if lease.restored == "copy" else "dropped")

    def _restore(self, lease: Lease) -> None:
        self.leases[lease.tag] = replace(lease, state="between")
        with _named(lease, "come back"):
            self._moved += self._tenants[lease.tag].restore()
        self.leases[lease.tag] = replace(lease, state="resident")

    def _reported(self) -> dict[str, int]:
        return {tag: tenant.resident for tag, tenant in self._tenants.items()}

    def _confirm(self) -> None:
        """Compare with what tenants and the device say. Raises MemplanError, with both figures."""
        reported = self._reported()
        for tag, there in reported.items():
            lease = self.leases[tag]
            if there > lease.counted:
                raise MemplanError(
                    f"{tag!r} has {human(there)} on the device, and its lease, {lease.state}, has "
                    f"{human(lease.counted)}: was it written to after its release, or has it grown? accept() has it "
                    "released again"
                )
        total, found = sum(reported.values()), self._measure() - self._beside
        if abs(found - total) > self.tolerance:
            raise MemplanError(
                f"{self.device!r} says that {human(found)} are in use, and leases that it is {human(total)}: something "
                f"came or went behind the ledger's back; free it, or accept() it if it is to stay"
            )


def _known(phase: str) -> RLPhase:
    if phase not in PHASES:
        raise MemplanError(f"no phase {phase!r}: there are {', '.join(PHASES)}{did_you_mean(str(phase), PHASES)}")
    return phase


@contextlib.contextmanager
def _named(lease: Lease, what: str) -> Iterator[None]:
    """Errors of a tenant say whose they are."""
    try:
        yield
    except Exception as error:
        raise MemplanError(
            f"{lease.tag!r}, {human(lease.bytes)}, has not {what}: {type(error).__name__}: {error}"
        ) from error
