"""A recording of a long run that keeps its last seconds: all of it would take ever more memory.

In: a device. Out: the Recording since the last start. It starts anew after a backward, where SECONDS have passed; a
loop that never calls backward is recorded as a whole. It gives way to whoever else needs the profiler (recordings,
plans that are being made, Dynamo), and is back after the next backward.
What must hold: a profile is stopped only in the thread that started it, and not inside of a backward; and it is not
started inside of Dynamo, whose frames torch's profiler cannot follow (torch 2.13, Python 3.11: the heap is corrupted).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch._dynamo import convert_frame
from torch._dynamo.callback import callback_handler

from memplan.errors import MemplanError
from memplan.runtime.allocator import gives_way
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
        if self.seen is None or time.monotonic() - self.since > SECONDS:
            self.give_way()
            with contextlib.suppress(MemplanError):  # somebody else's profiler: the next turn tries again
                self._start()

    def give_way(self, _: Any = None) -> None:
        """Stop recording, up to the next turn; what was seen is dropped."""
        if not in_backward() and threading.get_ident() == self.thread:
            self.running.close()
            self.seen = None

    def close(self) -> Recording | None:
        """Stop for good. Returns what was seen since the last start."""
        self.closed = True
        self.running.close()
        return self.seen

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """While this is open, the turns happen."""
        with _after_backward(self.turn), _around_compiling(self.give_way, self._turn_when_called):
            yield

    def _turn_when_called(self, _: Any = None) -> None:
        """Turn where Python first calls something outside of Dynamo: what it has just compiled, as a rule."""
        if threading.get_ident() == self.thread and sys.getprofile() is None:
            sys.setprofile(self._called)

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not _in_dynamo(frame):
            sys.setprofile(None)  # the profiler takes its place
            self.turn()


def _in_dynamo(frame: FrameType | None) -> bool:
    """Whether Dynamo, which compiles the frames that it calls about, is among the callers."""
    while frame is not None and frame.f_code.co_filename != convert_frame.__file__:
        frame = frame.f_back
    return frame is not None


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
