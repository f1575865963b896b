"""The CPU allocator's events, from torch's profiler.

A process can have one profiler. A window (window.py) that has it gives way to whatever else needs it: `interrupt`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

FREED, MARK = "memplan: freed ", "memplan: mark "
_BARE = {f"aten::{op}" for op in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_")}

gives_way: list[Callable[[], None]] = []  # how to end what has the profiler; as many as there are profilers


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
    mark: int | None = None  # a place that `mark` marked, and nothing else


def mark(number: int) -> None:
    """Mark a place in the sequence of events, if a profile is running."""
    with torch._C._profiler._RecordFunctionFast(f"{MARK}{number}"):
        pass


def allocator_profile() -> torch.profiler.profile:
    """torch's profiler, reporting what the CPU's allocator does; not started."""
    # Kineto writes two lines to stderr at every start, at level 5. It looks at the variable once, when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    )


def events(profile: torch.profiler.profile) -> list[Event]:
    """A stopped profiler's allocator events, in order of time; each is named after the op that encloses it."""
    results = cast(Any, profile.profiler).kineto_results
    origin = results.trace_start_ns()
    found: list[tuple[int, Event]] = []
    todo = [(event, "", "") for event in reversed(results.experimental_event_tree())]
    while todo:
        event, name, phase = todo.pop()
        at = event.start_time_ns
        fields = event.extra_fields
        if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
            if fields.device.type == "cpu":
                found.append((at, Event((at - origin) / 1e9, fields.ptr, fields.alloc_size, name or "python", phase)))
            continue
        if event.name.startswith(FREED):
            address = int(event.name.removeprefix(FREED))
            found.append((at, Event((at - origin) / 1e9, address, 0, name or "python", phase)))
            continue
        if event.name.startswith(MARK):
            number = int(event.name.removeprefix(MARK))
            found.append((at, Event((at - origin) / 1e9, 0, 0, "mark", phase, mark=number)))
            continue
        if phase not in ("backward", "optimizer"):
            phase = _phase(event.name)
        if not name or event.name not in _BARE:
            name = event.name.removeprefix("autograd::engine::evaluate_function: ")
        todo.extend((child, name, phase) for child in reversed(event.children))
    found.sort(key=lambda e: e[0])
    return [event for _, event in found]


def _phase(name: str) -> str:
    if name.startswith("autograd::engine::"):
        return "backward"
    return "optimizer" if name.startswith("Optimizer.") else "forward"
