"""Out of memory, explained: what was alive, from which lines, how much was asked for, and what would fit.

    with memplan.on_oom("oom.html"):
        for batch in batches:
            train(batch)

In: any code, planned or not. Out: when it runs out of memory, its last timeline as a file, and a note on the error.
A step that memplan has compiled has such a note by itself, of what was planned (planned_oom.py). What was recorded is
more exact, and its note takes the place of that one.
What must hold: the error that leaves the block is the one that was raised in it, whatever happens to the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator

import torch

from memplan import report
from memplan.ir import Block, Timeline
from memplan.report.text import at_moment, beside, block_line, folded
from memplan.runtime.free import free_bytes
from memplan.runtime.recorder import recordable
from memplan.runtime.rolling import Rolling
from memplan.units import human, parse_bytes

LARGEST = 8  # tensors named in the note, equal ones of equal layers as one
PLANNED = "memplan: out of memory in a planned step"  # how the note of what was planned begins


@contextlib.contextmanager
def on_oom(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Iterator[None]:
    """When the block runs out of memory, write its last timeline to `path` and note on the error what was alive.

    path: its suffix is the format, as in Timeline.save. device: default CUDA if there is one, otherwise the CPU.
    Raises MemplanError at entry if the path cannot be written, or a profiler or another recording is running. Errors of
    the block pass through as they are.
    On the CPU torch's profiler runs throughout, which costs 5 to 10 us an op: a third of the time where ops take 20 us,
    nothing to speak of where they take 1 ms. It stops while Dynamo compiles, and where another recording starts, up to
    the end of the next backward.
    """
    report.check_path(Timeline, path)
    recorder = Rolling(recordable(device))
    try:
        with recorder.hooks():
            yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # nothing may take the place of the error
            asked = bytes_asked(error)
            if asked is not None:
                _note(error, *_explain(recorder, path, asked))
            recorder.close()
        raise
    recorder.close()


def planned_notes(error: BaseException) -> list[str]:
    """The notes of what was planned, one at most."""
    return [note for note in getattr(error, "__notes__", ()) if note.startswith(PLANNED)]


def _note(error: BaseException, measured: bool, text: str) -> None:
    """Add what a recording says. One note is enough: what was measured, else what was planned."""
    planned = planned_notes(error)
    if measured or not planned:
        error.add_note(text)
        for note in planned:
            error.__notes__.remove(note)


def _explain(recorder: Rolling, path: str | os.PathLike[str], asked: int) -> tuple[bool, str]:
    """Whether there is a recording, and the note. It is one whatever fails here: the error itself matters more."""
    free = None
    try:
        free = free_bytes(recorder.device)  # before the report takes some of it
        seen = recorder.close()
        if seen is None:
            return False, f"memplan: {sizes(asked, free)}; no timeline: another profiler was running"
        text = _describe(seen.timeline, asked, free)
        report.save(dataclasses.replace(seen.timeline, title="out of memory", notes=(text,)), path)
    except Exception as failure:
        return False, f"memplan: {sizes(asked, free)}; no timeline: {type(failure).__name__}: {failure}"
    return True, f"{text}\n  the timeline up to here: {os.fspath(path)}"


def _describe(timeline: Timeline, asked: int, free: int | None) -> str:
    # What is freed after the last allocation may be freed because of the error.
    at = max((block.start for block in timeline.blocks), default=0)
    alive = folded(timeline.alive(at))
    total = timeline.totals[at] if timeline.moments else timeline.base_bytes
    kinds = ", ".join(f"{kind} {human(size)}" for kind, size in at_moment(timeline, at).items())
    lines = [f"memplan: {sizes(asked, free)}, beside {human(total)} alive: {kinds}"]
    lines += [f"  {block_line(block)}" for block in alive[:LARGEST]]
    lines += rest(alive[LARGEST:])
    lines += [f"  {line}" for line in beside(timeline, at)]
    if free is not None:
        size = total + free
        fits = human(size - size % 10 ** max(0, len(str(size)) - 4))  # four digits, and no more than is there
        lines.append(f'  a step inside {fits} would fit here: memplan.plan(step, batch, budget="{fits}")')
    return "\n".join(lines)


def rest(blocks: list[Block]) -> list[str]:
    """What is not named, in a line; none where nothing is left."""
    return [f"  {human(sum(b.bytes for b in blocks)):>10}  in others"] if blocks else []


def sizes(asked: int, free: int | None) -> str:
    """What was wanted and what was there."""
    wanted = f"asked for {human(asked)}" if asked else "out of memory"
    return wanted if free is None else f"{wanted} where {human(free)} was free"


def bytes_asked(error: BaseException) -> int | None:
    """The bytes that an error, or one that it was raised from, could not get; 0: unknown; None: it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return parse_bytes(found[1].replace("bytes", "B")) if found else 0
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text and "memory" in text:
        found = re.search(r"tried to allocate (\d+) bytes", text)
        return int(found[1]) if found else 0
    return bytes_asked(error.__cause__) if error.__cause__ is not None else None
