"""Gradients that are added up in float32 (or float64) and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


class Sum:
    """The gradient of `like`, from products over some of its rows.

    A gradient in the dtype of sums is added up in place. A narrower one has a whole sum beside it, or, if all that is
    added to some rows comes in one go (`piecewise`), a sum of those rows only.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, *, piecewise: bool) -> None:
        self.narrow = like.dtype != dtype
        self.dtype = like.dtype
        self.piecewise = piecewise and self.narrow
        held = like.dtype if self.piecewise else dtype
        self.total = torch.zeros(like.shape, dtype=held, device=like.device)
        self.piece: Tensor | None = None
        self.piece_at: slice | Tensor | None = None

    def _into(self, where: slice | Tensor, shape: tuple[int, ...]) -> Tensor:
        """The sum of these rows: a view, or for an index a copy."""
        if not self.piecewise:
            return self.total[where]
        if self.piece is None or self.piece_at is not where:
            self._round()
            self.piece, self.piece_at = torch.zeros(shape, dtype=torch.float32, device=self.total.device), where
        return self.piece

    def add_product(self, where: slice | Tensor, a: Tensor, b: Tensor) -> None:
        """Add a @ b to these rows."""
        if self.piecewise or isinstance(where, slice):
            self._into(where, (a.shape[0], b.shape[1])).addmm_(a, b)
        else:
            self.total.index_add_(0, where, torch.mm(a, b))

    def add(self, where: slice, values: Tensor) -> None:
        """Add to these rows."""
        self._into(where, tuple(values.shape)).add_(values)

    def _round(self) -> None:
        if self.piece is not None and self.piece_at is not None:
            self.total[self.piece_at] = self.piece.to(self.dtype)
        self.piece = self.piece_at = None

    def result(self) -> Tensor:
        """When everything is added."""
        self._round()
        return self.total.to(self.dtype)
