"""The planner against torch's own plans and others', and against every plan of small graphs. Nothing is run: no torch.

    python benchmarks/planner.py [--graphs 500] [-o FILE]

The recorded step of 32 Llama-8B-shaped layers at the peaks of torch's own plans, on the machine of its recording
(600 TFLOP/s, 2.6 TB/s, a bus of 50 GB/s each way; copies take no bandwidth from ops), simulated, by both cost models:
roofline-v1, each op the longer of its arithmetic and its memory traffic, and fused, where a chain of pointwise ops pays
its traffic once. Then random graphs of at most 6 storages that can cross, where all plans are looked at: whether the
bound is below the best one, and by how much the planner is above it. Exit code 1 when an overhead that was asked for is
missed (by roofline-v1), one is above that of a plan of torch's that fits, the bound is above a plan, or a plan is over
its budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

from benchmarks.machine import save
from memplan import steps
from memplan.ir import Budget, CostModel, Machine, Step
from memplan.passes.bound import bound
from memplan.passes.pipeline import evaluate
from memplan.passes.policies.optimal import Optimal
from memplan.passes.pricing import priced
from memplan.passes.simulate import peak
from memplan.ranking import rank
from memplan.report import Row
from tests.torch_free.oracle import outcomes
from tests.torch_free.test_bound import ROOFLINE, machines, small_steps

ASKED = {13.97: 2.0, 11.97: 2.5, 9.86: 3.1, 7.73: 4.2, 5.59: 7.0, 3.82: 9.8}  # GB: the most overhead in %
POLICIES = ("optimal", "greedy", "block-checkpoint", "sqrt-n", "offload-layer-inputs", "hand-back", "torch-min-cut")
HOST = 100 * 10**9


def recorded(cost: CostModel) -> list[Row]:
    """Every policy at every budget."""
    step = priced(steps.load("llama8b_layers_4k_v32000"), cost)
    ratios = [name for name, _ in step.saved_by if name.startswith("torch-budget")]
    sizes = [_torch_peak(step, size) for size in ASKED]
    found = rank({step.name: step}, [ROOFLINE], [*POLICIES, *ratios], sizes, host_bytes=HOST, progress=print)
    print(found, flush=True)
    return list(found.rows)


def above_torch(rows: Sequence[Row]) -> Iterator[str]:
    """Where the planner's plan is slower than one of torch's that fits."""
    for mine in (row for row in rows if row.policy == "optimal"):
        theirs = [row for row in rows if row.budget == mine.budget and row.fits and row.policy.startswith("torch-")]
        for row in theirs:
            if not mine.fits or mine.overhead > row.overhead:
                where = f"{mine.cost}, {mine.budget / 1e9:.2f} GB"
                yield f"{where}: {100 * mine.overhead:.2f} %, and {row.policy} {100 * row.overhead:.2f} %"


def _torch_peak(step: Step, size: float) -> int:
    """The peak of torch's own plan that is so many GB, to the byte."""
    saved = {name: frozenset(storages) for name, storages in step.saved_by}
    return next(p for p in (peak(step, s) for s in saved.values()) if abs(p / 1e9 - size) < 0.01)


def buses() -> dict[str, float]:
    """Overhead inside 8 GB by the speed of the bus, in GB/s: a faster one is never worse."""
    step, out = steps.load("llama8b_layers_4k_v32000"), dict[str, float]()
    best: float | None = None
    for speed in (10, 25, 50, 100, 200):
        machine = dataclasses.replace(ROOFLINE, host_bandwidth=speed * 1e9)
        budget = Budget(8 * 10**9, host_bytes=HOST)
        plan = evaluate(step, Optimal()(step, budget, machine), budget, machine, "eager", "optimal")
        out[str(speed)] = plan.overhead
        assert best is None or plan.overhead <= best
        best = plan.overhead
    return out


def graphs(count: int) -> dict[str, float]:
    """Random graphs: the share within 2 % of the best plan, the worst excess, and how often the bound was wrong."""
    excess, wrong, over = list[float](), 0, 0

    @seed(0)
    @settings(deadline=None, max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(small_steps(), machines(), st.booleans(), st.randoms(use_true_random=False))
    def look(step: Step, machine: Machine, offload: bool, random: Random) -> None:
        nonlocal wrong, over
        every = outcomes(step, machine, offload=offload)
        for one in {every[0], every[-1], random.choice(every)}:
            budget = Budget(one.peak, host_bytes=one.host_peak)
            best = min(o.seconds for o in every if o.peak <= one.peak and o.host_peak <= one.host_peak)
            plan = evaluate(step, Optimal(small=0)(step, budget, machine), budget, machine, "eager", "optimal")
            wrong += bound(step, budget, machine).seconds > best * (1 + 1e-6) + 1e-15
            over += not plan.fits
            excess.append(plan.timeline.seconds / best - 1 if best else 0.0)

    look()
    near = sum(e <= 0.02 for e in excess) / len(excess)
    return {"budgets": len(excess), "within_2_percent": near, "worst": max(excess), "bound_wrong": wrong, "over": over}


def main() -> int:
    """Run, print, write; 1 if something asked for is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("-o", "--out", default="benchmarks/results/planner.json")
    args = parser.parse_args()
    start = time.perf_counter()
    rows, fused = recorded("roofline-v1"), recorded("fused")
    small, speeds = graphs(args.graphs), buses()
    mine = sorted((row.budget, row.overhead) for row in rows if row.policy == "optimal")
    missed = [
        f"{size / 1e9:.2f} GB: {100 * overhead:.2f} % over {most} %"
        for (size, overhead), most in zip(mine, sorted(ASKED.values(), reverse=True), strict=True)
        if 100 * overhead > most
    ]
    broken = [*missed, *above_torch(rows), *above_torch(fused)]
    broken += [f"{name}: {small[name]}" for name in ("bound_wrong", "over") if small[name]]
    plain = {"rows": [dataclasses.asdict(row) for row in rows], "fused": [dataclasses.asdict(row) for row in fused]}
    save(args.out, plain | {"graphs": small, "buses": speeds, "broken": broken})
    print(f"{small}\noverhead inside 8 GB by GB/s of the bus: {speeds}\n{time.perf_counter() - start:.0f} s")
    print("\n".join(broken) or "all overheads as asked, none above torch's; no bound above a plan")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
