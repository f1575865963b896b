"""The snapshot is one to torch: its functions accept it, and what they add up is the timeline's."""

import json
import pickle
import pickletools
import re
import warnings

import torch
from torch.cuda import _memory_viz as viz

from memplan import report
from memplan.ir import Block, Moment, Timeline
from memplan.report.snapshot import dump
from memplan.runtime.recorder import record

MIB = 1 << 20
# What torch/utils/viz/MemoryViz.js unpickles.
OPCODES = """
    APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT EMPTY_LIST EMPTY_TUPLE FRAME
    LIST LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE PROTO SETITEM SETITEMS SHORT_BINUNICODE STOP
    TUPLE TUPLE1 TUPLE2 TUPLE3
"""


def step():
    weight = torch.nn.Parameter(torch.ones(256, 1024))
    with record("cpu") as seen:
        kept = (torch.ones(64, 256) @ weight).sin()
        kept.sum().backward()
    del kept
    return seen.timeline


def replayed(events):
    """Bytes after each run of events at one time, told from the actions alone; no place is taken twice."""
    alive, totals = {}, []
    for event in events:
        if event["action"] == "alloc":
            assert all(event["addr"] + event["size"] <= a or a + s <= event["addr"] for a, s in alive.items())
            alive[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            assert alive.pop(event["addr"]) == event["size"]
        totals.append(sum(alive.values()))
    return totals, alive


def lines(text):
    """torch's flame graphs without the script that draws them: stack -> bytes."""
    return {line.rpartition(" ")[0]: int(line.rpartition(" ")[2]) for line in text.splitlines()}


def test_bytes_are_the_timelines():
    timeline = step()
    snapshot = pickle.loads(dump(timeline))
    totals, alive = replayed(snapshot["device_traces"][0])
    assert max(totals) == timeline.peak
    assert totals[-1] == timeline.totals[-1]
    (segment,) = snapshot["segments"]
    at, active = segment["address"], {}
    for block in segment["blocks"]:
        assert block["address"] == at
        at += block["size"]
        active |= {block["address"]: block["size"]} if block["state"] == "active_allocated" else {}
    assert at == segment["address"] + segment["total_size"]
    assert active == alive


def test_torch_reads_it(tmp_path):
    timeline = step()
    timeline.save(tmp_path / "step.pickle")
    snapshot = pickle.loads((tmp_path / "step.pickle").read_bytes())
    sizes = re.search(r"total_allocated: (\S+)", viz.segsum(snapshot))
    assert sizes[1] == repr(viz.Bytes(timeline.totals[-1]))
    assert viz.trace(snapshot).startswith("Device 0")
    for plot in (viz.trace_plot, viz.segment_plot):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            embedded = json.loads(re.search(r"local_files = (.*)", plot(snapshot))[1])
        assert embedded[0]["name"] == "snapshot.pickle"
    stacks = lines(viz.memory(snapshot, format_flamegraph=str))
    assert sum(size for stack, size in stacks.items() if "active_allocated" in stack) == timeline.totals[-1]
    gradient = next(b for b in timeline.blocks if b.kind == "gradient")
    assert any("gradient:0:" + gradient.name in stack for stack in stacks)
    assert viz.segments(snapshot, format_flamegraph=str)
    assert viz.compare(snapshot["segments"], [], format_flamegraph=str)
    left = viz.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    assert sum(event["size"] for event in left if event["action"] == "alloc") == timeline.totals[-1]


def test_the_browsers_viewer_reads_what_it_can(tmp_path):
    """It has an unpickler of its own, a category "unknown" must be there, and every block lies in a segment."""
    timeline = step()
    report.save([timeline, timeline], tmp_path / "two.pickle")
    data = (tmp_path / "two.pickle").read_bytes()
    assert data[:2] == b"\x80\x04"
    assert {opcode.name for opcode, *_ in pickletools.genops(data)} <= {*OPCODES.split()}
    snapshot = pickle.loads(data)
    assert len(snapshot["device_traces"]) == 2 and [s["device"] for s in snapshot["segments"]] == [0, 1]
    for events, segment in zip(snapshot["device_traces"], snapshot["segments"], strict=True):
        assert "unknown" in {event["category"] for event in events}
        end = segment["address"] + segment["total_size"]
        assert all(segment["address"] <= e["addr"] and e["addr"] + e["size"] <= end for e in events if e["size"])


def test_frames_are_the_users_line():
    block = Block(
        "mm_1", MIB, "activation", 0, 1, "keep", (2, 3), "float32", "C:/a b/train.py:12 in [loss]", "model.mlp"
    )
    snapshot = pickle.loads(dump(Timeline("one", "predicted", (Moment("a", 0.0),), (block,))))
    frames = snapshot["device_traces"][0][0]["frames"]
    assert frames == [
        {"name": "mm_1 f32[2, 3] keep", "filename": "model.mlp", "line": 0},
        {"name": "[loss]", "filename": "C:/a b/train.py", "line": 12},
    ]


def test_an_empty_timeline():
    snapshot = pickle.loads(dump(Timeline("none", "measured", (), ())))
    assert snapshot["segments"] == [] and "total_reserved: 0.0B" in viz.segsum(snapshot)
