"""Which regions run in slices, and of how many rows: option `tiles`.

In: a graph, and what the option says: rows for all regions; rows for the places it names; or "auto", where a slice has
so many bytes, whatever the region is. Out: a tiled copy, whose meta has notes that say what was done, and what was not
and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from memplan.errors import MemplanError
from memplan.passes.calls import copied
from memplan.passes.tile import Candidate, ForwardOf, Outcome, RowsOf, candidates, tile_all
from memplan.runtime import tiled

NOTES = "memplan_tiles"  # in a module's meta
FEWEST = 64  # rows of a slice, when they are chosen: products of fewer run far from a machine's speed
PARTS = (8, 32, 128)  # a slice has the bytes of the untiled step's peak over one of these

Pins = tuple[tuple[str, int], ...]  # (place, rows)


class Tiling(NamedTuple):
    """The bytes of what a slice's products make, 0: no slices; and whether only the region of the widest is tiled."""

    bytes: int = 0
    widest: bool = False


def menu(peak: int) -> list[Tiling]:
    """What "auto" looks at for a step whose peak is so many bytes above what is there before it."""
    return [Tiling(peak // part, widest) for widest in (True, False) for part in PARTS]


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
    outcomes = tile_all(module, forward_of, _rows_of(tiling), inner=inner, widest=widest)
    if isinstance(tiling, tuple) and not isinstance(tiling, Tiling):
        _check(tiling, outcomes, candidates(graph, forward_of), elsewhere=several)
    if not any(n.target is tiled.OP for n in module.graph.nodes):
        module = copied(graph)  # untouched
    module.meta[NOTES] = _notes(outcomes)
    return module


def _rows_of(tiling: Tiling | int | Pins) -> RowsOf:
    def by_bytes(found: Candidate, size: int) -> int:
        rows = max(FEWEST, size * found.rows // max(1, found.bytes))
        return rows if rows < found.rows else 0

    if isinstance(tiling, int):
        return lambda _: tiling
    if isinstance(tiling, Tiling):
        return lambda found: by_bytes(found, tiling.bytes)
    return lambda found: next((rows for place, rows in tiling if _at(place, found)), None)


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
