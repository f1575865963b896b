"""What else is on the device: hatched above the step, in no total of it, in every format."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from memplan import report, serialize
from memplan.ir import Block, Budget, Plan, Timeline
from memplan.report import perfetto, png
from memplan.report.html import page as html

MB = 10**6
OTHERS = (Block("another process", MB, "temporary", 0, 3), Block("vllm", 3 * MB, "temporary", 2, 13))
BESIDE = (MB, MB, 4 * MB, *[3 * MB] * 10)


@pytest.fixture
def shared(timeline: Timeline) -> Timeline:
    """Somebody else comes, and somebody goes."""
    assert (len(timeline.moments), timeline.peak_moment) == (13, 12)
    return dataclasses.replace(timeline, others=OTHERS)


def test_a_plan_has_what_its_budget_leaves_to_others(plan: Plan) -> None:
    moments = len(plan.timeline.moments)
    budget = Budget(10**9, 10**8, 0.01)
    held = dataclasses.replace(plan, budget=budget).with_others()
    assert [(b.name, b.bytes, b.start, b.end) for b in held.timeline.others] == [
        ("context", 10**8, 0, moments),
        ("fragmentation reserve", 10**7, 0, moments),
    ]
    assert sum(b.bytes for b in held.timeline.others) == budget.bytes - budget.available
    assert (held.peak, held.timeline.totals) == (plan.peak, plan.timeline.totals)
    assert plan.with_others() == plan  # nothing is held where nothing is


def test_a_budget_shared_with_others(plan: Plan) -> None:
    """What they hold is no step's, is in front of the budget that is needed, and is named."""
    budget = Budget(10**9, 10**8, 0.01, others=(("engine", 3 * 10**8), ("reference", 10**8)))
    assert budget.available == 10**9 - 10**8 - 10**7 - 4 * 10**8
    for peak in (1, 123456789, 10**9):
        least = budget.needed_for(peak)
        assert dataclasses.replace(budget, bytes=least).available >= peak
        assert dataclasses.replace(budget, bytes=least - 1).available < peak
    held = dataclasses.replace(plan, budget=budget).with_others()
    names = [b.name for b in held.timeline.others]
    assert names == ["context", "engine", "reference", "fragmentation reserve"]
    assert sum(b.bytes for b in held.timeline.others) == budget.bytes - budget.available
    says = "less 100.0 MB context and 300.0 MB engine and 100.0 MB reference and 10.00 MB fragmentation reserve"
    assert says in str(held)
    assert serialize.from_json(serialize.to_json(held), Plan) == held


def test_it_is_in_no_total_and_in_files(shared: Timeline, timeline: Timeline, tmp_path: Path) -> None:
    assert shared.totals == timeline.totals and shared.alive() == timeline.alive()
    assert shared.beside == BESIDE
    shared.save(tmp_path / "a.json")
    assert Timeline.load(tmp_path / "a.json") == shared
    assert "others" not in json.loads(serialize.to_json(timeline))["value"]  # as files written before


def test_the_text_names_them(shared: Timeline, timeline: Timeline, plan: Plan) -> None:
    assert "beside it 3.000 MB held by others: vllm" in report.summary(shared).splitlines()
    at_once = dataclasses.replace(shared, others=tuple(dataclasses.replace(b, start=0, end=13) for b in OTHERS))
    assert "beside it 4.000 MB held by others: another process 1.000 MB, vllm 3.000 MB" in report.summary(at_once)
    assert "beside it" not in report.summary(timeline) + str(plan)


def axes_of(timeline: Timeline, plan: Plan | None = None) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    png._draw(axes, timeline, plan)
    return axes


def test_the_png_hatches_them_above_the_step(shared: Timeline, timeline: Timeline, plan: Plan) -> None:
    (hatched,) = (c for c in axes_of(shared).collections if c.get_hatch())
    (path,) = hatched.get_paths()
    above = [total + beside for total, beside in zip(shared.totals, BESIDE, strict=True)]
    assert path.vertices[:, 1].max() == max(above) > timeline.peak
    assert path.vertices[:, 1].min() == min(shared.totals)
    assert axes_of(shared).get_ylim()[1] >= max(above)
    assert not any(c.get_hatch() for c in axes_of(timeline).collections)
    budget = Budget(3 * plan.peak, plan.peak, 0.01)
    held = dataclasses.replace(plan, budget=budget).with_others()
    (line,) = (line for line in axes_of(held.timeline, held).lines if line.get_linestyle() == "--")
    assert line.get_ydata()[0] == budget.bytes  # the step and what is hatched are under it
    (line,) = (line for line in axes_of(plan.timeline, plan).lines if line.get_linestyle() == "--")
    assert line.get_ydata()[0] == plan.budget.available


def test_many_moments_are_drawn_by_columns() -> None:
    from tests.torch_free.test_html import long

    timeline = long(2 * png.COLUMNS)
    timeline = dataclasses.replace(timeline, others=(Block("b", 10**9, "temporary", 0, len(timeline.moments)),))
    assert set(png._steps(timeline).beside) == {10**9}


def test_perfetto_counts_them_apart(shared: Timeline) -> None:
    counters = perfetto._counters(shared)
    assert counters["held by others"] == [(0, MB), (2, 4 * MB), (3, 3 * MB)]
    assert counters["total"] == perfetto._counters(dataclasses.replace(shared, others=()))["total"]


def test_the_page_has_them(shared: Timeline, plan: Plan) -> None:
    def data(value: Any) -> Any:
        return json.loads(re.findall(r'id="data">(.*?)</script>', html(value))[0])

    names = [name for name, _ in data(shared)["kinds"]]
    kinds = data(shared)["series"][0]["blocks"]["kind"]
    assert [names[k] for k in kinds[-2:]] == ["held by others"] * 2 and kinds.count(kinds[-1]) == 2
    budget = Budget(10**9, 10**8, 0.01)
    assert data(dataclasses.replace(plan, budget=budget))["series"][0]["budget"] == budget.available
    assert data(dataclasses.replace(plan, budget=budget).with_others())["series"][0]["budget"] == budget.bytes


def test_two_that_are_compared_keep_theirs(shared: Timeline, timeline: Timeline, tmp_path: Path) -> None:
    found = report.compare(timeline, shared)
    assert found.difference == 0 and "equal peaks" in str(found)
    found.save(tmp_path / "both.html")
    assert "another process" in (tmp_path / "both.html").read_text()
