"""Timelines as one HTML page that needs no network: timeline.html beside this file, with the data put into it.

In: a Plan, a Timeline or several. Out: the text of the page. Its data is JSON, by columns, every string once:

    texts   the strings that the columns below index
    kinds   [name, colour], from the bottom of the stack; on top of it what others hold, which is hatched; the last is
            the host's, which is not stacked
    series  for each timeline its edges (see scale.py), bytes of its base by kind, moments and blocks

What must hold: nothing in a name can end the script that the data is in, or be read as HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from memplan.ir import Plan, Timeline
from memplan.report.scale import COLOURS, HELD, budget_line, edges, timelines
from memplan.report.text import shape_dtype

_KINDS = [*COLOURS]


def page(value: Plan | Timeline | Sequence[Timeline]) -> str:
    """The page that shows one timeline, or several laid over each other."""
    texts: dict[str, int] = {}

    def column(words: Iterable[str]) -> list[int]:
        return [texts.setdefault(word, len(texts)) for word in words]

    plan = value if isinstance(value, Plan) else None
    series = [_series(timeline, plan, column) for timeline in timelines(value)]
    kinds = [*COLOURS.items(), HELD, ("on the host", "dimgray")]
    text = json.dumps({"texts": [*texts], "kinds": kinds, "series": series}, separators=(",", ":"), allow_nan=False)
    template = files("memplan.report").joinpath("timeline.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", text.replace("<", "\\u003c"))  # "<" is only ever inside a JSON string


def _series(timeline: Timeline, plan: Plan | None, column: Any) -> dict[str, Any]:
    ends, unit = edges(timeline)
    base = dict(timeline.base)
    moments = timeline.moments
    stalls = [moment.stall for moment in moments]
    instead = {plan.step.tensors[t].name: reason for t, reason in plan.instead.items()} if plan else {}
    return {
        "title": timeline.title,
        "origin": timeline.origin,
        "unit": unit,
        "budget": budget_line(timeline, plan),
        "notes": timeline.notes,
        "edges": [round(end, 6) for end in ends],  # milliseconds, to the nanosecond
        "base": [*(base.get(kind, 0) for kind in _KINDS), 0, 0],
        "moments": {
            "name": column(moment.name for moment in moments),
            "phase": column(moment.phase for moment in moments),
            "stall": stalls if any(stalls) else [],
        },
        "blocks": _blocks(timeline, instead, column),
    }


def _blocks(timeline: Timeline, instead: Mapping[str, str], column: Any) -> dict[str, list[int]]:
    kinds = [_KINDS.index(block.kind) for block in timeline.blocks]
    kinds += [len(_KINDS)] * len(timeline.others) + [len(_KINDS) + 1] * len(timeline.host)
    blocks = [*timeline.blocks, *timeline.others, *timeline.host]
    return {
        "bytes": [block.bytes for block in blocks],
        "kind": kinds,
        "start": [block.start for block in blocks],
        "end": [block.end for block in blocks],
        "name": column(block.name for block in blocks),
        "what": column(shape_dtype(block.shape, block.dtype) for block in blocks),
        "decision": column(block.decision for block in blocks),
        "instead": column(instead.get(block.name, "") if block.decision else "" for block in blocks),
        "layer": column(block.layer for block in blocks),
        "source": column(block.source for block in blocks),
    }
