"""Where compiled code failed, read from the error it raised.

In: a compiled graph, and who wants to hear of its errors. Out: the same graph; where it raises, that function is given
the error and its Place first, then it goes on as it is. What does not fail pays nothing for it.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memplan.ir import Timeline


@dataclass(frozen=True)
class Place:
    """`phase` of the graph; empty: it has both. `name` that the line assigns. `moment` of the plan, if known."""

    phase: str = ""
    name: str = ""
    moment: int | None = None

    def moment_of(self, timeline: Timeline) -> tuple[int, bool]:
        """The moment of a timeline, and whether it is that of the line: else that of the most bytes in its graph."""
        if self.moment is not None:
            return self.moment, True
        inside = [i for i, m in enumerate(timeline.moments) if not self.phase or m.phase == self.phase]
        for block in timeline.blocks:  # generated code: "buf3 (kernel)", see passes/wrapper.py
            if self.name and block.name.partition(" (")[0] == self.name and block.start in inside:
                return block.start, True
        return max(inside, key=timeline.totals.__getitem__, default=timeline.peak_moment), False


Failed = Callable[[Exception, Place], None]


def nobody(_error: Exception, _place: Place) -> None:
    """Does not want to hear of it."""


def watched(run: Callable[[list[Any]], Any], phase: str, failed: Failed) -> Callable[[list[Any]], Any]:
    """A boxed callable that tells of its errors."""

    def call(args: list[Any]) -> Any:
        try:
            return run(args)
        except Exception as error:
            failed(error, Place(phase, _assigned(error)))
            raise

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _assigned(error: Exception) -> str:
    """What the line of generated code assigns that the error comes from; empty: nobody knows."""
    at = error.__traceback__
    while at is not None:
        code = at.tb_frame.f_code
        if code.co_filename.startswith("<eval_with_key>") or code.co_name == "call":  # fx's and Inductor's
            line = linecache.getline(code.co_filename, at.tb_lineno, at.tb_frame.f_globals)
            if found := re.match(r"\s*(\w+)(?:: [^=]*)? = ", line):
                return found[1]
        at = at.tb_next
    return ""
