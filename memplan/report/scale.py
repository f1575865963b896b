"""What every picture of a timeline shares: the colours of kinds, where moments lie in time, and runs of phases."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from memplan.errors import MemplanError
from memplan.ir import Kind, Moment, Plan, Timeline

# torch.profiler's colours, in the order of the stack: what stays is at the bottom.
COLOURS: dict[Kind, str] = {
    "parameter": "darkgreen",
    "optimizer_state": "goldenrod",
    "input": "black",
    "gradient": "mediumblue",
    "activation": "red",
    "temporary": "mediumpurple",
}
HELD = "held by others", "darkgray"  # hatched, on top of the stack: what is on the device and not the step's


def edges(timeline: Timeline) -> tuple[list[float], str]:
    """The ends of each moment's column, one more than moments, and what they count.

    They are the timeline's own milliseconds; where those say nothing, moments are counted instead.
    """
    seconds = [moment.seconds for moment in timeline.moments]
    rising = all(a <= b for a, b in itertools.pairwise(seconds)) and all(map(math.isfinite, seconds))
    if rising and len(seconds) > 1 and 0 <= seconds[0] < seconds[-1]:
        if timeline.origin == "predicted":  # a moment's seconds are when its op ends
            return [1e3 * s for s in (0.0, *seconds)], "milliseconds (estimate)"
        return [1e3 * s for s in (*seconds, seconds[-1])], "milliseconds"
    return [float(i) for i in range(max(len(seconds), 1) + 1)], "moments"


def phases(moments: Sequence[Moment]) -> list[tuple[str, int, int]]:
    """Runs of equal phase: (phase, first moment, one past the last)."""
    out, start = [], 0
    for phase, run in itertools.groupby(moments, key=lambda moment: moment.phase):
        end = start + sum(1 for _ in run)
        out.append((phase, start, end))
        start = end
    return out


def timelines(value: Plan | Timeline | Sequence[Timeline]) -> list[Timeline]:
    """The timelines of a Plan, a Timeline or a sequence of them, at least one."""
    found = [value.timeline] if isinstance(value, Plan) else [value] if isinstance(value, Timeline) else [*value]
    if not found or not all(isinstance(timeline, Timeline) for timeline in found):
        raise MemplanError("a picture is drawn of a Plan, a Timeline, or a list of at least one Timeline")
    return found


def budget_line(timeline: Timeline, plan: Plan | None) -> int | None:
    """Where the budget is in a picture of a plan's timeline: what is for the step, and what is drawn above it."""
    return None if plan is None else plan.budget.available + max(timeline.beside, default=0)
