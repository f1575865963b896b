"""Two timelines side by side: predicted against measured, one plan against another, or two runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from memplan.errors import MemplanError
from memplan.ir import KINDS, Block, Kind, Plan, Timeline
from memplan.report.alignment import aligned, numbered
from memplan.report.text import LARGEST, at_peak, block_line
from memplan.units import human

Key = Callable[[Block], Hashable]


@dataclass(frozen=True)
class Place:
    """Where the same block is allocated in both, and the most bytes from there to the next such place, above what is
    alive throughout.
    """

    block: Block
    moment_a: int
    moment_b: int
    bytes_a: int
    bytes_b: int


@dataclass(frozen=True)
class Comparison:
    """Peaks in bytes, and what makes the difference. `only_a`: blocks alive at a's peak but not at b's, largest first.

    `worst`: the place of the largest difference; None: nothing is the same. `moved`: blocks that two plans decide about
    differently, as a and as b has them, largest first. `seconds_a`, `seconds_b`: up to the last moment; a recording has
    made its step slower.
    Blocks are matched by name and bytes within one origin, and by bytes alone between a prediction and a
    measurement, whose allocator knows no names.
    """

    timelines: tuple[Timeline, Timeline] = dataclasses.field(repr=False)
    a: str
    b: str
    peak_a: int
    peak_b: int
    kinds: tuple[tuple[Kind, int, int], ...]  # kind, bytes at a's peak, bytes at b's
    worst: Place | None
    moved: tuple[tuple[Block, Block], ...]
    only_a: tuple[Block, ...]
    only_b: tuple[Block, ...]
    seconds_a: float = 0.0
    seconds_b: float = 0.0

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
        return "\n".join([*lines, *self._times(), *self._worst(), *self._moved(), *self._only()])

    def _times(self) -> Iterator[str]:
        a, b = self.seconds_a, self.seconds_b
        if a and b:
            shown = [f"{1e3 * s:.4g} ms" for s in (a, b)]
            yield f"{'time':<16}{shown[0]:>10}  {shown[1]:>10}  {100 * (b / a - 1):>+9.1f} %"

    def _worst(self) -> Iterator[str]:
        place = self.worst
        if place is not None and place.bytes_a != place.bytes_b:
            moment = self.timelines[0].moments[place.moment_a]
            where = moment.name + (f" in {moment.phase}" if moment.phase else "")
            sizes = f"a {human(place.bytes_a)}, b {human(place.bytes_b)} above the base"
            yield f"they differ most at {where}: {sizes}, b - a: {_signed(place.bytes_b - place.bytes_a)}"
            yield f"  {block_line(place.block)}"

    def _moved(self) -> Iterator[str]:
        ways = Counter((x.decision, y.decision) for x, y in self.moved)
        for (before, after), count in ways.most_common():
            blocks = [x for x, y in self.moved if (x.decision, y.decision) == (before, after)]
            yield f"moved from {before} to {after}: {count} blocks, {human(sum(b.bytes for b in blocks))}"
            yield from (f"  {block_line(block)}" for block in blocks[:LARGEST])

    def _only(self) -> Iterator[str]:
        for name, blocks in (("a", self.only_a), ("b", self.only_b)):
            if blocks:
                total = human(sum(block.bytes for block in blocks))
                yield f"alive at the peak of {name} only: {len(blocks)} blocks, {total}"
                yield from (f"  {block_line(block)}" for block in blocks[:LARGEST])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write both timelines as one picture: .html lays them over each other, .png stacks them."""
        from memplan import report

        report.save(self.timelines, path)

    def to_json(self) -> str:
        """All but the timelines, as JSON by field."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "timelines"]
        return json.dumps({name: vars(self)[name] for name in names}, default=dataclasses.asdict)


def compare(a: Plan | Timeline, b: Plan | Timeline) -> Comparison:
    """Compare two plans or timelines: at their peaks, where they differ most, and in what two plans decide."""
    x, y = _timeline(a), _timeline(b)
    kinds_x, kinds_y = at_peak(x), at_peak(y)
    named = x.origin == y.origin

    def key(block: Block) -> Hashable:
        return (block.name, block.bytes) if named else block.bytes

    return Comparison(
        timelines=(x, y),
        a=f"{x.title} ({x.origin})",
        b=f"{y.title} ({y.origin})",
        peak_a=x.peak,
        peak_b=y.peak,
        kinds=tuple((k, kinds_x.get(k, 0), kinds_y.get(k, 0)) for k in KINDS if k in kinds_x or k in kinds_y),
        worst=_worst(x, y, key),
        moved=_moved(x, y, key) if named else (),
        only_a=_without(x.alive(), y.alive(), key),
        only_b=_without(y.alive(), x.alive(), key),
        seconds_a=x.seconds,
        seconds_b=y.seconds,
    )


def _timeline(value: Plan | Timeline) -> Timeline:
    if isinstance(value, Plan):
        return value.timeline
    if isinstance(value, Timeline):
        return value
    raise MemplanError(f"cannot compare a {type(value).__name__}: give a Plan or a Timeline (seen.timeline)")


def _worst(x: Timeline, y: Timeline, key: Key) -> Place | None:
    """Compares the most that is alive from one place where both allocate the same to the next one: a prediction has one
    moment for an op with all it allocates, a measurement several.
    """
    starts: list[tuple[int, int, Block]] = []
    for a, b in aligned(x, y, key):
        if not starts or (a.start > starts[-1][0] and b.start > starts[-1][1]):
            starts.append((a.start, b.start, a))
    if not starts:
        return None
    ends = [*starts[1:], (len(x.moments), len(y.moments), None)]
    places = []
    for (from_a, from_b, block), (to_a, to_b, _) in zip(starts, ends, strict=True):
        at_a = max(range(from_a, to_a), key=x.totals.__getitem__)
        at_b = max(range(from_b, to_b), key=y.totals.__getitem__)
        places.append(Place(block, at_a, at_b, x.totals[at_a] - x.base_bytes, y.totals[at_b] - y.base_bytes))
    return max(places, key=lambda place: abs(place.bytes_b - place.bytes_a))


def _moved(x: Timeline, y: Timeline, key: Key) -> tuple[tuple[Block, Block], ...]:
    """What both have, each at its first allocation, with another decision."""
    theirs = dict(numbered(y.blocks, key))
    pairs = [(b, theirs[k]) for k, b in numbered(x.blocks, key) if not k[1] and k in theirs]
    return tuple(sorted((p for p in pairs if p[0].decision != p[1].decision), key=lambda pair: -pair[0].bytes))


def _without(blocks: list[Block], others: list[Block], key: Key) -> tuple[Block, ...]:
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
