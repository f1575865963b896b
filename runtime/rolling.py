"""A recording of a long run that keeps its last seconds: all of it would take ever more memory.

In: a device. Out: the Recording since the last start. It starts anew after a backward, where SECONDS have passed; a
loop that never calls backward is recorded as a whole. It gives way to whoever else needs the profiler (recordings,
plans that are being made, Dynamo), and is back after the next backward, or, where it had to stop inside of something,
the one after that: what it made way for may not have been able to start either.
What must hold: a profile is stopped only in the thread that started it, and not inside of a backward. It is not
started inside of Dynamo, whose frames torch's profiler cannot follow (torch 2.13, Python 3.11: the heap is corrupted),
nor inside of what an earlier one may have seen the beginning of (allocator.py): a record_function, or what Dynamo made.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.callback import callback_handler
from torch.autograd.profiler import record_function

from memplan.errors import MemplanError
from memplan.runtime.allocator import gives_way, still_open
from memplan.runtime.recorder import Recording, record
from memplan.runtime.window import in_backward

SECONDS = 5.0  # of recording, after which the end of a backward starts it anew


class Rolling:
    """A recording that is started anew from time to time, and gives way to whoever else needs the profiler."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.thread = threading.get_ident()  # a profile can only be stopped where it was started
        self.running = contextlib.ExitStack()
        self.seen: Recording | None = None
        self.closed = False
        self.scopes = 0  # record_functions that have begun, and not ended
        self.cut = False  # it was stopped inside of something that may still run
        still_open.append(self._runs_on)
        self._start()

    def _start(self) -> None:
        self.seen = self.running.enter_context(record(self.device, lines=True))
        self.running.callback(gives_way.remove, self.give_way)
        gives_way.append(self.give_way)
        self.since = time.monotonic()

    def turn(self, _: Any = None) -> None:
        """Start anew, if that is due and possible."""
        if self.closed or in_backward() or threading.get_ident() != self.thread:
            return
        if self._inside() and (self.cut or self.seen is not None):
            return
        if self.cut:
            self.cut = False
        elif self.seen is None or time.monotonic() - self.since > SECONDS:
            self.give_way()
            with contextlib.suppress(MemplanError):  # somebody else's profiler: the next turn tries again
                self._start()

    def give_way(self, _: Any = None) -> None:
        """Stop recording, up to the next turn; what was seen is dropped."""
        if not in_backward() and threading.get_ident() == self.thread:
            self.cut = self.cut or (self.seen is not None and self._inside())
            self.running.close()
            self.seen = None

    def close(self) -> Recording | None:
        """Stop for good. Returns what was seen since the last start."""
        self.closed = True
        still_open.remove(self._runs_on)
        self.running.close()
        return self.seen

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While this is open, the turns happen."""
        with (
            _after_backward(self.turn),
            _around_compiling(self.give_way, self._turn_when_called),
            _around_scopes(self._scope),
        ):
            yield

    def _runs_on(self) -> bool:
        """Whether something runs that the last recording saw the beginning of."""
        return self.cut and self._inside()

    def _inside(self) -> bool:
        """Whether something runs now that a profiler writes down at its end."""
        return self.scopes > 0 or _in_compiled()

    def _scope(self, change: int) -> None:
        if threading.get_ident() == self.thread:
            self.scopes += change

    def _turn_when_called(self, _: Any = None) -> None:
        """Turn where Python first calls something outside of Dynamo: what it has just compiled, as a rule."""
        if threading.get_ident() == self.thread and sys.getprofile() is None:
            sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and convert_frame.__file__ not in _files(frame):
            sys.setprofile(None)  # the profiler takes its place
            self.turn()


def _files(frame: FrameType | None) -> Iterator[str]:
    """Of the functions that are being called, the innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def _in_compiled() -> bool:
    """Whether what Dynamo has compiled is running: it is called by Dynamo, and not of Dynamo."""
    dynamo = str(Path(eval_frame.__file__).parent)
    files = list(_files(sys._getframe()))
    return any(b == eval_frame.__file__ and not a.startswith(dynamo) for a, b in itertools.pairwise(files))


@contextlib.contextmanager
def _around_scopes(change: Callable[[int], None]) -> Iterator[None]:
    """Call a function with 1 where a record_function begins, and -1 where one of these ends."""
    scope: Any = record_function
    begins, ends, begun = scope.__enter__, scope.__exit__, weakref.WeakSet[Any]()

    def enter(self: Any) -> Any:
        made = begins(self)
        begun.add(self)
        change(1)
        return made

    def leave(self: Any, *error: Any) -> None:
        ends(self, *error)
        if self in begun:
            begun.remove(self)
            change(-1)

    scope.__enter__, scope.__exit__ = enter, leave
    try:
        yield
    finally:
        scope.__enter__, scope.__exit__ = begins, ends


@contextlib.contextmanager
def _after_backward(do: Any) -> Iterator[None]:
    """Call a function after each torch.autograd.backward, which Tensor.backward calls too."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        do()

    torch.autograd.backward = ours
    try:
        yield
    finally:
        if torch.autograd.backward is ours:  # and not what somebody has put over it
            torch.autograd.backward = original


@contextlib.contextmanager
def _around_compiling(before: Any, after: Any) -> Iterator[None]:
    """Call functions where Dynamo starts and ends to compile: it makes far more Python calls than any step."""
    callback_handler.register_start_callback(before)
    callback_handler.register_end_callback(after)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() has removed them
            callback_handler.remove_start_callback(before)
            callback_handler.remove_end_callback(after)
