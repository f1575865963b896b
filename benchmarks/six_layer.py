"""The six-layer GRPO step: unplanned, torch's own means, and memplan over a range of budgets.

    python benchmarks/six_layer.py [--inner inductor|eager] [--budgets 12] [-o FILE]

Peaks are measured by memplan.record on the second step with .grad None before it, in MiB above the 34.4 MiB of
parameters; the gradients, as large again, are inside. Seconds are the median of five steps. Exit code 1 when a measured
peak is over its budget or does not fall with it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from tests.models import Sample, six_layer

MIB = 2**20


def measure(sample: Sample, step: Callable[[Any], torch.Tensor]) -> dict[str, float]:
    """Peak above the parameters in bytes, median seconds, and the seconds of the first call."""

    def once() -> float:
        sample.module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step(sample.batch).backward()
        return time.perf_counter() - start

    first = once()
    sample.module.zero_grad(set_to_none=True)
    with memplan.record() as seen:
        step(sample.batch).backward()
    sample.module.zero_grad(set_to_none=True)
    seconds = statistics.median(once() for _ in range(5))
    sample.module.zero_grad(set_to_none=True)
    return {"peak": seen.timeline.peak_above_base, "seconds": seconds, "first_call_seconds": first}


def planned(sample: Sample, inner: str, budget: int) -> dict[str, float]:
    """One budget: what was planned and what was measured."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/plan.json"
        options = {"budget": budget, "inner": inner, "out": out}
        figures = measure(sample, torch.compile(sample.step, backend=memplan_backend, options=options))
        timeline = memplan.Plan.load(out).timeline
    return {"budget": budget - timeline.base_bytes, "planned": timeline.peak_above_base} | figures


def smallest_budget(sample: Sample, inner: str) -> int:
    """The smallest budget that fits, as the refusal of one byte names it."""
    torch._dynamo.reset()
    try:
        planned(sample, inner, 1)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, memplan.DoesNotFit):
            return error.inner_exception.smallest
        raise
    raise AssertionError("one byte was enough")


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
    show("unplanned", measure(sample, torch.compile(sample.step, backend=backend)))
    if args.inner == "inductor":
        for ratio in (0.5, 0.3):
            torch._dynamo.reset()
            with torch._functorch.config.patch(activation_memory_budget=ratio):
                show(f"torch budget {ratio}", measure(sample, torch.compile(sample.step, backend=backend)))
    torch._dynamo.reset()
    by_hand = six_layer()
    by_hand.module.activation_checkpointing_enable()
    show("every layer checkpointed", measure(by_hand, torch.compile(by_hand.step, backend=backend)))

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
