"""Memory whose addresses stay while what is behind them goes and comes back: a device's pages, shared with others.

In: a size, reserved once. Out: tensors at offsets in it. Releasing a range gives its pages to whoever wants them;
mapping it brings pages back at the same addresses, so that the tensors there, and views and gradients of them, are good
again. What is in them then is nobody's: who wants to keep it copies it before (tenants.py). A range is whole chunks.

What must hold: `resident` is what the system says is there, not what was asked for; map and release leave alone what
is already as it shall be, and may be called again after they failed. Reading or writing what is released is an error
that nobody catches at once: on a CPU it brings pages in, and the ledger finds them.
Pages are behind a protocol: those of a CPU are here (mmap, madvise, mincore: Linux 5.14), a CUDA driver's are not
written yet.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from memplan.errors import MemplanError
from memplan.ir import Tier
from memplan.runtime.free import free_bytes
from memplan.runtime.host_pool import ALIGNMENT, PAGE, address_of, memory, rounded, shaped
from memplan.units import human

_POPULATE_WRITE = 23  # of Linux's madvise: bring in pages that can be written, and leave those that are there


class Pages(Protocol):
    """A reserved range of addresses on a device. Starts and sizes are multiples of `chunk`, inside `size`.

    `below`: the tier that has room of its own, for copies of what is released.
    """

    size: int
    chunk: int
    below: Tier

    def map(self, start: int, size: int) -> None:
        """Back a range with pages. Raises MemplanError when the device has no room."""

    def release(self, start: int, size: int) -> None:
        """Give the pages of a range back to the device."""

    def resident(self, start: int, size: int) -> int:
        """Bytes of a range that have pages."""

    def flat(self, start: int, size: int) -> torch.Tensor:
        """A storage of its own over any bytes of the range, as uint8; it keeps the addresses reserved."""


class HostPages:
    """Those of a CPU. Where device and host share a memory, only a disk has room of its own."""

    below: Tier = "disk"

    def __init__(self, size: int, chunk: int = PAGE) -> None:
        self.size, self.chunk = size, chunk
        try:
            self._mapping = memory(size)
        except OSError as e:
            raise MemplanError(f"cannot reserve {human(size)} of addresses: {e.strerror}") from None
        self._address = address_of(self._mapping)

    def map(self, start: int, size: int) -> None:
        there = self._there(start, size)
        missing, free = size - mmap.PAGESIZE * int(there.sum()), free_bytes(torch.device("cpu"))
        if missing > free:  # else the system would end the process
            raise MemplanError(
                f"cannot map {human(missing)}: {human(free)} of memory are free; release something first"
            )
        whole = there.view(-1, self.chunk // mmap.PAGESIZE).all(1).tolist()
        for there_already, chunks in itertools.groupby(range(len(whole)), whole.__getitem__):
            if not there_already:  # looking at pages that are there takes a third of the time that making them does
                first, *more = chunks
                self._advise(start + first * self.chunk, (1 + len(more)) * self.chunk, _POPULATE_WRITE)

    def release(self, start: int, size: int) -> None:
        self._advise(start, size, mmap.MADV_DONTNEED)

    def resident(self, start: int, size: int) -> int:
        return mmap.PAGESIZE * int(self._there(start, size).sum())

    def flat(self, start: int, size: int) -> torch.Tensor:
        return torch.frombuffer(self._mapping, dtype=torch.uint8, offset=start, count=size)

    def _there(self, start: int, size: int) -> torch.Tensor:
        """Which pages of a range are there, a byte for each: 0 or 1."""
        there = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        _call("mincore", self._address + start, size, there)
        return torch.frombuffer(there, dtype=torch.uint8).bitwise_and_(1)

    def _advise(self, start: int, size: int, advice: int) -> None:
        _call("madvise", self._address + start, size, advice)


@dataclass(frozen=True)
class Arena:
    """A reserved range and the tensors in it. Nothing of it is mapped at first."""

    pages: Pages

    @staticmethod
    def reserve(size: int, chunk: int = PAGE) -> Arena:
        """One of the CPU with room for `size` bytes, rounded up to chunks: multiples of a page."""
        if size < 1 or chunk < 1 or chunk % mmap.PAGESIZE:
            raise MemplanError(
                f"cannot reserve {size} bytes in chunks of {chunk}: give a size of at least 1, and chunks of a "
                f"multiple of {mmap.PAGESIZE} bytes, a page"
            )
        return Arena(HostPages(rounded(size, chunk), chunk))

    @property
    def size(self) -> int:
        return self.pages.size

    @property
    def resident(self) -> int:
        """Bytes that are on the device now."""
        return self.pages.resident(0, self.size)

    def map(self, start: int = 0, size: int | None = None) -> None:
        """Bring in what is missing of a range; None: up to the end."""
        self.pages.map(*self._range(start, size))

    def release(self, start: int = 0, size: int | None = None) -> None:
        """Give a range back; None: up to the end."""
        self.pages.release(*self._range(start, size))

    def tensor(
        self, offset: int, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A tensor without gaps at `offset` bytes, a multiple of 64; strides None: contiguous.

        It has a storage of its own, so that autograd takes no write to another one for a write to it.
        """
        size = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset % ALIGNMENT or offset + max(size, 1) > self.size:
            raise MemplanError(
                f"no tensor of {size} bytes can be at offset {offset} of an arena of {self.size}: offsets are "
                f"multiples of {ALIGNMENT}, and its end is inside"
            )
        flat = self.pages.flat(offset, max(size, 1))
        return shaped(flat, shape, strides or torch.empty(shape, device="meta").stride(), dtype)

    def _range(self, start: int, size: int | None) -> tuple[int, int]:
        size = self.size - start if size is None else size
        chunk = self.pages.chunk
        if start < 0 or size < 1 or start % chunk or size % chunk or start + size > self.size:
            raise MemplanError(
                f"no range of {size} bytes at {start} in an arena of {self.size}: both are multiples of its "
                f"chunk, {chunk}"
            )
        return start, size


def have(arenas: Iterable[Arena], size: int) -> None:
    """Have the first `size` bytes of these on the device, in whole chunks, and no more."""
    for arena in arenas:
        part = min(size, arena.size) // arena.pages.chunk * arena.pages.chunk
        if part < arena.size:
            arena.release(part)
        if part:
            arena.map(0, part)
        size -= part


def _call(name: str, address: int, size: int, last: object) -> None:
    """A call of the C library; other threads run meanwhile."""
    if getattr(_libc(), name)(ctypes.c_void_p(address), ctypes.c_size_t(size), last):
        code = ctypes.get_errno()
        hint = "; Linux 5.14 or newer is needed" if code == errno.EINVAL else ""
        raise MemplanError(f"{name} of {human(size)} failed: {os.strerror(code)}{hint}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
