"""Predicted against measured under Inductor: 8 models, each at 8 budgets, and the built-in policies beside them.

    python benchmarks/inductor_sweep.py [--models llama ...] [--budgets 8] [-o FILE]

The budgets lie evenly between the unplanned peak and the smallest budget that fits, as the refusal of one byte names
it. Peaks are measured as measured.py says, in KiB above the parameters and the batch. Exit code 1 when at any budget
the measured peak is over it, is above that of a larger budget, or is more than 0.5 % off the peak read from the
generated code; and when a budget of 1.05 times the least peak measured for a built-in policy, resident bytes included,
is refused or not kept.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

import memplan
from benchmarks.machine import save
from benchmarks.measured import measure_planned, measure_unplanned, smallest_budget
from tests.models import CASES, Sample, six_layer, unet

POLICIES = ("save-all", "block-checkpoint", "sqrt-n", "torch-min-cut")
ACCEPTED = 1.05  # times the least peak of a policy: such a budget is kept
OFF = 0.005  # of the measured peak
MODELS = {case.name: case.make for case in CASES} | {
    "unet": functools.partial(
        unet, images=4, size=64
    ),  # on small images one convolution's workspace is all of the peak
    "six_layer": six_layer,
}
Rows = dict[str, dict[str, float]]


def at_budget(sample: Sample, budget: int) -> dict[str, float]:
    """One budget: what was planned and measured, or what would have been needed."""
    try:
        figures = measure_planned(sample, budget=budget, inner="inductor")
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, memplan.DoesNotFit):
            return {"total_budget": budget, "total_refused_for": error.inner_exception.smallest}
        raise
    return {"budget": budget - figures["base"]} | figures


def run(sample: Sample, budgets: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures: unplanned, every policy, a budget just above the least of them, and the sweep downwards."""
    unplanned = measure_unplanned(sample, "inductor")
    yield "unplanned", unplanned
    least = []
    for policy in POLICIES:
        figures = measure_planned(sample, policy=policy, inner="inductor")
        least.append(figures["base"] + figures["peak"])
        yield policy, figures
    yield "accepted", at_budget(sample, int(ACCEPTED * min(least)))
    bottom = smallest_budget(sample, "inductor")
    top = max(bottom, int(figures["base"] + unplanned["peak"]))
    for i in range(budgets):
        yield f"budget {i + 1}/{budgets}", at_budget(sample, top - i * (top - bottom) // max(1, budgets - 1))


def broken(rows: Rows) -> Iterator[str]:
    """The promises that these figures do not keep."""
    before = float("inf")
    for name, row in rows.items():
        if "total_refused_for" in row:
            yield f"{name}: refused {row['total_budget']}, and {row['total_refused_for']} would do"
        elif "planned" in row and abs(row["planned"] - row["peak"]) > OFF * row["peak"]:
            yield f"{name}: measured {row['peak']}, planned {row['planned']}"
        if row.get("budget", row.get("peak", 0)) < row.get("peak", 0):
            yield f"{name}: measured {row['peak']} over {row['budget']}"
        if name.startswith("budget") and "peak" in row:
            if row["peak"] > before:
                yield f"{name}: measured {row['peak']} above {before} of a larger budget"
            before = row["peak"]


def main() -> int:
    """Run, print, write after every model; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", type=int, default=8)
    parser.add_argument("-o", "--out", default="benchmarks/results/inductor_sweep.json")
    args = parser.parse_args()
    models: dict[str, Rows] = {}
    found: list[str] = []
    for model in args.models:
        rows = models[model] = {}
        for name, figures in run(MODELS[model](), args.budgets):
            rows[name] = figures
            sizes = " ".join(f"{k} {v / 1024:.1f}" for k, v in figures.items() if "seconds" not in k and k != "base")
            print(f"{model:10s} {name:16s} {sizes} KiB", flush=True)
        found += [f"{model}, {line}" for line in broken(rows)]
        figures_so_far: dict[str, Any] = {"models": models, "broken": found}
        save(args.out, figures_so_far)
    print("\n".join(found) or f"{len(models)} models at {args.budgets} budgets: every promise kept")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
