"""Out of memory, explained: what was alive, from which lines, how much was asked for, and what would fit.

    with memplan.on_oom("oom.html"):
        for batch in batches:
            train(batch)

In: any code, planned or not. Out: when it runs out of memory, its last timeline as a file, and a note on the error.
What must hold: the error that leaves the block is the one that was raised in it, whatever happens to the report.

Recording all of a long run would take ever more memory, so it starts anew after a backward, every few seconds. A loop
that never calls backward is recorded as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

from memplan import report
from memplan.errors import MemplanError
from memplan.ir import Block, Timeline
from memplan.report.text import at_moment, block_line, folded
from memplan.runtime.allocator import gives_way
from memplan.runtime.free import free_bytes
from memplan.runtime.recorder import Recording, record
from memplan.runtime.window import in_backward
from memplan.units import human, parse_bytes

SECONDS = 5.0  # of recording, after which the next end of a backward starts it anew
LARGEST = 8  # tensors named in the note, equal ones of equal layers as one


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
    recorder = _Recorder(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    try:
        with _after_backward(recorder.turn), _around_compiling(recorder.give_way, recorder.turn):
            yield
    except BaseException as error:
        asked = _asked(error)
        if asked is not None:
            error.add_note(_explain(recorder, path, asked))
        with contextlib.suppress(Exception):
            recorder.close()
        raise
    recorder.close()


def _explain(recorder: _Recorder, path: str | os.PathLike[str], asked: int) -> str:
    """The note on the error. It is one whatever fails here: the error itself matters more."""
    free = None
    try:
        free = free_bytes(recorder.device)  # before the report takes some of it
        seen = recorder.close()
        if seen is None:
            return f"memplan: {_sizes(asked, free)}; no timeline: another profiler was running"
        text = _describe(seen.timeline, asked, free)
        report.save(dataclasses.replace(seen.timeline, title="out of memory", notes=(text,)), path)
    except Exception as failure:
        return f"memplan: {_sizes(asked, free)}; no timeline: {type(failure).__name__}: {failure}"
    return f"{text}\n  the timeline up to here: {os.fspath(path)}"


def _describe(timeline: Timeline, asked: int, free: int | None) -> str:
    # What is freed after the last allocation may be freed because of the error.
    at = max((block.start for block in timeline.blocks), default=0)
    alive = folded(timeline.alive(at))
    total = timeline.totals[at] if timeline.moments else timeline.base_bytes
    kinds = ", ".join(f"{kind} {human(size)}" for kind, size in at_moment(timeline, at).items())
    lines = [f"memplan: {_sizes(asked, free)}, beside {human(total)} alive: {kinds}"]
    lines += [f"  {block_line(block)}" for block in alive[:LARGEST]]
    lines += _rest(alive[LARGEST:])
    if free is not None:
        fits = human(total + free)
        lines.append(f'  a step inside {fits} would fit here: memplan.plan(step, batch, budget="{fits}")')
    return "\n".join(lines)


def _rest(blocks: list[Block]) -> list[str]:
    return [f"  {human(sum(b.bytes for b in blocks)):>10}  in others"] if blocks else []


def _sizes(asked: int, free: int | None) -> str:
    wanted = f"asked for {human(asked)}" if asked else "out of memory"
    return wanted if free is None else f"{wanted} where {human(free)} was free"


def _asked(error: BaseException) -> int | None:
    """The bytes that an error, or one that it was raised from, could not get; 0: unknown; None: it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
        return parse_bytes(found[1]) if found else 0
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text and "memory" in text:
        found = re.search(r"tried to allocate (\d+) bytes", text)
        return int(found[1]) if found else 0
    return _asked(error.__cause__) if error.__cause__ is not None else None


class _Recorder:
    """A recording that is started anew from time to time, and gives way to whoever else needs the profiler."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.thread = threading.get_ident()  # a profile can only be stopped where it was started
        self.running = contextlib.ExitStack()
        self.seen: Recording | None = None
        self.closed = False
        self._start()

    def _start(self) -> None:
        self.seen = self.running.enter_context(record(self.device, lines=True))
        self.running.callback(gives_way.remove, self.give_way)
        gives_way.append(self.give_way)
        self.since = time.monotonic()

    def turn(self, _: Any = None) -> None:
        """Start anew, if that is due and possible."""
        if self.closed or in_backward() or threading.get_ident() != self.thread:
            return
        if self.seen is None or time.monotonic() - self.since > SECONDS:
            self.give_way()
            with contextlib.suppress(MemplanError):  # somebody else's profiler: the next turn tries again
                self._start()

    def give_way(self, _: Any = None) -> None:
        """Stop recording, up to the next turn; what was seen is dropped."""
        if not in_backward() and threading.get_ident() == self.thread:
            self.running.close()
            self.seen = None

    def close(self) -> Recording | None:
        """Stop for good. Returns what was seen since the last start."""
        self.closed = True
        self.running.close()
        return self.seen


@contextlib.contextmanager
def _after_backward(do: Any) -> Iterator[None]:
    """Call a function after each torch.autograd.backward, which Tensor.backward calls too."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        do()

    torch.autograd.backward = ours
    try:
        yield
    finally:
        if torch.autograd.backward is ours:  # and not what somebody has put over it
            torch.autograd.backward = original


@contextlib.contextmanager
def _around_compiling(before: Any, after: Any) -> Iterator[None]:
    """Call functions where Dynamo starts and ends to compile: it makes far more Python calls than any step."""
    callback_handler.register_start_callback(before)
    callback_handler.register_end_callback(after)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() has removed them
            callback_handler.remove_start_callback(before)
            callback_handler.remove_end_callback(after)
