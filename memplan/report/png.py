"""Timelines as a PNG: bytes alive by kind, stacked over time, with the peak and the budget marked.

In: a Plan, a Timeline or several. Out: the bytes of a PNG. Times are the timeline's own seconds (an estimate
in a prediction); where those say nothing, moments are counted instead.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memplan.ir import Kind, Plan, Timeline
from memplan.report.scale import COLOURS, HELD, budget_line, edges, phases, timelines
from memplan.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4000  # more than the pixels across; longer timelines are drawn by the largest moment of each column
PHASES = 16  # more changes of phase than this are not shaded


@dataclass(frozen=True)
class _Steps:
    """A timeline as step functions: column i covers [edges[i], edges[i + 1])."""

    edges: npt.NDArray[np.float64]
    total: npt.NDArray[np.float64]
    layers: dict[Kind, npt.NDArray[np.float64]]
    beside: npt.NDArray[np.float64]
    label: str


def draw(value: Plan | Timeline | Sequence[Timeline]) -> bytes:
    """Draw one timeline, or several above each other on one scale of bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = timelines(value)
    figure = Figure(figsize=(12, 5 * len(shown)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, timeline in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        _draw(axes, timeline, value if isinstance(value, Plan) else None)
    top = max(axes.get_ylim()[1] for axes in figure.axes)
    for axes in figure.axes:
        axes.set_ylim(0, top)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, timeline: Timeline, plan: Plan | None) -> None:
    steps = _steps(timeline)
    ends, runs = edges(timeline)[0], phases(timeline.moments)
    for phase, start, end in runs if len(runs) <= PHASES else []:
        first, last = ends[start], ends[end]
        axes.axvspan(first, last, color="0.5", alpha=0.12 if phase == "backward" else 0.04, linewidth=0)
        if phase:
            axes.text(
                (first + last) / 2,
                0.985,
                phase,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                parse_math=False,
            )
    bottom = np.zeros_like(steps.total)
    for kind, layer in steps.layers.items():
        label = f"{kind}, {human(int(layer[steps.total.argmax()]))} at the peak"
        axes.fill_between(
            np.repeat(steps.edges, 2)[1:-1],
            np.repeat(bottom, 2),
            np.repeat(bottom + layer, 2),
            color=COLOURS[kind],
            alpha=0.75,
            linewidth=0,
            label=label,
        )
        bottom = bottom + layer
    axes.stairs(steps.total, steps.edges, baseline=None, color="black", linewidth=0.7)
    top = float((steps.total + steps.beside).max())
    if timeline.others:
        axes.fill_between(
            np.repeat(steps.edges, 2)[1:-1],
            np.repeat(steps.total, 2),
            np.repeat(steps.total + steps.beside, 2),
            facecolor="whitesmoke",
            edgecolor=HELD[1],
            hatch="////",
            linewidth=0,
            label=f"{HELD[0]}, {human(int(steps.beside[steps.total.argmax()]))} at the peak",
        )
    budget = budget_line(timeline, plan)
    if budget is not None:
        top = max(top, budget)
        axes.axhline(budget, color="black", linestyle="--", linewidth=1)
        label = f" budget {'' if timeline.others else 'for the step '}{human(budget)}"
        axes.text(0, budget, label, transform=axes.get_yaxis_transform(), va="bottom")
    at = int(steps.total.argmax())
    x = (steps.edges[at] + steps.edges[at + 1]) / 2
    name = f" at {timeline.moments[timeline.peak_moment].name:.40}" if timeline.moments else ""
    right = x > (steps.edges[0] + steps.edges[-1]) / 2
    axes.plot([x], [timeline.peak], marker="v", color="black", markersize=7, clip_on=False)
    axes.annotate(
        f"peak {human(timeline.peak)}{name}",
        (x, timeline.peak),
        (-8 if right else 8, 6),
        textcoords="offset points",
        ha="right" if right else "left",
        bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},  # the budget's line may be behind it
        parse_math=False,
    )
    axes.set_xlim(steps.edges[0], steps.edges[-1])
    axes.set_ylim(0, 1.18 * top or 1)
    axes.yaxis.set_major_formatter(lambda size, _: human(int(size)))
    axes.set_xlabel(steps.label)
    axes.set_title(f"{timeline.title} ({timeline.origin})", loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    if steps.layers:
        handles, labels = axes.get_legend_handles_labels()  # the legend reads from the top of the stack down
        axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _steps(timeline: Timeline) -> _Steps:
    ends, label = edges(timeline)
    at, count = np.array(ends), len(ends) - 1
    layers = {kind: np.zeros(count + 1) for kind in COLOURS}
    for block in timeline.blocks:
        layers[block.kind][block.start] += block.bytes
        layers[block.kind][block.end] -= block.bytes
    base = dict(timeline.base)
    values = {kind: np.cumsum(delta)[:-1] + base.get(kind, 0) for kind, delta in layers.items()}
    total = np.sum(list(values.values()), axis=0)
    beside = np.array(timeline.beside or [0], dtype=np.float64)
    if count > COLUMNS:
        column = ((at[:-1] - at[0]) * (COLUMNS / (at[-1] - at[0]))).astype(np.int64)
        starts = np.flatnonzero(np.diff(column, prepend=-1))
        # By column, then by total: the last of each column is its largest moment.
        order = np.lexsort((total, column))
        largest = order[np.append(starts[1:], count) - 1]
        values, total, beside = {kind: v[largest] for kind, v in values.items()}, total[largest], beside[largest]
        at = np.append(at[starts], at[-1])
    return _Steps(at, total, {kind: v for kind, v in values.items() if v.any()}, beside, label)
