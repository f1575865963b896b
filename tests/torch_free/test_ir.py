"""What is saved is read back equal; what cannot be read whole is refused, and nothing is left half-written."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import MemplanError
from memplan.ir import (
    KINDS,
    Block,
    Bound,
    Budget,
    Gap,
    Graph,
    Held,
    Keep,
    Loop,
    Machine,
    Moment,
    Offload,
    Op,
    Plan,
    Polynomial,
    Recompute,
    Run,
    Step,
    Tensor,
    Timeline,
)
from memplan.report import summary
from memplan.serialize import from_json, to_json, write

REAL = st.floats(allow_nan=False, allow_infinity=False)
KIND = st.sampled_from(KINDS)
INTEGERS = st.integers(-(2**70), 2**70)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(values, max_size=3).map(tuple)


def every(kind: type, /, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of a dataclass with every field varied: as given here, or by its type."""
    return st.builds(kind, **{f.name: fields.get(f.name, ...) for f in dataclasses.fields(kind)})


INDICES = some(st.integers(0, 9))
TENSOR = every(
    Tensor,
    bytes=INTEGERS,
    kind=KIND,
    shape=INDICES,
    formula=st.none()
    | every(Polynomial, terms=some(st.tuples(INTEGERS, some(st.tuples(st.text(), st.integers(0, 3)))))),
)


def graphs(body: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    op = every(
        Op, inputs=INDICES, outputs=INDICES, fusion=st.sampled_from(("pointwise", "reduction", "extern")), body=body
    )
    return every(Graph, ops=some(op), inputs=INDICES, outputs=INDICES)


def runnable(step: Step) -> Step:
    """The same, less what cannot run (memplan/sound.py): storages that are not there, or are made twice."""
    there = {t for t in step.resident if t < len(step.tensors)}

    def some_of(graph: Graph) -> Graph:
        there.update(inputs := [t for t in graph.inputs if t < len(step.tensors)])
        ops = []
        for op in graph.ops:
            read = tuple(t for t in op.inputs if t in there)
            made = dict.fromkeys(t for t in op.outputs if t < len(step.tensors) and t not in there)
            there.update(made)
            ops.append(dataclasses.replace(op, inputs=read, outputs=tuple(made)))
        returned = tuple(t for t in graph.outputs if t in there)
        return dataclasses.replace(graph, ops=tuple(ops), inputs=tuple(inputs), outputs=returned)

    resident = tuple(t for t in step.resident if t in there)
    return dataclasses.replace(step, resident=resident, graphs=tuple(map(some_of, step.graphs)))


def possible(timeline: Timeline) -> Timeline:
    """The same, less what cannot be: seconds and bytes below zero, blocks of other moments, a kind twice."""
    end = len(timeline.moments)

    def cut(blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        places = (sorted((block.start % (end + 1), block.end % (end + 1))) for block in blocks)
        return tuple(
            dataclasses.replace(block, bytes=abs(block.bytes) % 2**60, start=a, end=b)
            for block, (a, b) in zip(blocks, places, strict=True)
        )

    moments = tuple(dataclasses.replace(m, seconds=abs(m.seconds), stall=abs(m.stall)) for m in timeline.moments)
    base = tuple((kind, abs(size) % 2**60) for kind, size in dict(timeline.base).items())
    blocks, host, others = map(cut, (timeline.blocks, timeline.host, timeline.others))
    return dataclasses.replace(timeline, moments=moments, base=base, blocks=blocks, host=host, others=others)


def of_its_step(plan: Plan) -> Plan:
    """The same, less what it says of storages that are not there."""
    there = range(len(plan.step.tensors))
    reasons = tuple((tuple(t for t in members if t in there), text) for members, text in plan.reasons)
    return dataclasses.replace(plan, decisions=tuple(d for d in plan.decisions if d[0] in there), reasons=reasons)


LOOP = every(Loop, body=graphs(st.none()), accumulators=INDICES)
STEP = every(
    Step,
    tensors=some(TENSOR),
    graphs=some(graphs(st.none() | LOOP)),
    resident=INDICES,
    held=every(Held, kinds=some(st.tuples(KIND, INTEGERS)), gaps=some(every(Gap)), notes=some(st.text())),
    gaps=some(every(Gap)),
    sizes=some(st.tuples(st.text(), INTEGERS)),
    saved_by=some(st.tuples(st.text(), INDICES)),
    notes=some(st.text()),
).map(lambda step: runnable(step))
TIMELINE = every(
    Timeline,
    origin=st.sampled_from(("predicted", "measured")),
    moments=some(every(Moment, seconds=REAL, stall=REAL)),
    blocks=some(every(Block, kind=KIND, shape=INDICES)),
    base=some(st.tuples(KIND, INTEGERS)),
    notes=some(st.text()),
    host=some(every(Block, kind=KIND, shape=INDICES)),
).map(lambda timeline: possible(timeline))
MACHINE = every(
    Machine,
    device=st.sampled_from(("cpu", "cuda")),
    bandwidth=REAL,
    host_bandwidth=REAL,
    disk_bandwidth=REAL,
    flops=some(st.tuples(st.text(), REAL)),
    contention=REAL,
    workspace_rules=some(st.tuples(st.text(), REAL)),
    attention=some(st.tuples(st.text(), REAL)),
)
TIER = st.sampled_from(("host", "disk"))
PLAN = every(
    Plan,
    step=STEP,
    decisions=some(st.tuples(INTEGERS, st.sampled_from((Keep(), Recompute())) | every(Offload, tier=TIER))),
    forward=some(every(Run)),
    backward=some(every(Run)),
    timeline=TIMELINE,
    budget=every(Budget, reserve=st.floats(0, 1, exclude_max=True)),
    machine=MACHINE,
    base_seconds=REAL,
    notes=some(st.text()),
    bound=st.none() | every(Bound, seconds=REAL, per_byte=REAL, at=st.just("")),
).map(lambda plan: of_its_step(plan))


@settings(deadline=None, max_examples=60)
@given(STEP | PLAN | TIMELINE | MACHINE)
def test_json_round_trip(value: Any) -> None:
    assert from_json(to_json(value), type(value)) == value


def test_files_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    plan.timeline.save(tmp_path / "timeline.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Timeline.load(tmp_path / "timeline.json") == plan.timeline
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "timeline.json"]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_value_is_refused_or_read(data: st.DataObject) -> None:
    """Replace one value anywhere in a file: never another exception than MemplanError, and what is read is shown."""
    timeline = Timeline("t", "measured", (Moment("a", 0.0),), (Block("b", 1, "input", 0, 1),), (("input", 3),))
    document: Any = json.loads(to_json(timeline))
    at = document
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(
        st.none() | st.booleans() | st.text() | st.integers() | st.floats() | st.just([]) | st.just({"is": []})
    )
    with contextlib.suppress(MemplanError):
        assert summary(from_json(json.dumps(document), Timeline))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[1, 2]", "not written by memplan"),
        ('{"nodes": []}', "not written by memplan"),
        ('{"memplan": "Timeline", "schema": 999, "value": {}}', "schema 999"),
        ('{"memplan": "Timeline", "schema": 3}', "damaged"),
        ("[" * 100_000, "not JSON"),
        ('{"memplan": "Timeline", "schema": 3, "value": {"title": "x", "colour": 1}}', "no field 'colour'"),
        ('{"memplan": "Step", "schema": 3, "value": {}}', "holds a Step, not a Timeline"),
    ],
)
def test_foreign_files(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(MemplanError, match=says) as e:
        Timeline.load(path)
    assert "x.json" in str(e.value).splitlines()[0]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"decisions": ((999, Keep()),)}, "it decides on storage 999"),
        ({"reasons": (((999,), "keep: over by 1.200 GB"),)}, "it decides on storage 999"),
        ({"budget": Budget(1, reserve=2.0)}, "a reserve of 2.0"),
        ({"bound": Bound(1.0, at="nowhere")}, "its bound is at 'nowhere'"),
    ],
)
def test_plans_of_another_step_are_refused(damage: dict[str, Any], says: str, plan: Plan) -> None:
    with pytest.raises(MemplanError, match=says):
        from_json(to_json(dataclasses.replace(plan, **damage)), Plan)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"start": -1}, "is alive from -1 to 3"),
        ({"start": 4}, "is alive from 4 to 3"),
        ({"end": 999}, "is alive from 1 to 999"),
        ({"bytes": -1}, "has -1 bytes"),
        ({"bytes": 10**30}, "bytes"),
    ],
)
def test_blocks_that_cannot_be_are_refused(damage: dict[str, int], says: str, timeline: Timeline) -> None:
    block = Block("b", 1, "activation", 1, 3)
    for where in ("blocks", "host", "others"):
        damaged = dataclasses.replace(timeline, **{where: (dataclasses.replace(block, **damage),)})
        with pytest.raises(MemplanError, match=says):
            from_json(to_json(damaged), Timeline)


