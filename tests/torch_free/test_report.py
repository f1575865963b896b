"""Reports say what the data says: every byte of a plan in its table, equal layers folded, peaks as they are."""

import dataclasses
import itertools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan import report
from memplan.errors import MemplanError
from memplan.groups import ROWS
from memplan.ir import Block, Budget, Moment, Plan, Recompute, Step, Timeline
from memplan.report import alignment, png
from memplan.report.text import REASON, WIDTH, at_peak, folded
from memplan.units import human


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_equal_layers_fold(plan_of: Callable[..., Plan]) -> None:
    few, many = str(plan_of(layers=4)), str(plan_of(layers=32))
    assert len(few.splitlines()) <= len(many.splitlines()) <= len(few.splitlines()) + 1
    row = next(line for line in many.splitlines() if " tanh " in line)
    total = human(32 * 4 * 64 * 256)
    for part in ("keep", "x32", total, "f32[64, 256]", "model.layers.*", "toy.py:8 in f"):
        assert part in row


def test_table_is_plain_text(plan: Plan) -> None:
    text = str(plan)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines()[:3])) <= WIDTH
    assert "toy.py:12: nothing was found here" in text
    assert "written by hand" in text


def test_what_else_could_have_been_decided_has_a_column(plan: Plan) -> None:
    first = next(t for t, d in plan.decisions if isinstance(d, Recompute))
    assert "instead" not in str(plan)  # nobody has looked
    for reason in ("keep: over by 1.200 GB", "keep: not, it reads a buffer that forward changes"):
        lines = str(dataclasses.replace(plan, reasons=(((first,), reason),))).splitlines()
        start = lines[0].index("instead")
        words = " ".join(line[start : start + REASON].strip() for line in lines[1:4])
        assert words.startswith(reason) and max(map(len, lines[:4])) <= WIDTH


def test_what_does_not_fit_in_the_table_is_counted(plan: Plan) -> None:
    tensors = tuple(dataclasses.replace(t, source=f"toy.py:{i}") for i, t in enumerate(plan.step.tensors * 4))
    step = dataclasses.replace(plan.step, tensors=tensors)
    decisions = tuple((t, Recompute()) for t in range(len(tensors)))
    folded = dataclasses.replace(plan, step=step, decisions=decisions)
    lines = report.table(folded).splitlines()
    shown = next(i for i, line in enumerate(lines) if line.startswith("and "))
    hidden = sorted((t.bytes for t in tensors), reverse=True)[ROWS:]
    assert lines[shown] == f"and {len(hidden)} more ({human(sum(hidden))})"


def test_markup_in_names_is_text(plan: Plan) -> None:
    tensors = tuple(dataclasses.replace(t, source="a.py:1 in [b]f :smile:") for t in plan.step.tensors)
    text = report.table(dataclasses.replace(plan, step=dataclasses.replace(plan.step, tensors=tensors)))
    assert "[b]f :smile:" in text


def test_verdict(plan: Plan) -> None:
    last = str(plan).splitlines()[-1]
    spare = human(plan.budget.available - plan.peak)
    assert last.startswith(f"fits: peak {human(plan.peak)} of {human(plan.budget.available)}, {spare} to spare")
    assert last.endswith("+5.0 % time (roofline-v1); policy by_hand on toy, inner eager")
    short = dataclasses.replace(plan, budget=Budget(plan.peak - 1000))
    assert "does not fit" in str(short).splitlines()[-1]
    assert "short by 1.000 KB" in str(short).splitlines()[-1]
    held = dataclasses.replace(plan, budget=Budget(10**9, 10**8, 0.01, "clamped"))
    assert "less 100.0 MB context and 10.00 MB fragmentation reserve: 890.0 MB for the step (clamped)" in str(held)


def test_kinds_add_up_to_the_peak(timeline: Timeline) -> None:
    assert sum(at_peak(timeline).values()) == timeline.peak
    assert f"peak {human(timeline.peak)} at grad_0 in backward" in report.summary(timeline)


