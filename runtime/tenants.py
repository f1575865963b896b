"""Tenants of the ledger that are in an arena: all of one, or tensors that are moved there.

In: an arena, and what makes its contents good again: nothing, a copy, or a function that computes them. Out: a Tenant.
A copy has its place from the start, so that no step lacks it: on a CPU a file in the folder for temporary files, whose
pages the system can write out. The same contents are never copied twice, and what is half back is never copied at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from memplan.errors import MemplanError
from memplan.runtime import arena, host_pool
from memplan.runtime.arena import Arena
from memplan.runtime.host_pool import ALIGNMENT, rounded
from memplan.runtime.ledger import Restored
from memplan.runtime.storages import plain


class Resident:
    """What never leaves: so many bytes, in every phase. A budget has to know of it."""

    restored: Restored = "nothing"

    def __init__(self, size: int) -> None:
        self.resident = size

    def release(self) -> int:
        raise MemplanError("it cannot leave the device: its lease has to name all phases")

    def restore(self) -> int:
        return 0


class Reserved:
    """Room that a phase needs while it runs and that is free when it ends: activations, an engine's workspace."""

    restored: Restored = "nothing"
    resident = 0

    def release(self) -> int:
        return 0

    def restore(self) -> int:
        return 0


class ArenaTenant:
    """All of an arena. `fill`: computes its contents, where `restored` is "recompute"."""

    def __init__(self, memory: Arena, restored: Restored = "nothing", fill: Callable[[], object] | None = None) -> None:
        if (fill is None) == (restored == "recompute"):
            raise MemplanError(
                f"an arena restored by {restored!r} with fill={fill!r}: 'recompute' has a function to fill it, and "
                "'nothing' and 'copy' have none"
            )
        self.arena, self.restored = memory, restored
        self._fill, self._away = fill, restored == "nothing"  # away: its contents are, whatever is in its pages
        self._there = memory.pages.flat(0, memory.size)
        if restored == "copy":
            self._copy = host_pool.arena(memory.pages.below).empty((memory.size,), (1,), torch.uint8)

    @property
    def resident(self) -> int:
        return self.arena.resident

    def release(self) -> int:
        moved = 0
        if not self._away:
            if self.restored == "copy":
                self._copy.copy_(self._there)
                moved = self.arena.size
            self._away = True
        self.arena.release()
        return moved

    def restore(self) -> int:
        self.arena.map()
        moved = 0
        if self._away and self.restored == "copy":
            self._there.copy_(self._copy)
            moved = self.arena.size
        elif self._away and self._fill is not None:
            self._fill()
        self._away = False
        return moved

    def prefetch(self, size: int) -> None:
        """Pages alone: what is in them comes with `restore`."""
        if self._away:
            arena.have([self.arena], size)


def moved_in(tensors: Iterable[torch.Tensor]) -> ArenaTenant:
    """Move tensors into an arena of their own, which is restored by copy: parameters, the states of an optimizer.

    They stay the same objects, of the same values and strides; of a wrapper subclass, as a quantised state is, what is
    inside moves. What else looks at their memory, as a view does, still
    looks at the old one; so tensors that share a storage are refused with MemplanError, and nothing is moved.
    """
    given = list({id(p): p for t in tensors for p in plain(t)}.values())
    if len({t.untyped_storage().data_ptr() for t in given if t.nbytes}) < len([t for t in given if t.nbytes]):
        raise MemplanError(
            "some of the tensors share a storage, and would part: give one of them, and tie others to it"
        )
    like = [torch.empty_like(t, device="meta") for t in given]  # without gaps
    sizes = [rounded(max(t.nbytes, 1), ALIGNMENT) for t in like]
    tenant = ArenaTenant(Arena.reserve(sum(sizes)), "copy")
    tenant.restore()
    for k, (t, to) in enumerate(zip(given, like, strict=True)):
        place = tenant.arena.tensor(sum(sizes[:k]), to.shape, to.dtype, to.stride())
        t.data = place.copy_(t.detach())
    return tenant
