"""The six-layer GRPO step: unplanned, torch's own means, and memplan over a range of budgets.

    python benchmarks/six_layer.py [--inner inductor|eager] [--budgets 12] [-o FILE]

Peaks are in MiB above the 34.4 MiB of parameters; the gradients, as large again, are inside (measured.py says how they
are measured). Exit code 1 when a measured peak is over its budget or does not fall with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

from benchmarks.machine import save
from benchmarks.measured import measure_planned, measure_unplanned, smallest_budget
from tests.models import Sample, six_layer

MIB = 2**20


def planned(sample: Sample, inner: str, budget: int) -> dict[str, float]:
    """One budget: what was planned and what was measured."""
    figures = measure_planned(sample, inner=inner, budget=budget)
    return {"budget": budget - figures.pop("base")} | figures


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("-o", "--out", default="benchmarks/results/six_layer.json")
    args = parser.parse_args()
    backend = "inductor" if args.inner == "inductor" else "aot_eager"
    rows: dict[str, Any] = {}

    def show(name: str, figures: dict[str, float]) -> None:
        rows[name] = figures
        sizes = " ".join(f"{k} {v / MIB:.1f} MiB" for k, v in figures.items() if "seconds" not in k)
        print(f"{name:28s} {sizes}  {1e3 * figures['seconds']:.0f} ms", flush=True)

    sample = six_layer()
    show("unplanned", measure_unplanned(sample, backend))
    if args.inner == "inductor":
        for ratio in (0.5, 0.3):
            with torch._functorch.config.patch(activation_memory_budget=ratio):
                show(f"torch budget {ratio}", measure_unplanned(sample, backend))
    by_hand = six_layer()
    by_hand.module.activation_checkpointing_enable()
    show("every layer checkpointed", measure_unplanned(by_hand, backend))

    base = sum(t.untyped_storage().nbytes() for t in [*sample.module.parameters(), *sample.batch])
    least = smallest_budget(sample, args.inner)
    top = base + int(rows["unplanned"]["peak"])
    broken = []
    before = None
    for i in range(args.budgets):
        budget = top - i * (top - least) // max(1, args.budgets - 1)
        figures = planned(sample, args.inner, budget)
        show(f"memplan {i + 1}/{args.budgets}", figures)
        if figures["peak"] > figures["budget"]:
            broken.append(f"budget {i + 1}: measured {figures['peak']} over {figures['budget']}")
        if before is not None and figures["peak"] > before:
            broken.append(f"budget {i + 1}: measured {figures['peak']} above {before} of the larger budget")
        before = figures["peak"]
    save(args.out, {"inner": args.inner, "parameters": base, "rows": rows, "broken": broken})
    print("\n".join(broken) or f"{args.budgets} budgets: no peak over its budget, and peaks fall with it")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
