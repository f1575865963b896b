"""What people read of a plan or a timeline: one small writer per format, over the frozen data alone.

table(plan)      one table, equal layers folded, and whether it fits
summary(value)   where the bytes of a timeline are at its peak
save(value, path)  .json, .html, .png, .pickle or .perfetto-trace, by suffix
compare(a, b)    two timelines, predicted or measured
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from memplan import serialize
from memplan.errors import MemplanError
from memplan.ir import Plan, Step, Timeline
from memplan.report.comparison import Comparison, compare
from memplan.report.html import page
from memplan.report.perfetto import trace
from memplan.report.png import draw
from memplan.report.ranking import Ranking, Row
from memplan.report.snapshot import dump
from memplan.report.text import summary, table

__all__ = ["Comparison", "Ranking", "Row", "check_path", "compare", "save", "summary", "table"]

# Of a Plan, a Timeline or several.
_PICTURES: dict[str, Callable[[Plan | Timeline | Sequence[Timeline]], str | bytes]] = {
    ".html": page,
    ".png": draw,
    ".pickle": dump,
    ".perfetto-trace": trace,
}


def save(value: Step | Plan | Timeline | Sequence[Timeline], path: str | os.PathLike[str]) -> None:
    """Write a value in the format of the path's suffix, whole or not at all."""
    check_path(type(value), path)
    suffix = Path(path).suffix.lower()
    if isinstance(value, Step) or (suffix == ".json" and isinstance(value, (Plan, Timeline))):
        serialize.write(path, serialize.to_json(value))
    else:
        serialize.write(path, _PICTURES[suffix](value))


def check_path(kind: type, path: str | os.PathLike[str]) -> None:
    """Raises MemplanError when a value of this type cannot be written as, or where, the path says."""
    own = {Step: (".json",), Ranking: (".json", ".png", ".html")}
    own |= {Plan: (".json", *_PICTURES), Timeline: (".json", *_PICTURES)}
    formats = own.get(kind, (*_PICTURES,))
    if Path(path).suffix.lower() not in formats:
        known = ", ".join(formats[:-1]) + " and " + formats[-1] if len(formats) > 1 else formats[0]
        raise MemplanError(f"cannot write a {kind.__name__} as {os.fspath(path)!r}: the formats are {known}")
    if Path(path).is_dir():
        raise MemplanError(f"cannot write {os.fspath(path)!r}: it is a folder; name a file in it")
    if not os.access(Path(path).absolute().parent, os.W_OK):
        raise MemplanError(f"cannot write {os.fspath(path)!r}: name a folder that exists and is writable")
