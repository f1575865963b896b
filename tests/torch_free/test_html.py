"""The page in a real browser: it shows what the timeline says, finds, switches, and asks the network for nothing.

The tests with `page` need playwright (pip install -e ".[browser]") and a Chromium on the path; they are skipped, with
the reason, where one is missing.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memplan import report
from memplan.ir import Block, Keep, Moment, Plan, Timeline
from memplan.report.html import page as html
from memplan.report.scale import COLOURS
from memplan.units import human

NASTY = "</script><!--<b>&amp; 'quoted' \u2028 {{data}}"
Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Save values as a page and open it; at the end nothing else was asked for, and nothing went wrong in it."""
    asked: list[str] = []
    wrong: list[str] = []
    tab = browser.new_page(viewport={"width": 1400, "height": 800})
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))

    def load(*values: Any) -> Any:
        report.save(values[0] if len(values) == 1 else values, tmp_path / "page.html")
        tab.goto((tmp_path / "page.html").as_uri())
        return tab

    yield load
    tab.close()
    assert wrong == []
    assert asked == [(tmp_path / "page.html").as_uri()]


def measured(timeline: Timeline) -> Timeline:
    """The same, half as large."""
    blocks = tuple(dataclasses.replace(b, bytes=b.bytes // 2) for b in timeline.blocks)
    return dataclasses.replace(timeline, title="seen", origin="measured", blocks=blocks)


def long(count: int) -> Timeline:
    moments = tuple(
        Moment(f"op{i % 97}", i * 1e-5, "forward" if i < count // 2 else "backward", 1e-3 * (i == count // 2))
        for i in range(count)
    )
    blocks = [Block(f"saved_{i}", 1 + i % 9973, "activation", i, count - i, "keep") for i in range(count // 2)]
    blocks += [Block(f"spike_{i}", 10**9 * (i == 12_345) + 1, "temporary", i, i + 1) for i in range(count // 2)]
    host = (Block("offloaded", 10**7, "activation", 10, count, "offload"),)
    return Timeline("long", "predicted", moments, tuple(blocks), (("parameter", 10**9),), ("a note",), host)


def test_names_cannot_leave_the_data(timeline: Timeline) -> None:
    blocks = (dataclasses.replace(timeline.blocks[0], name=NASTY, source=NASTY), *timeline.blocks[1:])
    text = html(dataclasses.replace(timeline, title=NASTY, blocks=blocks))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert "<" not in data
    assert NASTY in json.loads(data)["texts"]
    assert not re.search(r"(src|href)=|https?:|import|fetch", text.replace(data, ""))


def test_the_page_counts_as_the_timeline_does(plan: Plan, opened: Open) -> None:
    page = opened(plan)
    timeline = plan.timeline
    assert tuple(page.evaluate("[...all[0].total]")) == timeline.totals
    assert page.evaluate("all[0].peak") == timeline.peak_moment
    assert page.evaluate("all[0].budget") == plan.budget.available
    for moment in range(len(timeline.moments)):
        alive = page.evaluate(f"all[0].alive({moment}).map(b => all[0].blocks.bytes[b])")
        assert alive == [block.bytes for block in timeline.alive(moment)]
    assert f"{human(timeline.peak)} at grad_0 · backward" in page.inner_text("#alive")


def test_every_byte_of_the_stack_is_somebodys(timeline: Timeline, opened: Open) -> None:
    page = opened(timeline)
    at = timeline.peak_moment
    found = page.evaluate(
        f"""Array.from({{length: {timeline.peak} / 4}}, (_, i) => all[0].blockAt({at}, 4 * i))
            .reduce((sum, {{block}}) => ({{...sum, [block]: (sum[block] || 0) + 4}}), {{}})"""
    )
    assert found.pop("-1") == timeline.base_bytes
    assert {timeline.blocks[int(b)]: size for b, size in found.items()} == {b: b.bytes for b in timeline.alive()}
    assert page.evaluate(f"all[0].blockAt({at}, {timeline.peak})") is None


def test_hover_and_click(timeline: Timeline, opened: Open) -> None:
    page = opened(timeline)
    block = timeline.alive()[0]
    kinds = page.evaluate("KINDS.map(([name]) => name)")
    below = sum(page.evaluate(f"all[0].layers.map(l => l[{timeline.peak_moment}])")[: kinds.index(block.kind)])
    x = page.evaluate(f"toPixel((ends[{timeline.peak_moment}] + ends[{timeline.peak_moment + 1}]) / 2)")
    box = page.locator("#chart").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + page.evaluate(f"toY({below + block.bytes / 2})"))
    tip = page.inner_text("#tip")
    assert f"{human(timeline.peak)} at grad_0" in tip
    hovered = page.evaluate("view.hover.block")
    seen = timeline.blocks[hovered]
    assert (seen.kind, seen.start <= timeline.peak_moment < seen.end) == (block.kind, True)
    for words in (human(seen.bytes), seen.name, seen.source, seen.layer, f"moment {seen.start}", "f32[", seen.decision):
        assert words in tip
    page.mouse.down()
    page.mouse.up()
    assert page.evaluate("[view.pinned, view.selected]") == [timeline.peak_moment, hovered]
    page.keyboard.press("ArrowLeft")
    before = timeline.peak_moment - 1
    assert page.evaluate("view.pinned") == before
    assert human(timeline.totals[before]) in page.inner_text("#alive")


def test_hover_says_what_else_could_have_been_decided(plan: Plan, opened: Open) -> None:
    t = next(t for t, d in plan.decisions if isinstance(d, Keep))
    name = plan.step.tensors[t].name
    page = opened(dataclasses.replace(plan, reasons=(((t,), "recompute: +3.1 ms"),)))
    blocks = [b.name for b in plan.timeline.blocks]
    said = page.evaluate("all[0].blocks.name.map((_, b) => describe(b).join(' | '))")
    assert [block for block, text in zip(blocks, said, strict=True) if "instead" in text] == [name]
    assert "instead of keep, recompute: +3.1 ms" in said[blocks.index(name)]


def test_what_others_hold_is_hatched_on_top(timeline: Timeline, opened: Open) -> None:
    count, size = len(timeline.moments), timeline.peak // 2
    others = (Block("another process", size, "temporary", 0, count), Block("guest", size, "temporary", 0, 1))
    page = opened(dataclasses.replace(timeline, others=others), measured(timeline))
    at = timeline.peak_moment
    assert tuple(page.evaluate("[...all[0].total]")) == timeline.totals
    assert page.evaluate(f"all[0].blockAt({at}, {timeline.peak + size // 2})") == {
        "kind": len(COLOURS),
        "block": len(timeline.blocks),
    }
    assert page.evaluate(f"all[0].blockAt({at}, {timeline.peak + size})") is None
    assert page.evaluate("highest") >= timeline.totals[0] + 2 * size  # where the guest is there
    column = """(y, m) => [...$('areas').getContext('2d')
        .getImageData(toPixel((ends[m] + ends[m + 1]) / 2), toY(y), 1, 40).data].filter((_, i) => i % 4 === 3)"""
    alpha = page.evaluate(f"({column})({timeline.peak + size - 1}, {at})")
    assert 0 < sum(map(bool, alpha)) < len(alpha)  # lines, and nothing between them
    x = page.evaluate(f"toPixel((ends[{at}] + ends[{at + 1}]) / 2)")
    box = page.locator("#chart").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + page.evaluate(f"toY({timeline.peak + size / 2})"))
    assert "another process" in page.inner_text("#tip") and "held by others" in page.inner_text("#tip")
    page.get_by_label("seen (measured)").check()
    assert page.evaluate("[view.shown.shared, outlines[0][0].shared]") == [False, True]


def test_search(timeline: Timeline, opened: Open) -> None:
    page = opened(timeline)
    for query in ("TANH_2", "layers.1", "toy.py:8", "keep", "f32[64"):
        page.fill("#search", query)
        words = [
            (b.name, report.text.shape_dtype(b.shape, b.dtype), b.decision, b.layer, b.source) for b in timeline.blocks
        ]
        count = sum(any(query.lower() in word.lower() for word in block) for block in words)
        assert count
        assert f"{count} of {len(timeline.blocks)} blocks" in page.inner_text("#found")
    page.fill("#search", "tanh_2")
    page.click("#found .row.block")
    assert timeline.blocks[page.evaluate("view.selected")].name == "tanh_2"
    page.fill("#search", "no such thing")
    assert "0 of" in page.inner_text("#found")


def test_two_series_on_one_scale(timeline: Timeline, opened: Open) -> None:
    page = opened(timeline, measured(timeline))
    drawn = "$('areas').toDataURL()"
    both = page.evaluate(drawn)
    (outline,) = page.evaluate("outlines.map(([series, own]) => [...own].map(m => series.total[m]))")
    assert max(outline) == measured(timeline).peak
    page.uncheck("#overlay")
    assert page.evaluate(drawn) != both
    page.get_by_label("seen (measured)").check()
    assert page.evaluate("[view.shown.title, view.shown.total[view.pinned]]") == ["seen", measured(timeline).peak]
    page.select_option("#axis", "moments")
    assert page.evaluate("[view.x0, view.x1]") == [0, len(timeline.moments)]


def test_backward_lies_over_backward(opened: Open, timeline: Timeline) -> None:
    slow = tuple(
        dataclasses.replace(m, seconds=m.seconds * (5 if m.phase == "backward" else 1)) for m in timeline.moments
    )
    page = opened(timeline, dataclasses.replace(timeline, moments=slow))
    moved, own = page.evaluate(
        "[aligned(all[1].ends('time'), anchors(all[1], all[1].ends('time')), anchors(all[0], ends)), ends]"
    )
    first = next(i for i, m in enumerate(timeline.moments) if m.phase == "backward")
    assert moved[: first + 1] == pytest.approx(own[: first + 1])
    assert moved[-1] == pytest.approx(own[-1])


def test_a_hundred_thousand_events(opened: Open) -> None:
    timeline = long(100_000)
    page = opened(timeline)
    assert page.evaluate("Math.max(...[...pixels].map(m => view.shown.total[m]))") == timeline.peak  # no spike is lost
    assert page.evaluate("document.querySelectorAll('*').length") < 2500
    page.mouse.move(600, 500)
    for _ in range(8):
        page.mouse.wheel(0, -400)
    assert page.evaluate("view.x1 - view.x0 < (ends.at(-1) - ends[0]) / 10")
    assert page.evaluate("view.drawMs") < 1000  # 20 ms on an idle core
    page.dblclick("#marks", position={"x": 500, "y": 60})
    assert page.evaluate("view.x1 - view.x0 === ends.at(-1) - ends[0]")
    assert "offloaded" in page.inner_text("#alive") and "a note" in page.inner_text("#alive")
    assert page.evaluate("all[0].total[all[0].peak]") == timeline.peak  # what is on the host is no part of it


def test_odd_timelines(opened: Open) -> None:
    empty = Timeline("empty", "measured", (), (), (("parameter", 5),))
    one = Timeline("one", "measured", (Moment("a", 0.0),), (Block(NASTY, 1, "input", 0, 1),))
    page = opened(empty, one)
    page.mouse.move(500, 400)
    page.get_by_label("one (measured)").check()
    page.mouse.move(500, 300)
    assert NASTY.replace("\u2028", " ").split("'")[0] in page.inner_text("#alive").replace("\u2028", " ")
