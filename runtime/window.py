"""Bytes that Python allocates between two graphs, measured once.

In: marks, where a graph has ended and where the next one starts. Out: for what lies between two of them, the peak
beside what was there, and what is left of it.
On the CPU the allocator's events come from torch's profiler. A process can have one, so it is given up to whatever else
needs it, and to Dynamo when that starts to compile. Started before backward, it can only be stopped after: places in
between are marked, and what starts a backward, or another profiler, is wrapped while it runs. On CUDA the caching
allocator's counters are read at each mark, and not reset.
What must hold: bytes are never too few. Frees of what was there when the session began are not seen on the CPU; a peak
on CUDA that is below an earlier one is not known, and what is left stands for it; what another plan may keep makes no
room where it is freed, or counts as if it did not, on CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

from memplan.runtime.allocator import AllocatorLog, Event, gives_way, interrupt, may_start

# What ends a session: after a backward, and before another profiler starts.
_PLACES = (
    (torch.autograd, "backward", True),
    (torch.autograd, "grad", True),
    (torch.profiler.profile, "start", False),
    (torch.autograd.profiler.profile, "__enter__", False),
)


def in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class Session:
    """Measures from its start to `end`. `taken`: for each mark, address -> bytes of what is counted elsewhere."""

    def __init__(self) -> None:
        self.taken: list[Mapping[int, int]] = []
        self.counters: list[tuple[int, int]] = []  # CUDA: allocated and its maximum, at each mark
        self.events: list[Event] = []
        self.log: AllocatorLog | None = None
        interrupt()
        self.cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if not self.cuda and not torch._C._autograd._profiler_enabled() and may_start():
            self.log = AllocatorLog()
        self.thread = threading.get_ident()  # a profile can only be stopped where it was started
        self.patches = [self._wrapped(*place) for place in _PLACES]
        callback_handler.register_start_callback(self.end)
        gives_way.append(self.end)

    @property
    def open(self) -> bool:
        return self.end in gives_way

    def mark(self, taken: Mapping[int, int]) -> int:
        """The number of a new mark."""
        self.taken.append(taken)
        if self.cuda:
            self.counters.append((torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
        elif self.log is not None:
            self.log.mark()
        return len(self.taken) - 1

    def end(self, _: Any = None) -> None:
        """Stop measuring, if that has not been done; not inside a backward, and not from another thread."""
        if not self.open or in_backward() or threading.get_ident() != self.thread:
            return
        self.mark({})
        for owner, name, original, ours in self.patches:
            if vars(owner)[name] is ours:  # and not what somebody has put over it
                setattr(owner, name, original)
        gives_way.remove(self.end)
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() has removed it
            callback_handler.remove_start_callback(self.end)
        if self.log is not None:
            self.events, self.log = self.log.stop(), None

    def _wrapped(self, owner: Any, name: str, after: bool) -> tuple[Any, str, Any, Any]:
        """Put a function that ends the session in the place of one, and say what is where."""
        original = vars(owner)[name]

        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self.end()
            try:
                return original(*args, **kwargs)
            finally:
                self.end()

        setattr(owner, name, ours)
        return owner, name, original, ours

    def between(self, start: int, stop: int, stays: Mapping[int, int]) -> tuple[int, int]:
        """The peak between two marks, and what is left at the second. `stays`: address -> bytes of what makes no room
        where it is freed. The session must have ended.
        """
        taken = self.taken[stop]
        if self.cuda:
            (before, highest), (after, risen) = self.counters[start], self.counters[stop]
            left = max(0, after - before)
            peak = risen - before if risen > highest else left
            return peak + sum(stays.values()), max(0, left - sum(taken.values()))
        alive: dict[int, tuple[int, bool]] = {}  # address -> bytes, and whether it is new
        total = peak = 0
        inside = False
        for event in self.events:
            inside = event.mark == start or (inside and event.mark != stop)
            size, new = alive.pop(event.address, (0, False))
            total -= size if new or not inside or event.address not in stays else 0
            if event.bytes > 0:
                alive[event.address] = event.bytes, inside
                total += event.bytes
            if event.mark == start:
                before = total
            if event.mark == stop:
                break
            peak = max(peak, total - before) if inside else peak
        return peak, sum(size for address, (size, new) in alive.items() if new and address not in taken)


@dataclass
class Span:
    """What lies between two marks of a session. `stays`: address -> bytes of what makes no room where it is freed."""

    session: Session
    start: int
    stays: Mapping[int, int] = field(default_factory=dict)
    stop: int | None = None

    @staticmethod
    def opened(session: Session, stays: Mapping[int, int] | None = None) -> Span:
        return Span(session, session.mark({}), stays or {})

    def close(self, taken: Mapping[int, int]) -> None:
        """It ends here, where it has not ended and its session is still open."""
        if self.stop is None and self.session.open:
            self.stop = self.session.mark(taken)

    @property
    def whole(self) -> bool:
        """Whether it was measured up to its end."""
        return self.stop is not None and (self.session.cuda or bool(self.session.events))

    def measured(self) -> tuple[int, int]:
        """Its peak and what is left. The session must have ended."""
        last = len(self.session.taken) - 1
        return self.session.between(self.start, last if self.stop is None else self.stop, self.stays)
