"""How long something takes on a device, in seconds.

In: a callable that starts work on the device. Out: the least of several times: what disturbs one only makes it longer.
On CUDA events on the compute stream are read, after runs that warm up caches, libraries and clocks; on a CPU the
process's clock, after one such run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

ENOUGH = {"cpu": 0.1, "cuda": 0.01}  # seconds that one run should take: threads that wait for each other take some
TOTAL = 0.4  # seconds spent on one figure, about
RUNS = 3  # at least
WARM_UP = {"cpu": 1, "cuda": 3}


@dataclass(frozen=True)
class Clock:
    """`scale`: of the times above, and of the sizes of what is measured."""

    device: torch.device
    scale: float = 1.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def size(self, number: int, on_cuda: int, least: int = 1) -> int:
        """A number of elements, scaled."""
        return max(least, int(self.scale * (on_cuda if self.cuda else number)))

    def seconds(self, run: Callable[[], object]) -> float:
        """The least time of `run`."""
        for _ in range(WARM_UP[self.device.type]):
            run()
        spent, least = 0.0, float("inf")
        runs = 0
        while runs < RUNS or spent < TOTAL * self.scale:
            found = self.once(run)
            spent, least, runs = spent + found, min(least, found), runs + 1
        return max(least, 1e-9)

    def once(self, run: Callable[[], object]) -> float:
        """The time of one run: on CUDA of what it has put on the compute stream."""
        if not self.cuda:
            start = perf_counter()
            run()
            return perf_counter() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self.device)
        first.record(torch.cuda.current_stream(self.device))
        run()
        last.record(torch.cuda.current_stream(self.device))
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def grown(self, sizes: Iterator[int], of: Callable[[int], Callable[[], object]]) -> tuple[int, float]:
        """The first of the growing sizes whose run takes long enough, or the last, and its time."""
        for size in sizes:
            run = of(size)
            run()
            if min(self.once(run) for _ in range(2)) >= ENOUGH[self.device.type] * self.scale:
                break
        return size, self.seconds(run)
