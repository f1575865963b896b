"""Where row axes are among a tensor's dimensions, and how views move them. Sizes are sympy expressions.

A dimension is a tuple of factors, outermost first: row axes, and sizes that are not rows. [batch, tokens, 8 * 64] is
((B,), (T,), (512,)); viewed as [batch * tokens, 512] it is ((B, T), (512,)).
What must hold: sizes are compared as expressions, never by value, so a row axis is not taken for a size that happens to
be equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

Size: TypeAlias = Any  # a sympy expression; sympy has no types
ONE, ZERO = sympy.Integer(1), sympy.Integer(0)


@dataclass(frozen=True)
class Axis:
    """`size` consecutive rows of a row axis, from `start` on."""

    name: str
    size: Size
    start: Size = ZERO


Dim: TypeAlias = tuple[Any, ...]  # Axis or Size
Layout: TypeAlias = tuple[Dim, ...]


def size_of(n: int | torch.SymInt) -> Size:
    """A size as an expression."""
    return n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(int(n))


def shape_of(value: torch.Tensor) -> tuple[Size, ...]:
    """The shape of a fake value."""
    return tuple(size_of(n) for n in value.shape)


def has_rows(dim: Dim) -> bool:
    """Whether a row axis is among the factors."""
    return any(isinstance(factor, Axis) for factor in dim)


def axes(layout: Iterable[Dim]) -> list[str]:
    """Names of the row axes, in order."""
    return [factor.name for dim in layout for factor in dim if isinstance(factor, Axis)]


def plain(size: Size) -> Dim:
    """A dimension without rows."""
    return () if size == ONE else (size,)


def extent(dim: Dim) -> Size:
    """The size of a dimension."""
    return sympy.Mul(*(factor.size if isinstance(factor, Axis) else factor for factor in dim))


def regroup(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """The layout of a view with that shape; None where it would split an axis or a size that does not divide."""
    factors = [factor for dim in layout for factor in dim]
    out: list[Dim] = []
    for size in shape:
        dim: list[Any] = []
        while size != ONE or (not dim and factors and _is_one(factors[0])):
            if not factors:
                return None
            factor = factors.pop(0)
            own = factor.size if isinstance(factor, Axis) else factor
            if _whole(size / own):
                dim.append(factor)
                size = sympy.cancel(size / own)
            elif not isinstance(factor, Axis) and _whole(own / size):
                dim.append(size)
                factors.insert(0, sympy.cancel(own / size))
                size = ONE
            else:
                return None
        out.append(tuple(dim))
    return None if factors else tuple(out)


def _is_one(factor: Any) -> bool:
    return isinstance(factor, Axis) and factor.size == ONE


def _whole(ratio: Size) -> bool:
    """Whether a ratio of sizes is a product of sizes: at least no denominator is left."""
    return bool(sympy.fraction(sympy.cancel(ratio))[1] == ONE)


def broadcast(operands: Sequence[Layout], shape: Sequence[Size]) -> Layout | None:
    """The layout of an elementwise result, whose last dimensions are the operands' last; None where the operands' rows
    do not meet.
    """
    out: list[Dim] = []
    for back in range(len(shape), 0, -1):
        here = {layout[-back] for layout in operands if back <= len(layout) and has_rows(layout[-back])}
        bare = [layout[-back] for layout in operands if back <= len(layout) and not has_rows(layout[-back])]
        if len(here) > 1 or (here and any(extent(dim) != ONE for dim in bare)):
            return None  # two kinds of rows, or rows beside what is not
        out.append(here.pop() if here else plain(shape[-back]))
    return tuple(out) if _once(out) and _all(operands, out) else None


def _once(layout: Sequence[Dim]) -> bool:
    names = axes(layout)
    return len(names) == len(set(names))


def _all(operands: Iterable[Layout], out: Sequence[Dim]) -> bool:
    """No operand has rows that the result has not."""
    return all(set(axes(layout)) <= set(axes(out)) for layout in operands)
