"""Which rows are computed: those that the mask counts.

On the CPU the others are left out. On other devices their number is unknown without waiting for the device, so they
are computed as rows of zeros with label 0, which adds zero to everything, and what they return is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.runtime.kernels.linear_logprob.head import EVEN, row_tiles


class Rows:
    """The rows of [T, ...] tensors that count, in tiles."""

    def __init__(self, tokens: int, mask_T: Tensor | None, height: int | None = None) -> None:
        self.tokens = tokens
        self.index: Tensor | None = None
        self.mask_T = mask_T
        if mask_T is not None and leaves_out(mask_T.device):
            self.index, self.mask_T = mask_T.nonzero().squeeze(1), None
        self.count = tokens if self.index is None else self.index.numel()
        self.tiles = row_tiles(self.count, height)
        self.tallest = max((-(-(t.stop - t.start) // EVEN) * EVEN for t in self.tiles), default=0)

    def where(self, tile: slice) -> slice | Tensor:
        """What indexes the rows of a tile in a [T, ...] tensor."""
        return tile if self.index is None else self.index[tile]

    def take(self, x: Tensor, tile: slice) -> Tensor:
        """The rows of a tile; a view, if it can be one. Rows that do not count are zeros."""
        taken = x[self.where(tile)]
        if self.mask_T is None:
            return taken
        keep = self.mask_T[tile].view(-1, *[1] * (x.ndim - 1))
        return taken.where(keep, torch.zeros((), dtype=x.dtype, device=x.device))

    def padded(self, x: Tensor, tile: slice) -> Tensor:
        """As `take`, with rows of zeros after them, up to a multiple of EVEN."""
        taken = self.take(x, tile)
        missing = -taken.shape[0] % EVEN
        return torch.cat([taken, taken.new_zeros(missing, *taken.shape[1:])]) if missing > 0 else taken

    def put(self, into: Tensor, tile: slice, values: Tensor) -> None:
        """Write the rows of a tile; padding is left out."""
        values = values[: tile.stop - tile.start]
        if self.mask_T is not None:
            keep = self.mask_T[tile].view(-1, *[1] * (into.ndim - 1))
            values = values.where(keep, torch.zeros((), dtype=values.dtype, device=values.device))
        into[self.where(tile)] = values.to(into.dtype)

    def check(self, labels_T: Tensor, vocabulary: int) -> None:
        """Refuse labels that are no token. Elsewhere than on the CPU nobody waits to look: such rows become nan."""
        if not leaves_out(labels_T.device) or not self.count:
            return
        counted = labels_T if self.index is None else labels_T[self.index]
        low, high = (int(x) for x in torch.aminmax(counted))
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise MemplanError(
                f"label {wrong} is no token: labels of rows that count are from 0 to {vocabulary - 1}; "
                "give mask=labels >= 0 to leave rows out"
            )


def leaves_out(device: torch.device) -> bool:
    """Whether the number of rows that count is known without waiting."""
    return device.type == "cpu"


def buffer(elements: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for the largest tile, used by one tile after the other."""
    size = 1
    for n in elements:
        size *= n
    return torch.empty(size, dtype=dtype, device=device)
