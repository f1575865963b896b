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

__all__ = ["Comparison", "check_path", "compare", "save", "summary", "table"]


def save(value: Step | Plan | Timeline | Sequence[Timeline], path: str | os.PathLike[str]) -> None:
    """Write .json (of a Step, Plan or Timeline) or .png (of a Plan, a Timeline or several), whole or not at all."""
    check_path(type(value), path)
    if isinstance(value, Step) or (Path(path).suffix.lower() == ".json" and isinstance(value, (Plan, Timeline))):
        serialize.write(path, serialize.to_json(value))
    else:
        serialize.write(path, draw(value))


def check_path(kind: type, path: str | os.PathLike[str]) -> None:
    """Raises MemplanError when a value of this type cannot be written as, or where, the path says."""
    formats = {Step: (".json",), Plan: (".json", ".png"), Timeline: (".json", ".png")}.get(kind, (".png",))
    if Path(path).suffix.lower() not in formats:
        raise MemplanError(
            f"cannot write a {kind.__name__} as {os.fspath(path)!r}: the formats are {' and '.join(formats)}"
        )
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise MemplanError(f"cannot write {os.fspath(path)!r}: name a folder that exists and is writable")
