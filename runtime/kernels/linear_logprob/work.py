"""What a call of linear_logprob or of its backward costs: arithmetic, memory traffic, and the memory inside it.

In: the op and its arguments, which need no data. Out: numbers. What must hold: `workspace` is what reference.py takes
where no mask leaves rows out, to 3 %: tiles may be a little less high than those of the few that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memplan.runtime.kernels.linear_logprob import ops
from memplan.runtime.kernels.linear_logprob.head import Form, Head
from memplan.runtime.kernels.linear_logprob.rows import Rows
from memplan.runtime.tally import Tally

TILES = 2  # of each kind, after which nothing new is allocated
WIDTH = 48  # what is done with each logit takes as long as this many columns more would: measured on a CPU at D=512
PASSES = 4  # over a tile's logits, reading and writing


@dataclass(frozen=True)
class Work:
    """One call. `products`: with all of hidden and weight."""

    target: Any
    args: tuple[Any, ...]
    hidden: torch.Tensor
    weight: torch.Tensor
    products: int

    @property
    def is_backward(self) -> bool:
        return self.target is torch.ops.memplan.linear_logprob_backward.default

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        tokens, width = self.hidden.shape
        return 2 * tokens * self.weight.shape[0] * (self.products * width + WIDTH)

    @property
    def traffic(self) -> int:
        """Bytes of logits that are read and written, tile by tile."""
        return 2 * PASSES * 4 * self.hidden.shape[0] * self.weight.shape[0]

    def workspace(self) -> int:
        """Bytes beyond inputs and outputs: those of a call with few tiles, and what else a whole sum takes."""
        tokens, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        head = Head(self.weight, None, None, Form(compute=self.args[-3]))
        few = min(tokens, TILES * Rows(tokens, None).tallest), min(vocabulary, TILES * head.columns())
        with _disable_current_modes():
            args = [_cut(a, (tokens, vocabulary), few) for a in self.args]
            with Tally([a for a in args if isinstance(a, torch.Tensor)]) as tally:
                made = (ops.backward if self.is_backward else ops.forward)(*args)
            inside: int = tally.peak - sum(t.untyped_storage().nbytes() for t in made)
        return inside + self._sums(tokens, vocabulary) - self._sums(*few)

    def _sums(self, tokens: int, vocabulary: int) -> int:
        """Bytes of whole sums beside narrower gradients."""
        if not self.is_backward:
            return 0
        *_, compute, way, needs = self.args
        sums = Form(compute=compute).sums
        way = ops.smaller(self.hidden, self.weight, sums) if way == "auto" else way
        whole = self.weight if way == "rows" else self.hidden
        rows = vocabulary if way == "rows" else tokens
        needed = needs[1] if way == "rows" else needs[0]
        return rows * whole.shape[1] * sums.itemsize if needed and whole.dtype != sums else 0


def of(target: Any, args: Sequence[Any]) -> Work | None:
    """The work of such a call; None: it is another op."""
    if target is torch.ops.memplan.linear_logprob.default:
        *_, entropy, way = args
        return Work(target, tuple(args), args[0], args[1], 1 + (1 + entropy) * (way == "vectors"))
    if target is torch.ops.memplan.linear_logprob_backward.default:
        return Work(target, tuple(args), args[2], args[3], 1 + args[-1][0] + args[-1][1])
    return None


def _cut(value: Any, sizes: tuple[int, int], few: tuple[int, int]) -> Any:
    """A tensor without data, of the first rows or tokens."""
    if not isinstance(value, torch.Tensor):
        return value
    shape = list(value.shape)
    if shape and shape[0] in sizes:
        shape[0] = few[sizes.index(shape[0])]
    return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device="meta")
