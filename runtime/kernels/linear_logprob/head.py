"""The LM head, read tile by tile: how a logit follows from a hidden state, and how large a tile is.

    raw = hidden @ weight.T + bias
    z   = softcap * tanh(raw * logit_scale / softcap) / temperature      (no softcap: raw * logit_scale / temperature)

Letters: T tokens, D hidden size, V vocabulary; R rows and C columns of one tile of logits.

What must hold: columns are cut at places that depend on D and V alone, and products have multiples of EVEN rows. So a
row meets the same products and the same sums whatever else is in the batch, as far as the BLAS computes all rows of a
full block alike: MKL does; where one does not, equal bits need equal batches and masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # of a tile at most
EVEN = 16  # rows of a block: at the edge of a matrix, and below 8 rows, MKL takes kernels that add up in another order
COLUMNS = 2048  # of a tile at most
WEIGHTS = 2**20  # of a tile at most: float32 copies of them, and their gradients, are 4 MiB
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Form:
    """How logits are made from products; what of it is no tensor.

    `compute`: the dtype that operands are rounded to, as autocast would; products and sums are in float32, or in
    float64 if that is the dtype.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    compute: torch.dtype = torch.float32

    @property
    def sums(self) -> torch.dtype:
        """The dtype of logits, statistics and sums."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    @property
    def factor(self) -> float:
        """dz/draw, but for the slope of the softcap."""
        return self.logit_scale / self.temperature


@dataclass(frozen=True)
class Head:
    """weight [V, D] of any float dtype, bias [V]; `scale`: of a float8 weight, one value, or one for each of V."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: Tensor | None
    form: Form

    def columns(self) -> int:
        """Of a tile; the last one may have fewer."""
        vocabulary, width = self.weight_VD.shape
        columns = COLUMNS
        while columns > 128 and columns * width > WEIGHTS:
            columns //= 2
        return min(columns, vocabulary)

    def tiles(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        vocabulary, columns = self.weight_VD.shape[0], self.columns()
        for start in range(0, vocabulary, columns):
            yield slice(start, min(start + columns, vocabulary))

    def operand(self, x: Tensor) -> Tensor:
        """`x` as a product reads it."""
        if x.dtype != self.form.compute and x.dtype not in FLOAT8:
            x = x.to(self.form.compute)
        return x.to(self.form.sums)

    def weights(self, where: slice | Tensor) -> Tensor:
        """Some rows of the weight: [C, D]. A view, if neither dtype nor scale changes them."""
        tile_CD = self.operand(self.weight_VD[where])
        if self.scale is None:
            return tile_CD
        scale = self.scale.to(self.form.sums)
        return tile_CD * (scale if scale.numel() == 1 else scale.view(-1, 1)[where])

    def logits(self, hidden_RD: Tensor, weight_CD: Tensor, columns: slice, out: Tensor) -> Tensor:
        """z [R, C], into the memory of `out`."""
        form = self.form
        z_RC = out[: hidden_RD.shape[0] * weight_CD.shape[0]].view(hidden_RD.shape[0], -1)
        scale = form.factor if form.softcap is None else form.logit_scale / form.softcap
        if self.bias_V is None:
            z_RC.addmm_(hidden_RD, weight_CD.t(), beta=0, alpha=scale)
        else:
            z_RC.copy_(self.operand(self.bias_V[columns]).mul(scale))
            z_RC.addmm_(hidden_RD, weight_CD.t(), alpha=scale)
        if form.softcap is not None:
            z_RC.tanh_().mul_(form.softcap / form.temperature)
        return z_RC

    def slope_(self, z: Tensor) -> Tensor:
        """1 - tanh^2, the slope of the softcap, in the place of z."""
        assert self.form.softcap is not None
        return z.mul_(self.form.temperature / self.form.softcap).square_().neg_().add_(1)


def row_tiles(rows: int, height: int | None = None) -> list[slice]:
    """Slices of the rows, at most ROWS or `height`, about equal; all but the last are multiples of EVEN rows."""
    blocks = -(-rows // EVEN)
    count = -(-rows // (height or ROWS))
    cuts = [min(EVEN * (blocks * k // count), rows) for k in range(count + 1)] if count else [0]
    return [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]
