"""Out of memory in a planned step: what was planned to be alive there, and what would fit. No recording is needed.

    RuntimeError: ... you tried to allocate 67108864 bytes. Error code 12 (Cannot allocate memory)
    memplan: out of memory in a planned step: asked for 67.11 MB where 15.77 MB was free
      planned at mm_1 in forward: 276.8 MB: parameter 8.389 MB, input 67.11 MB, activation 201.3 MB
      ...

In: an error that compiled code raised, and where in the plan (passes/failed.py). Out: a note on it, and the plan's
timeline beside the file that the plan was saved to: plan.html -> plan.oom.html.
What must hold: the error goes on as it was raised, whatever happens here, and other errors have no note.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import torch

from memplan import report
from memplan.ir import Plan
from memplan.oom import LARGEST, PLANNED, bytes_asked, planned_notes, rest, sizes
from memplan.passes.failed import Failure
from memplan.report.text import at_moment, block_line, folded
from memplan.runtime.free import free_bytes
from memplan.units import human


def explain(error: Exception, find: Callable[[], Failure], out: str | None = None) -> None:
    """Note on the error of a planned step, if it is out of memory, what was planned there.

    find: where that was. out: the file that the plan was saved to, if it was.
    """
    with contextlib.suppress(Exception):
        asked = bytes_asked(error)
        if asked is None or planned_notes(error):
            return
        free = None
        try:
            free = free_bytes(torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu"))
            failure = find()
            text = f"{PLANNED}: {_describe(failure, asked, free)}"
        except Exception as failed:
            error.add_note(f"{PLANNED}: {sizes(asked, free)}; no more is known: {type(failed).__name__}: {failed}")
            return
        error.add_note(text + _saved(failure.plan, text, out))


def _describe(failure: Failure, asked: int, free: int | None) -> str:
    """What was planned to be alive at the place of a failure, and what would fit."""
    plan, at = failure.plan, failure.moment
    timeline, budget = plan.timeline, plan.budget
    here, peak = timeline.moments[at], timeline.moments[timeline.peak_moment]
    where = f"at {here.name} in {here.phase}" if failure.exact else f"in {here.phase}, at most at {here.name}"
    kinds = ", ".join(f"{kind} {human(size)}" for kind, size in at_moment(timeline, at).items())
    numbered = timeline.alive(at)  # mm_5, mm_12: the same in two layers
    alive = folded(dataclasses.replace(block, name=re.sub(r"_\d+$", "", block.name)) for block in numbered)
    lines = [
        sizes(asked, free),
        f"  planned {where}: {human(timeline.totals[at])}: {kinds}",
        *(f"  {block_line(block)}" for block in alive[:LARGEST]),
        *rest(alive[LARGEST:]),
        f"  planned peak {human(timeline.peak)} at {peak.name} in {peak.phase}, budget {human(budget.bytes)}, policy "
        f"{plan.policy}" + (f", for sizes {dict(plan.step.sizes)}" if plan.step.sizes else ""),
    ]
    if free is not None:
        room = timeline.totals[at] - asked + free  # what was asked for is planned there
        fits = f'options={{"budget": "{budget.needed_for(room)}B"}}'
        lines.append(f"  a step inside {human(room)} would fit here: {fits}" if room > timeline.base_bytes else "")
    return "\n".join(filter(None, lines))


def _saved(plan: Plan, text: str, out: str | None) -> str:
    """Write the plan with the note. Returns the line that says where."""
    if out is None:
        return ""
    path = Path(out).with_name(f"{Path(out).stem}.oom{Path(out).suffix}")
    try:
        title, notes = f"{plan.timeline.title}, out of memory", (*plan.timeline.notes, text)
        timeline = dataclasses.replace(plan.timeline, title=title, notes=notes)
        report.save(dataclasses.replace(plan, timeline=timeline).with_others(), path)
    except Exception as failed:
        return f"\n  no timeline: {type(failed).__name__}: {failed}"
    return f"\n  the plan's timeline: {path}"