def test_every_truncation_is_refused(timeline: Timeline) -> None:
    text = to_json(timeline)
    for end in range(0, len(text), 97):
        with pytest.raises(MemplanError, match="cut short"):
            from_json(text[:end], Timeline)


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.json", "absent.json", "."):
        with pytest.raises(MemplanError, match="cannot read"):
            Timeline.load(tmp_path / name)


def test_unwritable_leaves_nothing_behind(timeline: Timeline, tmp_path: Path) -> None:
    (tmp_path / "taken.json").mkdir()
    for path in (tmp_path / "no folder" / "t.json", tmp_path / "taken.json"):
        with pytest.raises(MemplanError, match="cannot write"):
            timeline.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["taken.json"]


def test_writing_replaces(tmp_path: Path) -> None:
    write(tmp_path / "x", "one")
    write(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_step_at_other_sizes() -> None:
    formula = Polynomial(((4, (("batch", 1), ("tokens", 2))), (8, ())))
    tensors = (Tensor("a", 4 * 2 * 9 + 8, "activation", formula=formula), Tensor("b", 5, "activation"))
    step = Step("s", tensors, (), (), sizes=(("batch", 2), ("tokens", 3)))
    longer = step.at(tokens=10)
    assert [t.bytes for t in longer.tensors] == [4 * 2 * 100 + 8, 5]
    assert dict(longer.sizes) == {"batch": 2, "tokens": 10}
    assert longer.at(tokens=3) == step
    with pytest.raises(MemplanError, match="length"):
        step.at(length=4)


def test_peak_of_half_open_lifetimes() -> None:
    moments = tuple(Moment(str(i), float(i)) for i in range(3))
    blocks = (Block("a", 10, "activation", 0, 1), Block("b", 7, "activation", 1, 3), Block("c", 2, "temporary", 1, 2))
    timeline = Timeline("t", "predicted", moments, blocks, (("parameter", 100),))
    assert timeline.totals == (110, 109, 107)
    assert (timeline.peak, timeline.peak_moment, timeline.peak_above_base) == (110, 0, 10)
    assert [b.name for b in timeline.alive(1)] == ["b", "c"]
    assert Timeline("empty", "measured", (), (), (("input", 3),)).peak == 3
