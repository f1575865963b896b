"""What sharing did, pair by pair: frozen data, saved as JSON.

In: pairs of weights with errors and bytes. Out: a table, and what `share_as` needs for another model to have the same
pairs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from memplan.serialize import load, to_json, write
from memplan.units import human

ROWS = 24  # of the table


@dataclass(frozen=True)
class Pair:
    """`target` is, or would be, c Q `source` (left) or c `source` Q (right): one entry for each side.

    `shape`: the target's; Q acts on the source's first rows and columns of that shape. `error`: |target - image| /
    |target|, Frobenius, as stored; None where it was not looked for, or is not finite. `least`: what the best
    orthogonal Q leaves, in any form, on that side. `bytes`: the target's. `stored`: what Q and c take in its place.
    `why`: why not merged.
    """

    source: str
    target: str
    shape: tuple[int, int]
    bytes: int
    side: Literal["left", "right"] = "left"
    form: Literal["Householder", "Blocks"] = "Householder"
    size: int | None = None  # reflectors, or rows of a block; None: one block
    stored: int = 0
    least: float | None = None
    error: float | None = None
    merged: bool = False
    why: str = ""

    @property
    def saved(self) -> int:
        """Bytes, if merged."""
        return self.bytes - self.stored


@dataclass(frozen=True)
class Report:
    """`before`, `after`: bytes of all parameters and buffers, by storages. LOSSY: merged weights are not what they
    were."""

    pairs: tuple[Pair, ...]
    tolerance: float
    before: int
    after: int

    @property
    def merged(self) -> tuple[Pair, ...]:
        """The pairs that share now."""
        return tuple(pair for pair in self.pairs if pair.merged)

    def __str__(self) -> str:
        """A table: the pairs merged, then the nearest that are not."""
        found = sorted(self.pairs, key=lambda p: (not p.merged, p.error or p.least or 2.0))
        percent = 100 * (1 - self.after / self.before)
        first = (
            f"lossy sharing: {len(self.merged)} of {len(self.pairs)} pairs merged under an error of "
            f"{self.tolerance:g}, {human(self.before)} -> {human(self.after)} ({percent:.1f} % saved)"
        )
        table = [("error", "least", "bytes", "Q", "form", "target", "from", "")]
        table += [_row(pair) for pair in found[:ROWS]]
        wide = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in table]
        more = [f"... and {len(found) - ROWS} more"] if len(found) > ROWS else []
        return "\n".join([first, *lines, *more])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write(path, to_json(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read what `save` wrote. Raises MemplanError."""
        return load(path, cls)


def _row(pair: Pair) -> tuple[str, str, str, str, str, str, str, str]:
    error, least = ("-" if e is None else f"{e:.4f}" for e in (pair.error, pair.least))
    form = f"{pair.side} {pair.form}({'' if pair.size is None else pair.size})"
    fate = "merged" if pair.merged else pair.why
    return error, least, human(pair.bytes), human(pair.stored), form, pair.target, pair.source, fate
