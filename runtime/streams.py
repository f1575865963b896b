"""Copy engines: one for each direction between a device and the memory below it, each copy after the other.

In: a tensor and the one to copy it to, without gaps both. Out: nothing is waited for until `landed`. Beside
a CPU the engine is a thread that moves bytes, beside a CUDA device a stream of its own. The source must stay as it is,
and the destination untouched, until `landed`: the plan sees to both. `waited` counts what the device waited: on CUDA
waiting is the compute stream's, which no host clock sees.
"""

from __future__ import annotations

import ctypes
import functools
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Engine(Protocol):
    """Copies of one direction."""

    def copy(self, source: torch.Tensor, to: torch.Tensor) -> None:
        """Start a copy."""

    def landed(self, to: torch.Tensor) -> None:
        """Wait for the copy to `to`."""


@dataclass
class Waited:
    """How often a copy was not done when it was needed, and for how long in all."""

    times: int = 0
    seconds: float = 0.0


@dataclass
class ThreadEngine:
    """A thread that moves bytes while Python and torch go on."""

    waited: Waited = field(default_factory=Waited)
    pending: dict[int, threading.Event] = field(default_factory=dict)  # by address of the destination
    jobs: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    thread: threading.Thread | None = None

    def copy(self, source: torch.Tensor, to: torch.Tensor) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="memplan copies", daemon=True)
            self.thread.start()
        self.pending[to.data_ptr()] = done = threading.Event()
        self.jobs.put([source, to, done])

    def landed(self, to: torch.Tensor) -> None:
        done = self.pending.pop(to.data_ptr())
        if not done.is_set():
            start = time.perf_counter()
            done.wait()
            self.waited.times += 1
            self.waited.seconds += time.perf_counter() - start

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            done = job[2]
            _move(*job[:2])
            job.clear()  # so that whoever waits is the last to hold either tensor, and frees it when the plan says
            done.set()


def _move(source: torch.Tensor, to: torch.Tensor) -> None:
    """Copy while Python's lock is free."""
    if source.stride() == to.stride():
        ctypes.memmove(to.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        with torch.no_grad():
            to.copy_(source)


@dataclass
class StreamEngine:
    """A CUDA stream. A copy starts when the compute stream gets to it; memory is the caching allocator's, of the
    compute stream, which waits for the copy before it is freed.
    """

    device: torch.device
    waited: Waited = field(default_factory=Waited)
    pending: dict[int, torch.cuda.Event] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def copy(self, source: torch.Tensor, to: torch.Tensor) -> None:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            self.pending[to.data_ptr()] = self.stream.record_event()

    def landed(self, to: torch.Tensor) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.pending.pop(to.data_ptr()))


@functools.cache
def engine(device: torch.device, direction: str) -> Engine:
    """The process's engine of a device for copies "out" or "back"."""
    return StreamEngine(device) if device.type == "cuda" else ThreadEngine()
