"""What the next phase needs, brought in while a step of this one still runs, as that leaves room.

In: tenants that are away, and what a running step says that it leaves (room.py). Out: as much of them on the device as
is left, by a thread of its own, a piece at a time. Where a step takes back what it has left, as the next of several
does, the pages leave again before it goes on.
What must hold: there is never more of them on the device than the step has left, and nothing comes that the device has
no room for; after `settle` nothing comes or goes by itself. What is there is pages alone: only `restore` makes it good,
and it may be called whatever is there.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from memplan.errors import MemplanError

PIECE = 8 * 2**20  # bytes between two looks at what is left
PAUSE = 0.02  # seconds until a device that had no room is looked at again

log = logging.getLogger("torch.memplan")


@runtime_checkable
class Early(Protocol):
    """A tenant that can have a part of its memory on the device while it is away."""

    def prefetch(self, size: int) -> None:
        """While it is away, have its first `size` bytes on the device, whole chunks, and no more. Else do nothing."""


class Incoming:
    """A listener of room.py. It holds no locks, which an interrupt could leave locked: all that comes and goes does so
    in a thread, which does what it is asked in order and answers.
    """

    def __init__(self, spare: Callable[[], int]) -> None:
        self.wants, self._limit = False, 0
        self._step, self._left = "", tuple[int, ...]()
        self._steps = set[str]()  # that have run since things are wanted
        self.thread = _Thread(spare)
        weakref.finalize(self, self.thread.asked.put, None)

    def want(self, tenants: Sequence[tuple[Early, int]]) -> None:
        """From now on these shall come, so many bytes of each at most, in this order. What is there of them leaves."""
        self.wants, self._step = True, ""  # a step that runs by now has not told
        self._steps.clear()
        self._ask(0, tenants)

    def settle(self) -> int:
        """Leave what is there as it is, and want nothing more. Returns the bytes that have come."""
        came = self._ask(0, ()) if self.wants else 0
        self.wants, self._step = False, ""
        return came

    def begun(self, step: str, left: Sequence[int]) -> None:
        self._steps |= {step} if step else set()
        alone = len(self._steps) == 1  # else what one leaves may be what the other needs
        if self.wants and len(self._steps) > 1:
            log.info("nothing comes early: %d compiled steps have run since it was asked for", len(self._steps))
        self._step, self._left = step, tuple(left) if alone else ()
        self._allow(0)

    def passed(self, step: str, mark: int) -> None:
        self._allow(self._left[mark] if step == self._step and mark < len(self._left) else 0)

    def _allow(self, size: int) -> None:
        if size < self._limit:
            self._ask(size)
        elif size > self._limit and self.wants:  # nobody waits for what comes
            self._limit = size
            self.thread.ask(_Asked(size))

    def _ask(self, limit: int, tenants: Sequence[tuple[Early, int]] | None = None) -> int:
        """Ask and wait for the answer."""
        asked = _Asked(limit, tenants)
        self.thread.ask(asked)
        answer = asked.answer.get()
        self._limit = limit  # not before: who is interrupted asks again
        if isinstance(answer, BaseException):
            why = f"{type(answer).__name__}: {answer}"
            raise MemplanError(f"memory that came early does not leave: {why}") from answer
        return answer


@dataclass(frozen=True)
class _Asked:
    """Have no more than `limit` bytes of the tenants; None: of those that were wanted last. The answer: the bytes that
    were there, or why it cannot be.
    """

    limit: int
    tenants: Sequence[tuple[Early, int]] | None = None
    answer: queue.SimpleQueue[int | BaseException] = field(default_factory=queue.SimpleQueue)


class _Thread:
    """Does what it is asked, and meanwhile brings in what is missing, where the device has room: what a step has freed
    may not have left it. It does not keep Incoming alive. Whatever it is hit by, it answers: somebody waits.
    """

    def __init__(self, spare: Callable[[], int]) -> None:
        self._spare = spare
        self.asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()  # None: end
        self.failed = ""  # why no more came
        self.there = self.limit = 0
        self._tenants: Sequence[tuple[Early, int]] = ()
        self._thread: threading.Thread | None = None

    def ask(self, asked: _Asked) -> None:
        self.asked.put(asked)
        if self._thread is None or not self._thread.is_alive():  # as after a fork
            self._thread = threading.Thread(target=self._run, name="memplan early", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                asked = self.asked.get(timeout=None if self.there >= self.limit else self._bring())
                if asked is None:
                    return
                asked.answer.put(self._done(asked))
            except queue.Empty:
                pass

    def _bring(self) -> float:
        """Another piece, if there is room. Returns how long to wait before the next, in seconds."""
        size = min(self.there + PIECE, self.limit)
        try:
            if self._spare() < size - self.there:
                return PAUSE
            self._have(size)
        except BaseException as error:
            self.failed, self.limit = f"{type(error).__name__}: {error}", self.there
            log.warning("no more comes early: %s", self.failed)
        return 0.0

    def _done(self, asked: _Asked) -> int | BaseException:
        came = self.there
        if asked.tenants is not None:
            self._tenants, self.failed = asked.tenants, ""
            self.there = self._most  # of which nobody knows how much
        self.limit = 0 if self.failed else min(asked.limit, self._most)
        try:
            if self.there > self.limit:
                self._have(self.limit)
        except BaseException as error:
            return error
        return came

    @property
    def _most(self) -> int:
        return sum(most for _, most in self._tenants)

    def _have(self, size: int) -> None:
        """So many bytes, the first tenants' first."""
        self.there = max(size, self.there)  # it may fail half-way
        left = size
        for tenant, most in self._tenants:
            tenant.prefetch(min(left, most))
            left -= min(left, most)
        self.there = size
