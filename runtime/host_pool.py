"""Memory off the device: one arena per tier, from which offloaded tensors are cut, and to which they go back.

In: the size and strides of a tensor. Out: a CPU tensor over a piece of the arena, that piece's owner: when nothing
holds its storage any more, the piece is free again. Nothing of it goes through torch's allocators, so it is not in the
device's memory, on a CPU neither. The arena grows by what does not fit into its holes and is never given back while the
process lives: from the second step on, all pieces come from the first.
Tier "host" is anonymous memory, pinned where there is a CUDA device. Tier "disk" is mapped files without a name,
in the folder for temporary files: nothing of them outlives the process, however that ends. Their space is allocated
when the arena grows, so that a full disk is an error there and not a signal later.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import math
import mmap
import os
import tempfile
import threading
import typing
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.ir import Plan, Tier
from memplan.units import human

ALIGNMENT = 64  # bytes; what Inductor's vectorised kernels may count on
TIERS: tuple[Tier, ...] = typing.get_args(Tier)
PAGE = 2**21  # what the arena grows by, rounded up
_ADVICE = {
    "host": "set a smaller host_budget, or free some of the host's memory",
    "disk": "free some space there, or set TMPDIR to a folder on another disk",
}


@dataclass
class Arena:
    """`holes`: address and bytes of what is free, by address; a hole never spans two mappings."""

    tier: str
    pinned: bool = False
    bytes: int = 0  # that it has grown to
    used: int = 0
    holes: list[tuple[int, int]] = field(default_factory=list)
    mappings: list[mmap.mmap] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)  # a finalizer may come while the lock is held

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A CPU tensor without gaps. Raises MemplanError when the tier has no room."""
        size = max(1, math.prod(shape) * dtype.itemsize)
        address = self.take(size)
        piece = (ctypes.c_char * size).from_address(address)
        weakref.finalize(piece, self.give, address, size).atexit = False
        return shaped(torch.frombuffer(piece, dtype=torch.uint8), shape, strides, dtype)  # its storage holds the piece

    def reserve(self, size: int) -> None:
        """Grow until `size` bytes have room beside each other."""
        with self.lock:
            if self.bytes < size:
                self._grow(size - self.bytes)

    def take(self, size: int) -> int:
        """The address of a piece: the first hole that is large enough."""
        size = rounded(size, ALIGNMENT)
        with self.lock:
            found = next((k for k, (_, n) in enumerate(self.holes) if n >= size), None)
            if found is None:
                self._grow(size)
                return self.take(size)
            address, n = self.holes[found]
            self.holes[found : found + 1] = [(address + size, n - size)] if n > size else []
            self.used += size
            return address

    def give(self, address: int, size: int) -> None:
        """Take a piece back, and join it with the holes beside it."""
        size = rounded(size, ALIGNMENT)
        with self.lock:
            self.used -= size
            k = bisect.bisect(self.holes, (address, 0))
            self.holes.insert(k, (address, size))
            for left in (k, k - 1):
                if 0 <= left < len(self.holes) - 1:
                    (a, n), (b, m) = self.holes[left : left + 2]
                    if a + n == b and not self._starts(b):
                        self.holes[left : left + 2] = [(a, n + m)]

    def _starts(self, address: int) -> bool:
        return any(address_of(m) == address for m in self.mappings)

    def _grow(self, size: int) -> None:
        size = rounded(size, PAGE)
        try:
            mapping = memory(size) if self.tier == "host" else _file(size)
        except OSError as e:
            raise MemplanError(
                f"cannot take {human(size)} of the {self.tier} for what is offloaded, beside {human(self.bytes)} taken "
                f"before: {e.strerror}; {_ADVICE[self.tier]}"
            ) from None
        if self.pinned:
            error = torch.cuda.cudart().cudaHostRegister(address_of(mapping), size, 0)  # type: ignore[no-untyped-call]
            if int(error):
                raise MemplanError(
                    f"CUDA refuses to pin {human(size)} of host memory: {error}; set a smaller host_budget"
                )
        self.mappings.append(mapping)
        self.bytes += size
        k = bisect.bisect(self.holes, (address_of(mapping), 0))
        self.holes.insert(k, (address_of(mapping), size))


def shaped(flat: torch.Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without gaps over the first of some bytes."""
    return flat[: math.prod(shape) * dtype.itemsize].view(dtype).as_strided(shape, strides)


def rounded(size: int, to: int) -> int:
    """Up to a multiple."""
    return -(-size // to) * to


def address_of(mapping: mmap.mmap) -> int:
    """Where it begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def memory(size: int) -> mmap.mmap:
    """Anonymous memory: its pages come when they are touched."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _file(size: int) -> mmap.mmap:
    """A new file of `size` bytes without a name, mapped."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return mmap.mmap(file.fileno(), size)


def reserve(plan: Plan) -> None:
    """Take what a plan will have off the device, so that no step lacks it. Raises MemplanError when it is not there."""
    for tier in TIERS:
        if size := plan.timeline.away(tier):
            arena(tier).reserve(size + ALIGNMENT * len(plan.timeline.host))


def off_device(address: int) -> bool:
    """Whether an address is in an arena."""
    return any(a <= address < a + len(m) for tier in TIERS for m in arena(tier).mappings for a in (address_of(m),))


@functools.cache
def arena(tier: str) -> Arena:
    """The process's arena of a tier; a forked process has one of its own, because files are shared with its parent."""
    return Arena(tier, pinned=tier == "host" and torch.cuda.is_available())


os.register_at_fork(after_in_child=arena.cache_clear)
