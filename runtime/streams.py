"""Copy engines: one for each direction between a device and the memory below it, each copy after the other.

In: a tensor, and one without gaps to copy it to. Out: a Copy under way, which hands its tensor over once it is done.
Beside a CPU the engine is a thread that moves bytes, beside a CUDA device a stream of its own. The source must stay as
it is until then: the plan sees to that. `waited` counts what the device waited: on CUDA waiting is the compute
stream's, which no host clock sees. A forked process has engines of its own, as it has no threads of its parent's.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import torch


class Copy(Protocol):
    """A copy under way."""

    def landed(self) -> torch.Tensor:
        """What was copied to; the device waits until it is there."""

    def abandon(self) -> None:
        """Nobody will ask for it: what it copies to may go once it is done."""


class Engine(Protocol):
    """Copies of one direction."""

    def start(self, source: torch.Tensor, to: torch.Tensor) -> Copy:
        """Start a copy."""


@dataclass
class Waited:
    """How often a copy was not done when it was needed, and for how long in all."""

    times: int = 0
    seconds: float = 0.0


@dataclass(eq=False)
class ThreadCopy:
    """`source` is there until the copy is done, `to` until it is handed over: then nothing here holds either."""

    source: torch.Tensor | None
    to: torch.Tensor | None
    waited: Waited
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def landed(self) -> torch.Tensor:
        if not self.done.is_set():
            start = time.perf_counter()
            self.done.wait()
            self.waited.times += 1
            self.waited.seconds += time.perf_counter() - start
        if self.error is not None:
            raise self.error
        to, self.to = self.to, None
        assert to is not None
        return to

    def abandon(self) -> None:
        """The thread holds both until it is done."""

    def run(self) -> None:
        assert self.source is not None and self.to is not None
        try:
            _move(self.source, self.to)
        except BaseException as error:
            self.error = error
        finally:
            self.source = None
            self.done.set()


@dataclass
class ThreadEngine:
    """A thread that moves bytes while Python and torch go on."""

    waited: Waited = field(default_factory=Waited)
    jobs: queue.SimpleQueue[ThreadCopy] = field(default_factory=queue.SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def start(self, source: torch.Tensor, to: torch.Tensor) -> Copy:
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="memplan copies", daemon=True)
                self.thread.start()
        copy = ThreadCopy(source, to, self.waited)
        self.jobs.put(copy)
        return copy

    def _work(self) -> None:
        while True:
            self.jobs.get().run()


def _move(source: torch.Tensor, to: torch.Tensor) -> None:
    """Copy while Python's lock is free."""
    if source.stride() == to.stride():  # then the source has no gaps either
        ctypes.memmove(to.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        with torch.no_grad():
            to.copy_(source)


@dataclass(eq=False)
class StreamCopy:
    """A copy on a stream; `event` is after it."""

    to: torch.Tensor
    device: torch.device
    stream: torch.cuda.Stream
    event: torch.cuda.Event

    def landed(self) -> torch.Tensor:
        torch.cuda.current_stream(self.device).wait_event(self.event)
        return self.to

    def abandon(self) -> None:
        if self.to.is_cuda:  # or the allocator would hand it out while it is being written
            self.to.record_stream(self.stream)
        else:
            self.event.synchronize()


@dataclass
class StreamEngine:
    """A CUDA stream. A copy starts when the compute stream gets to it; memory is the caching allocator's, of the
    compute stream, which waits for the copy before it is freed.
    """

    device: torch.device
    waited: Waited = field(default_factory=Waited)
    stream: torch.cuda.Stream | None = None

    def start(self, source: torch.Tensor, to: torch.Tensor) -> Copy:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return StreamCopy(to, self.device, self.stream, self.stream.record_event())


@functools.cache
def engine(device: torch.device, direction: str) -> Engine:
    """The process's engine of a device for copies "out" or "back"."""
    if device.type == "cuda":
        return StreamEngine(device)
    return ThreadEngine()


os.register_at_fork(after_in_child=engine.cache_clear)
