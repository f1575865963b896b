"""Timelines as a Perfetto trace, for ui.perfetto.dev: counters of bytes, and slices for phases, ops and waiting.

In: a Plan, a Timeline or several. Out: the bytes of a .perfetto-trace, a process for each timeline.

Perfetto's format is protobuf (github.com/google/perfetto, protos/perfetto/trace): few messages are needed, so they are
encoded here: a field is its key, number << 3 | type, then a varint (type 0) or a length and bytes (type 2).
Time is the timeline's own, in nanoseconds; where it says nothing, a microsecond a moment.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

from memplan.ir import Block, Plan, Timeline
from memplan.report.scale import COLOURS, HELD, edges, phases, timelines

# Numbers of fields and values, by message.
PACKET, TIMESTAMP, SEQUENCE, EVENT, TRACK = 1, 8, 10, 11, 60  # Trace.packet, and TracePacket
KIND, OF, COUNTER_VALUE, NAME = 9, 11, 30, 23  # TrackEvent
BEGIN, END, COUNTER = 1, 2, 4  # TrackEvent.Type
UUID, TRACK_NAME, PROCESS, PARENT, COUNTER_TRACK = 1, 2, 3, 5, 8  # TrackDescriptor
PID, PROCESS_NAME, UNIT, BYTES = 1, 6, 3, 3  # ProcessDescriptor, CounterDescriptor, and its Unit
TRACKS = 100  # of one timeline, at most: the next has the numbers from there


def trace(value: Plan | Timeline | Sequence[Timeline]) -> bytes:
    """The trace."""
    return b"".join(
        _field(PACKET, packet + _field(SEQUENCE, 1))
        for i, timeline in enumerate(timelines(value), start=1)
        for packet in _packets(timeline, i)
    )


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _packets(timeline: Timeline, pid: int) -> Iterator[bytes]:
    """The tracks of one timeline, then what is on them."""
    first = pid * TRACKS
    process = _field(PID, pid) + _field(PROCESS_NAME, f"{timeline.title} ({timeline.origin})")
    yield _field(TRACK, _field(UUID, first) + _field(PROCESS, process))
    ends, unit = edges(timeline)
    times = [int(end * (1e3 if unit == "moments" else 1e6)) for end in ends]
    slices = {"phases": _phases(timeline), "ops": _ops(timeline)}
    for track, (name, runs) in enumerate(slices.items(), start=first + 1):
        yield _field(TRACK, _field(UUID, track) + _field(PARENT, first) + _field(TRACK_NAME, name))
        for what, start, end in runs:
            yield from _slice(track, what, times[start], times[end])
    if any(moment.stall for moment in timeline.moments):
        track = first + 3
        yield _field(TRACK, _field(UUID, track) + _field(PARENT, first) + _field(TRACK_NAME, "waiting for copies"))
        for time, moment in zip(times, timeline.moments, strict=False):
            if moment.stall:
                yield from _slice(track, f"before {moment.name}", time, time + int(1e9 * moment.stall))
    for track, (name, sizes) in enumerate(_counters(timeline).items(), start=first + 10):
        counter = _field(TRACK_NAME, name) + _field(COUNTER_TRACK, _field(UNIT, BYTES))
        yield _field(TRACK, _field(UUID, track) + _field(PARENT, first) + counter)
        for at, size in sizes:
            yield _event(track, COUNTER, times[at], _field(COUNTER_VALUE, size))


def _event(track: int, kind: int, time: int, more: bytes = b"") -> bytes:
    return _field(TIMESTAMP, time) + _field(EVENT, _field(KIND, kind) + _field(OF, track) + more)


def _slice(track: int, name: str, start: int, end: int) -> Iterator[bytes]:
    yield _event(track, BEGIN, start, _field(NAME, name))
    yield _event(track, END, end)


def _phases(timeline: Timeline) -> Iterator[tuple[str, int, int]]:
    return ((phase, start, end) for phase, start, end in phases(timeline.moments) if phase)


def _ops(timeline: Timeline) -> Iterator[tuple[str, int, int]]:
    """Runs of moments of one name: an op that allocates twice is one slice."""
    for name, run in itertools.groupby(enumerate(timeline.moments), key=lambda pair: pair[1].name):
        members = [i for i, _ in run]
        yield name, members[0], members[-1] + 1


def _counters(timeline: Timeline) -> dict[str, list[tuple[int, int]]]:
    """Name -> (moment, bytes) where they change: the total, every kind that has any, others, the host."""
    base = dict(timeline.base)
    kinds = {kind: [b for b in timeline.blocks if b.kind == kind] for kind in COLOURS}
    out = {"total": _changes(timeline.blocks, timeline.base_bytes, timeline)}
    out |= {kind: _changes(b, base.get(kind, 0), timeline) for kind, b in kinds.items() if b or base.get(kind)}
    apart = {HELD[0]: timeline.others, "on the host": timeline.host}
    return out | {name: _changes(blocks, 0, timeline) for name, blocks in apart.items() if blocks}


def _changes(blocks: Sequence[Block], base: int, timeline: Timeline) -> list[tuple[int, int]]:
    change: dict[int, int] = defaultdict(int, {0: base})
    for block in blocks:
        change[block.start] += block.bytes
        change[block.end] -= block.bytes
    moments = [m for m in sorted(change) if m == 0 or (change[m] and m < len(timeline.moments))]
    return [*zip(moments, itertools.accumulate(change[m] for m in moments), strict=True)]
