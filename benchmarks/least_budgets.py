"""Where the gap is large: linear chains at the least budgets, beside the best known plan of an integer program.

    python benchmarks/least_budgets.py [--limit 60] [-o FILE]

Chains of 8 and 16 ops at the lower half of the budgets of benchmarks/policies.py, of 32 at the least, on its machine
with a host. Overheads are fractions of the step's time: `planned` is `optimal`'s, `bound` what the bound says, `least`
what no plan is below, and `best` the fastest known plan, simulated. Exit code 1 when a bound is above the best plan, a
plan is over its budget, or a program does not end inside the limit (seconds).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks and tests, which are not installed

from benchmarks.machine import save
from benchmarks.policies import HOST, TARGET, budgets
from memplan.ir import Budget
from memplan.passes.bound import bound
from memplan.passes.pipeline import make_plan
from memplan.passes.policies.polish import Judge
from memplan.steps.generated import linear_chain
from tests.torch_free.milp import Moved

CHAINS = {8: 4, 16: 4, 32: 1}  # length -> how many budgets, from the least


def look(length: int, size: int, limit: float) -> dict[str, float]:
    """One chain inside one budget. Raises TimeoutError when its program does not end."""
    step, budget = linear_chain(length), Budget(size, host_bytes=HOST)
    plan = make_plan(step, "optimal", budget, TARGET, inner="eager", fit=False)
    base, program, judge = plan.base_seconds, Moved(step, budget, TARGET), Judge(step, budget, TARGET)
    known = program.solved(limit)
    assert known is not None, f"chain of {length}: the program has no solution, and a plan fits"
    offloads = program.placed(known)
    found = [judge.candidate(known.saved, offloads), judge.placed(known.saved, frozenset(offloads))]
    return {
        "length": length,
        "budget": size,
        "fits": plan.fits,
        "planned": plan.overhead,
        "best": min([plan.overhead, *(f.seconds / base for f in found if not f.over)]),
        "least": known.least / base - 1,
        "bound": bound(step, budget, TARGET).seconds / base - 1,
    }


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("-o", "--out", default="benchmarks/results/least_budgets.json")
    args = parser.parse_args()
    rows = []
    for length, count in CHAINS.items():
        for size in budgets(linear_chain(length), HOST, 8)[:count]:
            rows.append(look(length, size, args.limit))
            print(rows[-1], flush=True)
    save(args.out, {"rows": rows})
    return int(any(row["bound"] > row["best"] + 1e-6 or not row["fits"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
