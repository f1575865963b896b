"""An arena as a tenant of the ledger.

In: an arena, and what makes its contents good again: nothing, a copy, or a function that computes them. Out: a Tenant.
A copy has its place from the start, so that no step lacks it: on a CPU a file in the folder for temporary files, whose
pages the system can write out. The same contents are never copied twice, and what is half back is never copied at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from memplan.errors import MemplanError
from memplan.runtime import host_pool
from memplan.runtime.arena import Arena
from memplan.runtime.ledger import Restored


class ArenaTenant:
    """All of an arena. `fill`: computes its contents, where `restored` is "recompute"."""

    def __init__(self, arena: Arena, restored: Restored = "nothing", fill: Callable[[], object] | None = None) -> None:
        if (fill is None) == (restored == "recompute"):
            raise MemplanError(
                f"an arena restored by {restored!r} with fill={fill!r}: 'recompute' has a function to fill it, and "
                "'nothing' and 'copy' have none"
            )
        self.arena, self.restored = arena, restored
        self._fill, self._away = fill, False  # away: its contents are elsewhere, whatever is in its pages
        self._there = arena.pages.flat(0, arena.size)
        if restored == "copy":
            self._copy = host_pool.arena(arena.pages.below).empty((arena.size,), (1,), torch.uint8)

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
