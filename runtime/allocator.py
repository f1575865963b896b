"""The CPU allocator's events, from torch's profiler.

A process can have one profiler. A window (window.py) that has it gives way to whatever else needs it: `interrupt`.

What must hold: no profiler starts inside of an op, a compiled region or another scope that began under an earlier
one. Where such a scope ends, torch writes the time into memory of the earlier profiler, which is freed (seen with torch
2.13): into whatever tensor has it now. What may have to start there sees no scopes: AllocatorLog.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope

FREED = "memplan: freed "
_BARE = {f"aten::{op}" for op in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")}
# Files in which no line is the user's: torch's, memplan's, and what Dynamo and Inductor generate.
_LIBRARY = re.compile(r"(^|/)(torch|memplan/passes|memplan/runtime)/|^<|(^|/)c[a-z2-7]{40,}\.py$")
_PYTHON = (torch._C._profiler._ExtraFields_PyCall, torch._C._profiler._ExtraFields_PyCCall)

gives_way: list[Callable[[], None]] = []  # how to end what has the profiler; as many as there are profilers
still_open: list[Callable[[], bool]] = []  # whether something runs that a profiler which has ended saw the beginning of


def may_start() -> bool:
    """Whether a profiler may start here, and run on."""
    return not any(runs() for runs in still_open)


def interrupt() -> None:
    """Free the profiler, if it is in the hands of one that gives way."""
    for end in list(gives_way):
        end()


@dataclass(frozen=True)
class Event:
    """One allocator event. `bytes` > 0: allocated; < 0: freed; 0: a storage of the base at this address was freed."""

    seconds: float
    address: int
    bytes: int
    name: str
    phase: str = ""
    source: str = ""
    layer: str = ""
    mark: int | None = None  # a place that was marked, and nothing else


class AllocatorLog:
    """The events from here to `stop`, without the names of ops, and marks between them. It may start, and stop, inside
    of anything but a backward.
    """

    _NOWHERE = RecordScope.LITE_INTERPRETER  # a scope that nothing here runs in
    _MARK = 7919  # bytes: a mark is an allocation of a size that hardly anything else has

    def __init__(self) -> None:
        _quiet()
        self.marks: list[int] = []  # their addresses
        config = torch.autograd.profiler.profile(profile_memory=True).config()  # type: ignore[no-untyped-call]
        activities = {torch.profiler.ProfilerActivity.CPU}
        _prepare_profiler(config, activities)
        _enable_profiler(config, activities, {self._NOWHERE})  # type: ignore[call-arg]  # its stub lacks the last

    def mark(self) -> None:
        """Mark a place in the sequence of events; marks are numbered from 0."""
        self.marks.append(torch.empty(self._MARK, dtype=torch.uint8).data_ptr())

    def stop(self) -> list[Event]:
        """What was seen, in order of time."""
        results = cast(Any, _disable_profiler())
        allocations = [e for e in results.experimental_event_tree() if e.name == "[memory]"]
        found, number, marked = list[Event](), 0, 0
        for event in sorted(allocations, key=lambda e: e.start_time_ns):
            seconds, what = (event.start_time_ns - results.trace_start_ns()) / 1e9, event.extra_fields
            if what.device.type != "cpu":
                continue
            if what.alloc_size == self._MARK and what.ptr == next(iter(self.marks[number:]), 0):
                found.append(Event(seconds, 0, 0, "mark", mark=number))
                number, marked = number + 1, what.ptr
            elif what.alloc_size == -self._MARK and what.ptr == marked:  # its end
                marked = 0
            else:
                found.append(Event(seconds, what.ptr, what.alloc_size, "python"))
        return found


def _quiet() -> None:
    """Kineto writes two lines to stderr at every start, at level 5. It looks at the variable once, when it starts."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def allocator_profile(lines: bool = False) -> torch.profiler.profile:
    """torch's profiler, reporting what the CPU's allocator does, with the Python calls around it if `lines`; not
    started.
    """
    _quiet()
    return _Profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True, with_stack=lines
    )


class _Profile(torch.profiler.profile):
    """Without acc_events, older versions of torch warn; with it, most of the time at the end goes into events for
    Python that nobody reads.
    """

    def stop(self) -> None:
        if self.profiler is not None:
            self.profiler.acc_events = False
        super().stop()


def events(profile: torch.profiler.profile, layers: Mapping[int, str] | None = None) -> list[Event]:
    """A stopped profiler's allocator events, in order of time; each is named after the op that encloses it.

    `layers`: the names of modules, by id. They and source lines are known where the profile has Python's calls.
    """
    results = cast(Any, profile.profiler).kineto_results
    origin = results.trace_start_ns()
    found: list[tuple[int, Event]] = []
    todo = [(event, "", "", "", "") for event in reversed(results.experimental_event_tree())]
    while todo:
        event, name, phase, source, layer = todo.pop()
        at = event.start_time_ns
        fields = event.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            if fields.device.type == "cpu":
                what = (fields.ptr, fields.alloc_size, name or "python", phase, source, layer)
                found.append((at, Event((at - origin) / 1e9, *what)))
            continue
        if isinstance(fields, _PYTHON):
            source = _source(fields) or source
            if isinstance(fields, torch._C._profiler._ExtraFields_PyCall) and fields.module is not None:
                layer = (layers or {}).get(fields.module.self_ptr, layer)
            todo.extend((child, name, phase, source, layer) for child in reversed(event.children))
            continue
        if event.name.startswith(FREED):
            address = int(event.name.removeprefix(FREED))
            found.append((at, Event((at - origin) / 1e9, address, 0, name or "python", phase)))
            continue
        if phase not in ("backward", "optimizer"):
            phase = _phase(event.name)
        if not name or event.name not in _BARE:
            name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        todo.extend((child, name, phase, source, layer) for child in reversed(event.children))
    found.sort(key=lambda e: e[0])
    return [event for _, event in found]


def _source(call: Any) -> str:
    """The user's line of a Python call: that of the function called, if it is theirs, or where it is called.

    Operators make no calls: for what `a @ b` allocates, that is the line of the function it is in.
    """
    own = [call.callsite] if isinstance(call, torch._C._profiler._ExtraFields_PyCall) else []
    for frame in (*own, call.caller):
        try:
            file, line = frame.file_name, f"{frame.line_number} in {frame.function_name}"
        except UnicodeDecodeError:  # of a frame that began before the profiler, torch's names may be of freed memory
            continue
        top = file.partition("/")[0].removesuffix(".py")
        if top not in sys.stdlib_module_names and not _LIBRARY.search(file):
            return f"{file}:{line}"
    return ""


def _phase(name: str) -> str:
    if name.startswith("autograd::engine::"):
        return "backward"
    return "optimizer" if name.startswith("Optimizer.") else "forward"
