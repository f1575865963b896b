"""What is alive when, predicted or measured: the same type, so comparing them is one function.

Must hold: lifetimes are half-open intervals of moments; bytes follow from their order alone, never from clocks.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from memplan.ir.decisions import Tier
from memplan.ir.step import Kind


@dataclass(frozen=True)
class Moment:
    """One point of a timeline: an op (predicted) or an allocator event (measured)."""

    name: str
    seconds: float  # since the start; an estimate in a prediction
    phase: str = ""  # "forward" | "backward" | ...
    stall: float = 0.0  # seconds that the device waits for a copy before this moment's work


@dataclass(frozen=True)
class Block:
    """Bytes alive over the half-open interval of moments [start, end)."""

    name: str
    bytes: int
    kind: Kind
    start: int
    end: int
    decision: str = ""  # "keep" | "recompute" | "offload" | ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    source: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Timeline:
    """What is alive when. `base` are bytes alive throughout, by kind.

    `host`: what is off the device, over the same moments, with its tier for a decision; it is in no total.
    `others`: what is on the device and not the step's, over the same moments: of a plan the context and what is held
    back against fragmentation, of a recording what the device had in use beside torch's allocator. It is in no total
    either: `beside`.
    """

    title: str
    origin: Literal["predicted", "measured"]
    moments: tuple[Moment, ...]
    blocks: tuple[Block, ...]
    base: tuple[tuple[Kind, int], ...] = ()
    notes: tuple[str, ...] = ()
    host: tuple[Block, ...] = ()
    others: tuple[Block, ...] = ()

    @property
    def base_bytes(self) -> int:
        return sum(b for _, b in self.base)

    @functools.cached_property
    def totals(self) -> tuple[int, ...]:
        """Bytes alive at each moment, base included."""
        return tuple(self.base_bytes + n for n in _sums(self.blocks, len(self.moments)))

    @functools.cached_property
    def beside(self) -> tuple[int, ...]:
        """Bytes that others hold at each moment."""
        return tuple(_sums(self.others, len(self.moments)))

    def away(self, tier: Tier) -> int:
        """The most bytes that are in a tier below the device at a time."""
        return max(_sums((b for b in self.host if b.decision == tier), len(self.moments)), default=0)

    @property
    def host_peak(self) -> int:
        """The most bytes that are in the host's memory at a time."""
        return self.away("host")

    @property
    def stalled(self) -> float:
        """Seconds that the device waits for copies."""
        return sum(m.stall for m in self.moments)

    @property
    def peak(self) -> int:
        """The largest total in bytes, base included."""
        return max(self.totals, default=self.base_bytes)

    @property
    def peak_moment(self) -> int:
        """Index of the first moment at which the total is largest."""
        return self.totals.index(self.peak) if self.moments else 0

    @property
    def peak_above_base(self) -> int:
        return self.peak - self.base_bytes

    @property
    def seconds(self) -> float:
        return self.moments[-1].seconds if self.moments else 0.0

    def alive(self, moment: int | None = None) -> list[Block]:
        """The blocks alive at a moment (by default at the peak), largest first."""
        at = self.peak_moment if moment is None else moment
        return sorted((b for b in self.blocks if b.start <= at < b.end), key=lambda b: -b.bytes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it in the format of the suffix: .json is read back by Timeline.load, .html is a page for any browser,
        .png a picture, .pickle opens in torch's memory viewer, .perfetto-trace in Perfetto's.
        """
        from memplan import report

        report.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Timeline:
        from memplan import serialize

        return serialize.load(path, Timeline)


def _sums(blocks: Iterable[Block], count: int) -> list[int]:
    """The bytes of the blocks alive at each of `count` moments."""
    change = [0] * (count + 1)
    for block in blocks:
        change[block.start] += block.bytes
        change[block.end] -= block.bytes
    return list(itertools.accumulate(change[:-1]))
