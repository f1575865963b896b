"""Timelines as a snapshot of torch's CUDA allocator, for pytorch.org/memory_viz and torch.cuda._memory_viz.

In: a Plan, a Timeline or several. Out: the bytes of a pickle like that of torch.cuda.memory._dump_snapshot, with a
device for each timeline.

A timeline has no addresses, so they are made up: what is freed leaves its place to the next block of the same size,
and one segment holds all places. Bytes and their order are the timeline's; fragmentation is not.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from memplan.ir import Block, Plan, Timeline
from memplan.report.scale import edges, timelines
from memplan.report.text import shape_dtype

START = 1 << 32  # of the segment: an address that is none


def dump(value: Plan | Timeline | Sequence[Timeline]) -> bytes:
    """The pickle. Protocol 4: the viewer in the browser reads no later one."""
    shown = timelines(value)
    traces, segments = zip(*(_device(timeline, i) for i, timeline in enumerate(shown)), strict=True)
    snapshot = {"segments": [s for s in segments if s["blocks"]], "device_traces": [*traces], "allocator_settings": {}}
    return pickle.dumps(snapshot, protocol=4)


def _device(timeline: Timeline, device: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a timeline, and the segment as they leave it."""
    ends, count = edges(timeline)[0], len(timeline.moments)
    base = [Block(f"{kind}, throughout", size, kind, 0, count + 1) for kind, size in timeline.base]
    blocks = [block for block in [*base, *timeline.blocks] if block.bytes and block.start < block.end]
    changes: dict[int, tuple[list[Block], list[Block]]] = defaultdict(lambda: ([], []))  # moment -> freed, allocated
    for block in blocks:
        changes[block.end][0].append(block)
        changes[block.start][1].append(block)

    places: dict[int, list[tuple[int, list[dict[str, Any]]]]] = defaultdict(list)  # bytes -> free (address, frames)
    taken: dict[int, tuple[int, list[dict[str, Any]]]] = {}  # id of a block -> (address, frames)
    events: list[dict[str, Any]] = []
    reach = START

    def event(action: str, block: Block, moment: int) -> None:
        address, frames = taken[id(block)]
        at = {"action": action, "addr": address, "size": block.bytes, "stream": 0, "frames": frames}
        events.append(at | {"time_us": int(1e3 * ends[moment]), "category": block.kind})

    for moment in sorted(m for m in changes if m <= count):
        freed, allocated = changes[moment]
        for block in freed if moment < count else []:  # what ends with the timeline is still there
            event("free_requested", block, moment)
            event("free_completed", block, moment)
            places[block.bytes].append(taken.pop(id(block)))
        for block in allocated:
            if places[block.bytes]:
                address = places[block.bytes].pop()[0]
            else:
                address, reach = reach, reach + block.bytes
            taken[id(block)] = address, _frames(block)
            event("alloc", block, moment)
    # The viewer in the browser fails on categories that do not include this one.
    events.append({"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": [], "category": "unknown"})
    return events, _segment(device, reach, [(taken[id(b)][0], b) for b in blocks if id(b) in taken])


def _segment(device: int, reach: int, alive: list[tuple[int, Block]]) -> dict[str, Any]:
    """All places as one segment: what is alive at the end, and what is free between."""
    blocks, address = [], START

    def add(size: int, state: str, frames: list[dict[str, Any]]) -> None:
        if size:
            what = {"address": address, "size": size, "requested_size": size, "state": state, "frames": frames}
            blocks.append(what)

    for at, block in sorted(alive, key=lambda pair: pair[0]):
        add(at - address, "inactive", [])
        address = at
        add(block.bytes, "active_allocated", _frames(block))
        address += block.bytes
    add(reach - address, "inactive", [])
    active = sum(block.bytes for _, block in alive)
    sizes = {"total_size": reach - START, "allocated_size": active, "active_size": active, "requested_size": active}
    where = {"device": device, "address": START, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0)}
    return where | sizes | {"is_expandable": False, "frames": [], "blocks": blocks}


def _frames(block: Block) -> list[dict[str, Any]]:
    """What a block is and the user's line, as a stack, innermost first."""
    what = " ".join(part for part in (block.name, shape_dtype(block.shape, block.dtype), block.decision) if part)
    frames = [{"name": what, "filename": block.layer or block.kind, "line": 0}]
    if line := re.fullmatch(r"(.*):(\d+)(?: in (.*))?", block.source):
        frames.append({"name": line[3] or "", "filename": line[1], "line": int(line[2])})
    return frames
