"""The planner and its bound against integer programs that know the best plan, on steps of 20 to 100 ops. No torch.

    python benchmarks/oracle.py [--graphs 500] [--limit 20] [-o FILE]

Random steps with the backward that autograd would make (tests/torch_free/random_steps.py), each inside a budget between
the smallest peak that a policy reaches and save-all's. Half of them, of at most 60 ops, may copy to the host, over
buses of three speeds, with copies that cost the device time or none. The program of tests/torch_free/milp.py says
what no plan beats, and its solution is simulated; where it takes longer than the limit, both are what was known then.
Exit code 1 when the bound is above a plan, a plan is over its budget, or a plan takes over 2 % more time than the best.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

from benchmarks.machine import save
from memplan.ir import Budget, Machine, Step
from memplan.passes.bound import bound
from memplan.passes.pipeline import evaluate, smallest_plan
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.polish import Judge
from memplan.passes.simulate import peak
from tests.torch_free.milp import Kept, Moved
from tests.torch_free.random_steps import MACHINE, backpropagated

HOST = 10**6  # bytes: all that any of these steps has
NEAR = 0.02  # of the step's time


@dataclasses.dataclass(frozen=True)
class Row:
    """Times are fractions of the step's time with nothing recomputed, above it. `least`: no plan is below;
    `best`: the fastest known plan; `planned`: `optimal`'s; `bound`: what the bound says. `took`: seconds.
    """

    seed: int
    ops: int
    copies: bool
    least: float
    best: float
    planned: float
    bound: float
    fits: bool
    took: float
    oracle_took: float


def look(seed: int, limit: float) -> Row:
    """One step inside one budget."""
    random = Random(seed)
    copies = seed % 2 == 1
    step = backpropagated(random, random.randint(14, 42 if copies else 70))
    machine = dataclasses.replace(
        MACHINE, host_bandwidth=random.choice((1e7, 1e8, 1e9)), contention=random.choice((0.0, 1.0))
    )
    budget = _budget(step, machine, random.random(), HOST if copies else 0)
    start = time.perf_counter()
    plan = evaluate(step, Optimal(small=0)(step, budget, machine), budget, machine, "eager", "optimal")
    took = time.perf_counter() - start
    base = plan.base_seconds
    program = Moved(step, budget, machine) if copies else Kept(step, budget, machine)
    least, found = base, [plan.timeline.seconds] if plan.fits else []
    try:
        known = program.solved(limit)
        assert known is not None, f"seed {seed}: the program has no solution, and a plan fits"
        least = known.least
        judge = Judge(step, budget, machine)
        offloads = program.placed(known) if isinstance(program, Moved) else {}
        for own in (judge.candidate(known.saved, offloads), judge.placed(known.saved, frozenset(offloads))):
            found += [base + own.seconds] if not own.over else []
    except TimeoutError:
        pass
    return Row(
        seed,
        len(step.ops),
        copies,
        least / base - 1,
        min(found) / base - 1,
        plan.overhead,
        bound(step, budget, machine).seconds / base - 1,
        plan.fits,
        took,
        time.perf_counter() - start - took,
    )


def _budget(step: Step, machine: Machine, share: float, host: int) -> Budget:
    most = peak(step, step.read_in_backward)
    least = smallest_plan(step, machine, "eager", Budget(0, host_bytes=host)).peak
    return Budget(int(least + share * max(0, most - least)), host_bytes=host)


def summary(rows: list[Row]) -> dict[str, float]:
    """How often what, and how far."""
    excess = [(row.planned - row.best) / (1 + row.best) for row in rows]
    return {
        "graphs": len(rows),
        "solved": sum(row.best - row.least <= 1e-6 for row in rows),
        "found_best": sum(e <= 1e-6 for e in excess),
        "within_2_percent": sum(e <= NEAR for e in excess),
        "worst_excess": max(excess),
        "surely_within_2_percent": sum(row.planned <= row.least + NEAR for row in rows),
        "bound_wrong": sum(row.bound > row.best + 1e-6 for row in rows),
        "over_budget": sum(not row.fits for row in rows),
        "gap_median": statistics.median(row.planned - row.bound for row in rows),
        "gap_within_3_points": sum(row.planned - row.bound <= 0.03 for row in rows),
        "gap_worst": max(row.planned - row.bound for row in rows),
        "most_ops": max(row.ops for row in rows),
    }


def main() -> int:
    """Run, print, write; 1 if something asked for is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for one integer program")
    parser.add_argument("-o", "--out", default="benchmarks/results/oracle.json")
    args = parser.parse_args()
    rows = list[Row]()
    for seed in range(args.graphs):
        rows.append(look(seed, args.limit))
        if seed % 25 == 24:
            print(summary(rows), flush=True)
    groups = {"kept or made again": False, "copied too": True}
    found = {name: summary([row for row in rows if row.copies == copies]) for name, copies in groups.items()}
    save(args.out, {"summary": found, "rows": [dataclasses.asdict(row) for row in rows]})
    for name, of in found.items():
        print(name, *(f"  {what}: {value:.5g}" for what, value in of.items()), sep="\n")
    missed = [s["bound_wrong"] or s["over_budget"] or s["within_2_percent"] < s["graphs"] for s in found.values()]
    return int(any(missed))


if __name__ == "__main__":
    sys.exit(main())