@pytest.mark.parametrize("origin", ["predicted", "measured"])
def test_png_of_a_long_timeline(origin: Any, tmp_path: Path) -> None:
    count = 30_000
    moments = tuple(Moment(f"op{i}", i * 1e-5, "forward" if i < 10_000 else "backward") for i in range(count))
    blocks = [Block(f"a{i}", 10**7, "activation", 30 * i, count - 60 * i) for i in range(300)]
    blocks.append(Block("spike", 10**10, "temporary", 12_345, 12_346))
    timeline = Timeline("long", origin, moments, tuple(blocks), (("parameter", 10**9),))
    timeline.save(tmp_path / "long.png")
    assert png_size(tmp_path / "long.png") == (1440, 600)
    assert png._steps(timeline).total.max() == timeline.peak  # drawing by columns keeps every spike


def test_png_steps_are_the_timeline(timeline: Timeline) -> None:
    steps = png._steps(timeline)
    assert tuple(steps.total) == timeline.totals
    assert len(steps.edges) == len(timeline.moments) + 1
    assert sum(layer[timeline.peak_moment] for layer in steps.layers.values()) == timeline.peak


def test_png_of_odd_timelines(plan: Plan, tmp_path: Path) -> None:
    empty = Timeline("empty", "measured", (), ())
    one = Timeline("$x_1$", "measured", (Moment("a", 0.0, "$x^{$"),), (Block("b", 1, "input", 0, 1),))
    report.save([empty, one, plan.timeline], tmp_path / "all.PNG")
    assert png_size(tmp_path / "all.PNG") == (1440, 1800)
    plan.save(tmp_path / "plan.png")
    assert png_size(tmp_path / "plan.png") == (1440, 600)


def test_formats(plan: Plan, step: Step, tmp_path: Path) -> None:
    report.save(step, tmp_path / "step.json")
    with pytest.raises(MemplanError, match=r"a Step as .*the formats are \.json"):
        report.save(step, tmp_path / "step.png")
    with pytest.raises(
        MemplanError, match=r"a Plan as .*the formats are \.json, \.html, \.png, \.pickle and \.perfetto-trace"
    ):
        report.save(plan, tmp_path / "plan.htm")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(MemplanError, match="it is a folder"):
        report.check_path(Step, tmp_path / "folder.json")
    (tmp_path / "folder.json").rmdir()
    with pytest.raises(MemplanError, match="at least one"):
        report.save([], tmp_path / "none.png")
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


def test_a_timeline_equals_itself(plan: Plan) -> None:
    same = report.compare(plan, plan.timeline)
    assert (same.difference, same.only_a, same.only_b) == (0, (), ())
    assert "equal peaks" in str(same)


def test_timelines_that_have_nothing_in_common_are_compared(timeline: Timeline) -> None:
    none = Timeline("none", "measured", (), ())
    other = Timeline("other", "measured", (Moment("a", 0.0),), (Block("b", 1, "input", 0, 1),))
    for a, b in ((none, none), (none, timeline), (timeline, other)):
        found = report.compare(a, b)
        assert found.worst is None and str(found)


def test_compare_is_antisymmetric(plan_of: Callable[..., Plan]) -> None:
    a, b = plan_of(layers=4), plan_of(layers=3)
    there, back = report.compare(a, b), report.compare(b, a)
    assert there.difference == -back.difference == b.peak - a.peak
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)
    assert [block.name for block in there.only_a] == ["grad_3"]
    assert sum(y - x for _, x, y in there.kinds) == there.difference
    assert "grad_3" in str(there)


def test_compare_shows_both_times(timeline: Timeline) -> None:
    moments = tuple(dataclasses.replace(m, seconds=1.25 * m.seconds) for m in timeline.moments)
    found = report.compare(timeline, dataclasses.replace(timeline, origin="measured", moments=moments))
    assert (found.seconds_a, found.seconds_b) == (timeline.seconds, 1.25 * timeline.seconds)
    (line,) = [line for line in str(found).splitlines() if line.startswith("time ")]
    assert line.split()[-2:] == ["+25.0", "%"] and f"{1e3 * timeline.seconds:.4g} ms" in line
    assert json.loads(found.to_json())["seconds_b"] == found.seconds_b
    untimed = dataclasses.replace(timeline, moments=tuple(dataclasses.replace(m, seconds=0.0) for m in moments))
    assert "time " not in str(report.compare(untimed, timeline))


