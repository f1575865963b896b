"""The six-layer GRPO step in slices: its peak and its time beside the unplanned step's.

    python benchmarks/tiles.py [--inner inductor|eager] [-o FILE]

Option tiles="auto" at four budgets: 92 MiB above the parameters, 75, 54, and the least there is. Peaks are in MiB above
the 34.4 MiB of parameters; the gradients, as large again, are inside. Times are ratios to the unplanned step:
medians of 15, taken in turns in one process: let nothing else run. `rms_ratio`: the gradients' rms error against
float64 over that of the unplanned step. Exit code 1 when a measured peak is over its budget.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

from benchmarks.machine import save
from benchmarks.measured import measure_planned, measure_unplanned, smallest_budget, time_ratio
from memplan.backend import memplan_backend
from tests.accuracy import exact_gradients, gradients, rms_error
from tests.models import six_layer

MIB = 2**20


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("-o", "--out", default="benchmarks/results/tiles_{inner}.json")
    args = parser.parse_args()
    backend = "inductor" if args.inner == "inductor" else "aot_eager"
    sample = six_layer()
    base = sum(t.untyped_storage().nbytes() for t in [*sample.module.parameters(), *sample.batch])
    exact = exact_gradients(sample, six_layer(dtype=torch.float64))
    unplanned = measure_unplanned(sample, backend)
    torch._dynamo.reset()
    error = rms_error(gradients(torch.compile(sample.step, backend=backend), sample), exact)
    print(f"unplanned: {unplanned['peak'] / MIB:.1f} MiB, {1e3 * unplanned['seconds']:.0f} ms", flush=True)
    sample.module.zero_grad()
    least = smallest_budget(sample, args.inner, tiles="auto")
    rows, good = list[dict[str, Any]](), True
    for budget in (base + 92 * MIB, base + 75 * MIB, base + 54 * MIB, least):
        options = {"inner": args.inner, "budget": budget, "tiles": "auto"}
        found = measure_planned(sample, **options)
        torch._dynamo.reset()
        step = torch.compile(sample.step, backend=memplan_backend, options=options)
        row = {"budget": budget - base, "peak": found["peak"], "planned": found["planned"]}
        row |= {
            "time_ratio": time_ratio(sample, step, torch.compile(sample.step, backend=backend)),
            "first_call_seconds": found["first_call_seconds"],
        }
        row |= {"rms_ratio": rms_error(gradients(step, sample), exact) / error}
        sample.module.zero_grad()
        rows.append(row)
        good = good and row["peak"] <= row["budget"]
        sizes = (f"{k} {row[k] / MIB:.1f} MiB" for k in ("budget", "peak", "planned"))
        ratios = (f"{k} {row[k]:.2f}" for k in ("time_ratio", "rms_ratio"))
        print(*sizes, *ratios, sep=", ", flush=True)
    save(
        args.out.format(inner=args.inner),
        {"inner": args.inner, "parameters": base, "unplanned": unplanned, "rows": rows},
    )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
