"""Machine files: what `memplan calibrate` has measured, as JSON that `machine=` takes by path.

    {"memplan": "Machine", "schema": 3, "value": {fields of ir.Machine}, "measured": {...}}

In: a path. Out: a Machine whose rates are positive and finite. `measured` says when, on what and which figures; it is
for people, and nothing here reads it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from memplan import serialize
from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Machine

AGAIN = "write it again with `memplan calibrate`"
_ENTRIES = {"memplan", "schema", "value", "measured"}


def load(path: str | os.PathLike[str], names: Collection[str] = ()) -> Machine:
    """The machine of a file. Raises MemplanError, with the path, for a file that is not there, damaged, of another
    version, or with rates that no machine has. `names`: what else might have been meant.
    """
    place = Path(path)
    if not place.is_file():
        what = "a directory" if place.is_dir() else "not there"
        beside = [str(p) for p in place.parent.glob("*.json")] if place.parent.is_dir() else []
        guess = did_you_mean(str(place), [*beside, *names])
        raise MemplanError(f"machine {str(place)!r} is {what}: give a file that `memplan calibrate` wrote{guess}")
    found = serialize.load(place, Machine)
    for problem in _problems(json.loads(place.read_text()), found):
        raise MemplanError(f"machine file {str(place)!r} {problem}; {AGAIN}")
    return found


def save(machine: Machine, measured: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write it whole or not at all."""
    document = json.loads(serialize.to_json(machine)) | {"measured": dict(measured)}
    serialize.write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _problems(document: Mapping[str, Any], machine: Machine) -> Iterator[str]:
    for name in sorted(document.keys() - _ENTRIES):
        yield f"has an entry {name!r} that is not known: there are {', '.join(sorted(_ENTRIES))}"
    if "float32" not in machine.rates:
        yield "has no rate of float32, which prices what has no rate of its own"
    given = document["value"]
    rates = [(name, given[name]) for name in ("bandwidth", "host_bandwidth", "disk_bandwidth") if name in given]
    rates += [(f"{table}[{dtype!r}]", rate) for table in ("flops", "attention") for dtype, rate in given.get(table, ())]
    for name, rate in [*rates, ("memory_bytes", machine.memory_bytes)]:
        if not 0 < rate < math.inf:
            yield f"has {name} {rate:g}: a rate, or a size, is a finite number above 0"
    shares = [(f"workspace_rules[{op!r}]", factor) for op, factor in machine.workspace_rules]
    shares += [("contention", machine.contention), ("context_bytes", machine.context_bytes)]
    for name, value in shares:
        if not 0 <= value < math.inf:
            yield f"has {name} {value:g}: it is a finite number, 0 or above"
