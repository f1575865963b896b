"""Which regions run in slices, and of how many rows: option `tiles`.

In: a graph, and what the option says: rows for all regions; rows, or a way of linear_logprob, for the places it names;
or "auto", where a slice has so many bytes, whatever the region is, and an LM head may be linear_logprob. Out: a tiled
copy, whose meta has notes that say what was done, and what was not and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from memplan.errors import MemplanError
from memplan.passes.calls import copied
from memplan.passes.fused_head import FORWARD
from memplan.passes.tile import Candidate, ForwardOf, Outcome, RowsOf, WayOf, candidates, tile_all
from memplan.runtime import tiled

NOTES = "memplan_tiles"  # in a module's meta
FEWEST = 64  # rows of a slice, when they are chosen: products of fewer run far from a machine's speed
PARTS = (8, 32, 128)  # a slice has the bytes of the untiled step's peak over one of these

UNFUSED = "memplan_unfused"  # notes of heads that are not linear_logprob, though that was looked at

Pins = tuple[tuple[str, int | str], ...]  # (place, rows, or a way of linear_logprob)


class Tiling(NamedTuple):
    """The bytes of what a slice's products make, 0: no slices; whether only the region of the widest is tiled; and the
    way of linear_logprob that LM heads are computed by, empty: slices as all else.
    """

    bytes: int = 0
    widest: bool = False
    head: str = ""

    @property
    def slices(self) -> bool:
        """Whether anything is to be tiled."""
        return bool(self.bytes or self.head)


def menu(peak: int) -> list[Tiling]:
    """What "auto" looks at for a step whose peak is so many bytes above what is there before it."""
    slices = [Tiling(peak // part, widest) for widest in (True, False) for part in PARTS]
    return slices + fused(0) + [t for part in PARTS for t in fused(peak // part)]


def fused(size: int) -> list[Tiling]:
    """Those with LM heads by linear_logprob: as it chooses, and with the least memory, which may be the same."""
    return [Tiling(size, head=way) for way in ("auto", "vocab")]


def in_slices(
    graph: fx.GraphModule, forward_of: ForwardOf, tiling: Tiling | int | Pins, inner: str, *, several: bool = False
) -> fx.GraphModule:
    """A tiled copy. Raises MemplanError for a pin that cannot run in slices, or that fits no region; of a step in
    `several` graphs another one may have it.
    """
    module = copied(graph)
    if tiling == Tiling():
        return module
    widest = isinstance(tiling, Tiling) and tiling.widest
    outcomes = tile_all(module, forward_of, _rows_of(tiling), inner=inner, widest=widest, way_of=_way_of(tiling))
    if isinstance(tiling, tuple) and not isinstance(tiling, Tiling):
        _check(tiling, outcomes, candidates(graph, forward_of), elsewhere=several)
    if not any(n.target in (tiled.OP, FORWARD) for n in module.graph.nodes):
        module = copied(graph)  # untouched
    module.meta[NOTES] = _notes(outcomes)
    module.meta[UNFUSED] = tuple(f"not linear_logprob, {o.of.place}: {o.unfused}" for o in outcomes if o.unfused)
    return module


def has_fused(graph: fx.GraphModule) -> bool:
    """Whether linear_logprob is in it."""
    return any(n.target is FORWARD for n in graph.graph.nodes)


def _rows_of(tiling: Tiling | int | Pins) -> RowsOf:
    def by_bytes(found: Candidate, size: int) -> int | None:
        if not size:
            return None
        rows = max(FEWEST, size * found.rows // max(1, found.bytes))
        return rows if rows < found.rows else 0

    if isinstance(tiling, int):
        return lambda _: tiling
    if isinstance(tiling, Tiling):
        return lambda found: by_bytes(found, tiling.bytes)
    rows_at = [(place, rows) for place, rows in tiling if isinstance(rows, int)]
    return lambda found: next((rows for place, rows in rows_at if _at(place, found)), None)


def _way_of(tiling: Tiling | int | Pins) -> WayOf:
    if isinstance(tiling, int):
        return lambda _: ""
    if isinstance(tiling, Tiling):
        return lambda _: tiling.head
    ways = [(place, way) for place, way in tiling if isinstance(way, str)]
    return lambda found: next((way for place, way in ways if _at(place, found)), "")


def _at(place: str, found: Candidate) -> bool:
    """Whether a place that a person names is the candidate's: its source line, or the modules on the way to it."""
    return found.place.split(" ")[0] == place or f".{place}." in f".{found.layer}."


def _check(pins: Pins, outcomes: Sequence[Outcome], there: Sequence[Candidate], *, elsewhere: bool) -> None:
    for place, _ in pins:
        mine = [o for o in outcomes if _at(place, o.of)]
        if failed := next((o for o in mine if o.reason), None):
            raise MemplanError(f"option 'tiles' has {place!r}, which cannot run in slices: {failed.reason}")
        if not mine and not elsewhere:
            known = dict.fromkeys(f"{c.place.split(' ')[0]} ({c.layer})" for c in there)
            raise MemplanError(
                f"option 'tiles' has {place!r}, and no region is there: give a source line or the end of a module's "
                f"name; there are {', '.join(known) or 'none'}"
            )


def _notes(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    notes = Counter(map(str, outcomes))
    if not notes:
        return ("not tiled: no product of [sequences, tokens, width] makes its rows wider",)
    return tuple(f"{note} (x{n})" if n > 1 else note for note, n in notes.items())
