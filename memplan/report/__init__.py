"""What people read of a plan or a timeline: one small writer per format, over the frozen data alone.

table(plan)      one table, equal layers folded, and whether it fits
summary(value)   where the bytes of a timeline are at its peak
save(value, path)  .json or .png, by suffix
compare(a, b)    two timelines, predicted or measured
"""

import os
from collections.abc import Sequence
from pathlib import Path

from memplan import serialize
from memplan.errors import MemplanError
from memplan.ir import Plan, Step, Timeline
from memplan.report.comparison import Comparison, compare
from memplan.report.png import draw
from memplan.report.text import summary, table

__all__ = ["Comparison", "compare", "save", "summary", "table"]


def save(value: Step | Plan | Timeline | Sequence[Timeline], path: str | os.PathLike[str]) -> None:
    """Write .json (of a Step, Plan or Timeline) or .png (of a Plan, a Timeline or several), whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json" and isinstance(value, (Step, Plan, Timeline)):
        serialize.write(path, serialize.to_json(value))
    elif suffix == ".png" and not isinstance(value, Step):
        serialize.write(path, draw(value))
    else:
        what = type(value).__name__
        formats = {"Step": ".json", "Plan": ".json and .png", "Timeline": ".json and .png"}.get(what, ".png")
        raise MemplanError(f"cannot write a {what} as {os.fspath(path)!r}: the formats are {formats}")
