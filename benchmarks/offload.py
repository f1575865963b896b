"""The six-layer GRPO step with what backward needs off the device: peaks, what is off it, and time.

    python benchmarks/offload.py [--inner inductor|eager] [-o FILE]

For each policy and for greedy at several budgets that it accepts: the peak measured and planned in MiB above the
34.4 MiB of parameters (gradients inside), the most that is off the device, and the bytes of the arena. Times are ratios
to the unplanned step's: medians of 15, taken in turns in one process: let nothing else run. On a CPU a copy is a
memmove in a thread.
`share`: of the bytes that cross from forward to backward, those that can leave the device. Exit code 1 when a measured
peak is over its budget, or is not the one planned.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

import memplan
from benchmarks.machine import save
from benchmarks.measured import measure_planned, measure_unplanned, smallest_budget, time_ratio
from memplan.backend import memplan_backend
from memplan.runtime.host_pool import arena
from tests.models import Sample, six_layer

MIB = 2**20


def offloaded(sample: Sample, options: dict[str, Any]) -> dict[str, float]:
    """What the plan has off the device, and the share of what crosses that can be."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        torch.compile(sample.step, backend=memplan_backend, options=options | {"out": f"{folder}/p.json"})(sample.batch)
        plan = memplan.Plan.load(f"{folder}/p.json")
    size = {t: tensor.bytes for t, tensor in enumerate(plan.step.tensors)}
    crossing = plan.saved - set(plan.step.forward.outputs)
    movable = sum(size[t] for t in crossing & plan.step.offloadable if size[t] >= MIB)
    return {"off_device": plan.timeline.host_peak, "share": movable / max(1, sum(size[t] for t in crossing))}


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("-o", "--out", default="benchmarks/results/offload_{inner}.json")
    args = parser.parse_args()
    backend = "inductor" if args.inner == "inductor" else "aot_eager"
    sample = six_layer()
    base = sum(t.untyped_storage().nbytes() for t in [*sample.module.parameters(), *sample.batch])
    unplanned = measure_unplanned(sample, backend)
    print(f"unplanned: {unplanned['peak'] / MIB:.1f} MiB", flush=True)
    room = {"inner": args.inner, "host_budget": "4GB"}
    top = base + int(unplanned["peak"])
    cases = [("offload-all", top), ("offload-layer-inputs", top), ("hand-back", base + 260 * MIB)]
    least = smallest_budget(sample, **room)
    wanted = (base + 200 * MIB, base + 120 * MIB, base + 92 * MIB, least)
    cases += [("greedy", budget) for budget in wanted if budget >= least]
    rows, good = list[dict[str, Any]](), True
    for policy, budget in cases:
        options = room | {"policy": policy, "budget": budget}
        found = measure_planned(sample, **options)
        row = {"policy": policy, "budget": budget - base, "peak": found["peak"], "planned": found["planned"]}
        row |= offloaded(sample, options) | {"arena": arena("host").bytes}
        torch._dynamo.reset()
        step = torch.compile(sample.step, backend=memplan_backend, options=options)
        row["time_ratio"] = time_ratio(sample, step, torch.compile(sample.step, backend=backend))
        rows.append(row)
        good = good and row["peak"] == row["planned"] and row["peak"] <= row["budget"]
        print(
            f"{policy:21s} inside {row['budget'] / MIB:6.1f}: {row['peak'] / MIB:6.1f} MiB, planned "
            f"{row['planned'] / MIB:6.1f}, off the device {row['off_device'] / MIB:6.1f} of "
            f"{row['arena'] / MIB:.1f}, {100 * row['share']:.1f} % can leave, time x{row['time_ratio']:.2f}",
            flush=True,
        )
    figures = {"inner": args.inner, "unplanned": unplanned["peak"], "rows": rows}
    save(args.out.format(inner=args.inner), figures)
    print("all as planned" if good else "a promise is broken")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
