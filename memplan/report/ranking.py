"""A ranking of policies: a table, JSON, and overhead over budget as a picture, alone or in an offline page.

In: rows. Out: text or bytes. In the picture each policy is a line per step and machine, and what
no plan can beat is the grey line below them.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memplan import serialize
from memplan.units import human

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """One plan. `peak`, `away`: bytes on the device and on the host, at most. `overhead`: fraction of the step's time
    with nothing recomputed. `gap`: the same, by which no other plan can be faster. `seconds`: it took to plan.
    `note`: why there is no plan, or whose it is. `cost`: the model that times are by.
    """

    step: str
    machine: str
    budget: int
    policy: str
    fits: bool
    peak: int = 0
    away: int = 0
    overhead: float = math.inf
    gap: float = math.inf
    seconds: float = 0.0
    note: str = ""
    cost: str = "roofline-v1"


@dataclass(frozen=True)
class Ranking:
    """Rows by step, machine and budget, the fastest first."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return table(self.rows)

    def to_json(self) -> str:
        """The rows as JSON."""
        return _json(self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as .json, or the overheads over the budgets as .png or .html. Raises MemplanError for others."""
        from memplan import report

        report.check_path(Ranking, path)
        suffix = Path(path).suffix.lower()
        if suffix == ".png":
            serialize.write(path, _drawn(self.rows, "png"))
        else:
            serialize.write(path, self.to_json() if suffix == ".json" else _page(self.rows))


def table(rows: Sequence[Row]) -> str:
    """One line per plan, in groups of a step, a machine and a budget."""
    lines, group = list[str](), None
    for row in rows:
        if group != (row.step, row.machine, row.budget, row.cost):
            group = (row.step, row.machine, row.budget, row.cost)
            lines += ["", f"{row.step} on {row.machine}, budget {human(row.budget)}, times by {row.cost}"]
            lines.append(f"  {'policy':24}{'peak':>10}{'host':>10}{'overhead':>10}{'gap':>8}{'planned in':>12}")
        lines.append(_line(row) + (f"  {row.note}" if row.note else ""))
    return "\n".join(lines).strip("\n")


def _line(row: Row) -> str:
    planned = f"{row.seconds:.1f} s"
    if not row.fits:
        why = human(row.peak) if row.peak else "-"
        return f"  {row.policy:24}{why:>10}{'':>10}{'no fit':>10}{'':>8}{planned:>12}"
    away = human(row.away) if row.away else "-"
    return (
        f"  {row.policy:24}{human(row.peak):>10}{away:>10}{100 * row.overhead:>+9.2f}%"
        f"{100 * max(0.0, row.gap):>8.2f}{planned:>12}"
    )


def _json(rows: Sequence[Row]) -> str:
    """The rows; what is infinite is null."""
    plain = [
        {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in dataclasses.asdict(row).items()}
        for row in rows
    ]
    return json.dumps({"memplan": "Ranking", "rows": plain}, indent=1)


def _page(rows: Sequence[Row]) -> str:
    picture = _drawn(rows, "svg").decode()
    picture = picture[picture.index("<svg") :]
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>memplan: policies</title>\n'
        "<style>body{font:14px system-ui;margin:2em;max-width:80em}svg{max-width:100%;height:auto}</style>\n"
        f"<h1>Policies</h1>\n{picture}\n<pre>{html.escape(table(rows))}</pre></html>\n"
    )


def _drawn(rows: Sequence[Row], kind: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((row.step, row.machine) for row in rows))
    figure: Figure = Figure(figsize=(10, 4.5 * max(1, len(groups))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, group in zip(figure.subplots(max(1, len(groups)), squeeze=False)[:, 0], groups, strict=False):
        _curves(axes, [row for row in rows if (row.step, row.machine) == group and row.fits])
        axes.set_title(f"{group[0]} on {group[1]}", parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


def _curves(axes: Axes, rows: Sequence[Row]) -> None:
    for policy in sorted({row.policy for row in rows}):
        own = sorted((row.budget / 1e9, 100 * row.overhead) for row in rows if row.policy == policy)
        axes.plot(*zip(*own, strict=True), marker="o", markersize=4, label=policy)
    least = sorted({(row.budget / 1e9, 100 * (row.overhead - row.gap)) for row in rows if math.isfinite(row.gap)})
    if least:
        lowest: dict[float, float] = {}
        for budget, value in least:
            lowest[budget] = max(0.0, min(value, lowest.get(budget, math.inf)))
        axes.fill_between(list(lowest), list(lowest.values()), color="0.85", label="no plan can be faster")
    axes.set_xlabel("budget, GB")
    axes.set_ylabel("overhead, % of the step's time")
    axes.set_yscale("symlog", linthresh=10)  # policies differ by tenths of a percent, and by a hundred
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # something fits
        for text in axes.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
