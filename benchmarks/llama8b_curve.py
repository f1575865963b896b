"""The 8B GRPO step over 8 completions of 20,480 tokens, one at a time: its time over the budget, and the bound.

    python benchmarks/llama8b_curve.py [-o FILE] [--picture FILE]

The recorded step of one completion (memplan/steps, llama8b_lora_grpo_1x20k), eight times with its gradients added up:
reference and policy pass, LoRA on all projections, head and MLPs in slices. An H100 by its data sheet, a bus of 50 GB/s
each way, 400 GB of host. Budgets include the CUDA context, the reserve against fragmentation, and the gradients of the
micro-batches before; optimizer states are not there. What times are compared with: the fastest plan that fits 80 GB.
Simulated, not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

from benchmarks.machine import save
from memplan import steps
from memplan.ir import Held, Plan
from memplan.machines import machine
from memplan.options import read_budget
from memplan.passes.bound import bound
from memplan.passes.pipeline import make_plan
from memplan.passes.policies.block_checkpoint import BlockCheckpoint
from memplan.passes.policies.offload import OffloadLayerInputs
from memplan.passes.policies.optimal import Optimal
from memplan.serialize import write

TARGET = dataclasses.replace(machine("h100"), host_bandwidth=50e9)
SIZES = (19, 20, 22, 24, 27, 30, 40, 60, 80)  # GB
OTHERS = (BlockCheckpoint(), OffloadLayerInputs())
MICRO = 8


def main() -> None:
    """Plan, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/llama8b_curve.json")
    parser.add_argument("--picture", default="docs/llama8b-curve.png")
    args = parser.parse_args()
    step = steps.load("llama8b_lora_grpo_1x20k")
    gradients = sum(step.tensors[t].bytes for t in step.backward.outputs)
    step = dataclasses.replace(step, held=Held((("gradient", gradients),)))
    rows = list[dict[str, Any]]()
    best: Plan | None = None
    for size in SIZES:
        budget = read_budget(f"{size}GB", TARGET, host="400GB")
        plan = make_plan(step, Optimal(), budget, TARGET, inner="eager", fit=False)
        if best is not None and best.timeline.seconds < plan.timeline.seconds:
            plan = best  # what was planned for less
        best = plan if plan.fits else best
        least = bound(step, budget, TARGET)
        rows.append(row("optimal", size, plan) | {"bound_seconds": MICRO * least.seconds, "binds_at": least.at})
        print(rows[-1], flush=True)
    wide = read_budget("80GB", TARGET, host="400GB")
    rows += [row(p.name, 80, make_plan(step, p, wide, TARGET, inner="eager", fit=False)) for p in OTHERS]
    fastest = min(r["seconds"] for r in rows if r["fits"])
    for r in rows:
        r["slower_percent"] = round(100 * (r["seconds"] / fastest - 1), 2)
        print(r["policy"], r["budget_gb"], r["fits"], r["slower_percent"])
    save(args.out, {"micro_batches": MICRO, "fastest_seconds": fastest, "rows": rows})
    write(args.picture, drawn(rows, fastest))


def row(policy: str, size: float, plan: Plan) -> dict[str, Any]:
    """What a plan comes to, over all micro-batches. `budget_gb` of what fits it is that which it needs."""
    return {
        "policy": policy,
        "budget_gb": size,
        "needs_gb": plan.budget.needed_for(plan.peak) / 1e9,
        "fits": plan.fits,
        "seconds": MICRO * plan.timeline.seconds,
        "stalled_seconds": MICRO * plan.timeline.stalled,
        "off_device_gb": plan.timeline.host_peak / 1e9,
    }


def drawn(rows: list[dict[str, Any]], fastest: float) -> bytes:
    """The picture, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    mine = [r for r in rows if r["policy"] == "optimal" and r["fits"]]
    sizes = [r["budget_gb"] for r in mine]
    axes.plot(sizes, [r["slower_percent"] for r in mine], marker="o", label="optimal")
    least = [100 * (r["bound_seconds"] / fastest - 1) for r in mine]
    axes.fill_between(sizes, [max(0.0, v) for v in least], color="0.8", label="no plan can be faster")
    for name in (p.name for p in OTHERS):
        other = next(r for r in rows if r["policy"] == name)
        axes.plot(other["needs_gb"], other["slower_percent"], marker="s", linestyle="", label=name)
    axes.set_title("Llama-3.1-8B, LoRA, GRPO with a reference pass, 8 x 20,480 tokens on an H100, one at a time")
    axes.title.set_fontsize(9)
    axes.set_xlabel("budget, GB")
    axes.set_ylabel("% slower than the fastest plan in 80 GB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