def test_a_measurement_has_other_names(timeline: Timeline) -> None:
    blocks = tuple(dataclasses.replace(b, name=f"0x{i:x}") for i, b in enumerate(timeline.blocks))
    measured = dataclasses.replace(timeline, origin="measured", blocks=blocks)
    assert report.compare(timeline, measured).only_a == ()
    missing = dataclasses.replace(measured, blocks=blocks[:-1])
    assert len(report.compare(timeline, missing).only_a) == 1


def test_folded_blocks_have_the_bytes_of_all(timeline: Timeline) -> None:
    alive = timeline.alive()
    few = folded(alive)
    assert sum(b.bytes for b in few) == sum(b.bytes for b in alive)
    renamed = folded(dataclasses.replace(b, name="mm", layer=f"model.{i}.mlp") for i, b in enumerate(alive))
    assert len(renamed) < len(alive)
    assert renamed[0].name.endswith(" x mm") and renamed[0].layer == "model.*.mlp"
    assert [b.bytes for b in renamed] == sorted((b.bytes for b in renamed), reverse=True)


def test_the_worst_place_and_what_moved(plan_of: Callable[..., Plan], tmp_path: Path) -> None:
    """Keep what was recomputed, up to the end: every later place has those bytes more, the last one all of them."""
    a = plan_of(layers=4)
    blocks = tuple(
        dataclasses.replace(b, decision="keep", end=len(a.timeline.moments)) if b.decision == "recompute" else b
        for b in a.timeline.blocks
    )
    kept = [b for b in blocks if b.name.startswith("mm_")]
    found = report.compare(a, dataclasses.replace(a.timeline, blocks=blocks))
    assert found.worst is not None
    assert (found.worst.block.name, found.worst.moment_a, found.worst.moment_b) == ("loss", 8, 8)
    assert found.worst.bytes_b - found.worst.bytes_a == sum(b.bytes for b in kept)
    assert [x.name for x, _ in found.moved] == [b.name for b in kept]
    text = str(found)
    assert "they differ most at loss in forward" in text
    assert f"moved from recompute to keep: 4 blocks, {human(sum(b.bytes for b in kept))}" in text
    value = json.loads(found.to_json())
    assert (value["peak_a"], value["worst"]["bytes_b"]) == (found.peak_a, found.worst.bytes_b)
    assert value["moved"][0][1]["decision"] == "keep" and "timelines" not in value
    found.save(tmp_path / "both.html")
    assert a.timeline.title in (tmp_path / "both.html").read_text()


def test_an_op_of_several_moments_is_one_place(timeline: Timeline) -> None:
    """A measurement has a moment for each allocation: twice as many moments, and the same bytes, are no difference."""
    twice = tuple(m for moment in timeline.moments for m in (moment, dataclasses.replace(moment, name="inside")))
    blocks = tuple(dataclasses.replace(b, start=2 * b.start + 1, end=2 * b.end) for b in timeline.blocks)
    found = report.compare(timeline, dataclasses.replace(timeline, moments=twice, blocks=blocks))
    assert found.worst is not None and found.worst.bytes_a == found.worst.bytes_b
    assert "differ most" not in str(found)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_pairs_are_of_one_key_and_do_not_cross(a: list[int], b: list[int]) -> None:
    def timeline(sizes: list[int]) -> Timeline:
        moments = tuple(Moment("op", 0.0) for _ in sizes)
        return Timeline("t", "measured", moments, tuple(Block("b", s, "input", i, i + 1) for i, s in enumerate(sizes)))

    pairs = alignment.aligned(timeline(a), timeline(b), lambda block: block.bytes)
    assert all(x.bytes == y.bytes for x, y in pairs)
    assert all(p[0].start < q[0].start and p[1].start < q[1].start for p, q in itertools.pairwise(pairs))
    assert len(pairs) == len(a) if a == b else len(pairs) >= bool({*a} & {*b})


def test_compare_refuses_other_things(step: Step, plan: Plan) -> None:
    with pytest.raises(MemplanError, match="cannot compare a Step"):
        report.compare(plan, step)  # type: ignore[arg-type]
