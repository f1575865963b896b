"""Copies between a device and the memory below it: the host's, both ways, pinned and not; and the disk.

In: a Clock. Out: pairs of what and B/s. Copies are made by the engines that a planned step uses (runtime/streams.py).
On a CPU, whose memory is the host's, they are a thread's memmove, and nothing is pinned.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from memplan.calibrate.clock import Clock
from memplan.calibrate.rates import pointwise
from memplan.runtime.streams import Copy, Engine, engine

BYTES = (2**26, 2**29)  # copied at a time, on a CPU and on CUDA
ON_DISK = (2**26, 2**30)
OPS = 4  # times as long as a copy, beside which it is timed


def copies(clock: Clock) -> Iterator[tuple[str, float]]:
    """B/s off the device and back; "pageable": from and to memory that is not pinned."""
    on_device = torch.ones(clock.size(*BYTES), dtype=torch.uint8, device=clock.device)
    for pinned in (True, False) if clock.cuda else (False,):
        below = torch.ones(on_device.shape, dtype=torch.uint8, pin_memory=pinned)
        for direction, source, to in (("out", on_device, below), ("back", below, on_device)):
            seconds = clock.seconds(functools.partial(_copied, engine(clock.device, direction), source, to))
            yield direction + (", pageable" if clock.cuda and not pinned else ""), on_device.nbytes / seconds


def _copied(mover: Engine, source: torch.Tensor, to: torch.Tensor) -> None:
    """The device waits for it: so the clock sees the copy."""
    mover.start(source, to).landed()


def contention(clock: Clock) -> Iterator[tuple[str, float]]:
    """Of the bytes of a copy, how many compete with ops for memory: what the ops read and write less beside it."""
    on_device = torch.ones(clock.size(*BYTES), dtype=torch.uint8, device=clock.device)
    below = torch.ones(on_device.shape, dtype=torch.uint8, pin_memory=clock.cuda)
    mover, under_way = engine(clock.device, "out"), list[Copy]()
    size, run = pointwise(clock)
    times = max(1, round(OPS * clock.seconds(lambda: _copied(mover, on_device, below)) / clock.seconds(run)))

    def ops() -> None:
        for _ in range(times):
            run()

    def beside() -> None:
        under_way.append(mover.start(on_device, below))
        ops()

    alone, together = clock.seconds(ops), clock.seconds(beside)
    for copy in under_way:
        copy.landed()
    yield "contention", max(0.0, (together / alone - 1) * times * size / on_device.nbytes)


def disk(clock: Clock) -> Iterator[tuple[str, float]]:
    """B/s to a file in the folder for temporary files, down to the disk, and back from there where the system lets go
    of what it has in memory.
    """
    data = os.urandom(2**20)
    count = max(1, clock.size(*ON_DISK) // len(data))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibrate")
        start = time.perf_counter()
        with open(path, "wb", buffering=0) as file:
            for _ in range(count):
                file.write(data)
            os.fsync(file.fileno())
        yield "write", count * len(data) / (time.perf_counter() - start)
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(len(data)):
                pass
        yield "read", count * len(data) / (time.perf_counter() - start)
