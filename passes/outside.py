"""What Python runs between the graphs of a step, and after the last: seen in a step or two, and known from then on.

In: the spans of a measuring session (runtime/window.py) at each place of a step. Out: a Gap for that place. At sizes
that were not seen it is scaled by their product, until they are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from memplan.ir import Gap
from memplan.runtime.window import Session, Span

SMALL = 1024  # bytes that are not worth a plan: scalars, seeds of gradients

Place = tuple[int, int]  # a graph, and its position in the step


@dataclass(frozen=True)
class Seen:
    """What ran at one place, at these sizes. `whole`: all of it was seen."""

    sizes: tuple[int, ...]
    gap: Gap
    whole: bool


@dataclass
class Outside:
    """What was seen, and the session that measures."""

    seen: dict[Place, Seen] = field(default_factory=dict)
    session: Session | None = None

    def unseen(self, place: Place, sizes: tuple[int, ...]) -> bool:
        """Whether what runs there, at these sizes, is still to be seen."""
        seen = self.seen.get(place)
        return seen is None or not seen.whole or any(n > m for n, m in zip(sizes, seen.sizes, strict=True))

    def open(self) -> Session:
        """The session that measures now."""
        if self.session is None or not self.session.open:
            self.session = Session()
        return self.session

    def end(self) -> None:
        """Stop measuring."""
        if self.session is not None:
            self.session.end()

    def remember(self, place: Place, sizes: tuple[int, ...], ahead: Span | None, behind: Span | None) -> None:
        """Keep what was measured ahead, after the graph, and behind, before its backward; nothing: it ends the step.
        Sessions must have ended.
        """
        spans = [span for span in (ahead, behind) if span is not None]
        measured = [size for span in spans for size in span.measured()] or [0]
        gap = Gap(f"Python after graph {place[1] + 1}", *measured)
        self.seen[place] = Seen(sizes, gap, all(span.whole for span in spans))

    def gap(self, place: Place, sizes: tuple[int, ...]) -> Gap | None:
        """What runs there at these sizes, if it is worth counting."""
        seen = self.seen.get(place)
        if seen is None or max(seen.gap.bytes, seen.gap.backward_bytes) <= SMALL:
            return None
        return seen.gap.scaled(max(1.0, math.prod(n / m for n, m in zip(sizes, seen.sizes, strict=True))))
