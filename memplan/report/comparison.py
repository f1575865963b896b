"""Two timelines side by side: predicted against measured, or one plan against another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from memplan.errors import MemplanError
from memplan.ir import KINDS, Block, Kind, Plan, Timeline
from memplan.report.text import LARGEST, at_peak, block_line
from memplan.units import human


@dataclass(frozen=True)
class Comparison:
    """Peaks in bytes, and what makes the difference. `only_a`: blocks alive at a's peak but not at b's, largest first.

    Blocks are matched by name and bytes within one origin, and by bytes alone between a prediction and a
    measurement, whose allocator knows no names.
    """

    a: str
    b: str
    peak_a: int
    peak_b: int
    kinds: tuple[tuple[Kind, int, int], ...]  # kind, bytes at a's peak, bytes at b's
    only_a: tuple[Block, ...]
    only_b: tuple[Block, ...]

    @property
    def difference(self) -> int:
        """Bytes by which b's peak is above a's."""
        return self.peak_b - self.peak_a

    def __str__(self) -> str:
        share = f" ({100 * self.difference / self.peak_a:+.2f} %)" if self.peak_a else ""
        lines = [
            f"a: {self.a}, peak {human(self.peak_a)}",
            f"b: {self.b}, peak {human(self.peak_b)}",
            "equal peaks" if not self.difference else f"b - a: {_signed(self.difference)}{share}",
            f"{'at the peak':<16}{'a':>10}  {'b':>10}  {'b - a':>11}",
        ]
        lines += [f"{kind:<16}{human(x):>10}  {human(y):>10}  {_signed(y - x):>11}" for kind, x, y in self.kinds]
        for name, blocks in (("a", self.only_a), ("b", self.only_b)):
            if blocks:
                total = human(sum(block.bytes for block in blocks))
                lines.append(f"alive at the peak of {name} only: {len(blocks)} blocks, {total}")
                lines += [f"  {block_line(block)}" for block in blocks[:LARGEST]]
        return "\n".join(lines)


def compare(a: Plan | Timeline, b: Plan | Timeline) -> Comparison:
    """Compare two plans or timelines at their peaks."""
    x, y = _timeline(a), _timeline(b)
    kinds_x, kinds_y = at_peak(x), at_peak(y)
    named = x.origin == y.origin

    def key(block: Block) -> Hashable:
        return (block.name, block.bytes) if named else block.bytes

    return Comparison(
        a=f"{x.title} ({x.origin})",
        b=f"{y.title} ({y.origin})",
        peak_a=x.peak,
        peak_b=y.peak,
        kinds=tuple((k, kinds_x.get(k, 0), kinds_y.get(k, 0)) for k in KINDS if k in kinds_x or k in kinds_y),
        only_a=_without(x.alive(), y.alive(), key),
        only_b=_without(y.alive(), x.alive(), key),
    )


def _timeline(value: Plan | Timeline) -> Timeline:
    if isinstance(value, Plan):
        return value.timeline
    if isinstance(value, Timeline):
        return value
    raise MemplanError(f"cannot compare a {type(value).__name__}: give a Plan or a Timeline (seen.timeline)")


def _without(blocks: list[Block], others: list[Block], key: Callable[[Block], Hashable]) -> tuple[Block, ...]:
    """The blocks that have no partner of the same key among the others."""
    partners = Counter(map(key, others))
    partners.subtract(map(key, blocks))
    left = []
    for block in reversed(blocks):  # the smallest first, so that the order of equals is stable
        if partners[key(block)] < 0:
            partners[key(block)] += 1
            left.append(block)
    return tuple(reversed(left))


def _signed(size: int) -> str:
    return ("+" if size > 0 else "") + human(size)
