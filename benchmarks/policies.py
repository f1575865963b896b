"""Every built-in policy on every recorded step, from the least budget to what save-all takes. No torch model is run.

    python benchmarks/policies.py [NAME...] [--budgets 12] [--only POLICY,...] [-o FILE]

An H100 whose bus takes 50 GB/s each way, without a host and with 1 TB of it; the fastest a machine can be is the bound.
Of each step: a row for each policy and budget; what the planner takes from nothing, in seconds of one core and of the
clock, for the middle budget with a host; and its overhead inside that budget for buses of 12.5 to 200 GB/s. Steps that
are not named stay in the file as they were, and with `--only` the rows of other policies. Exit code 1 when another
policy is faster than the planner, a plan is over its budget where another fits, or an overhead rises with the budget or
the bus.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

from benchmarks.machine import save
from memplan import steps
from memplan.ir import Budget, Machine, Step
from memplan.machines import machine
from memplan.passes.pipeline import evaluate, smallest_plan
from memplan.passes.policies import builtin
from memplan.passes.policies.optimal import Optimal
from memplan.ranking import rank
from memplan.report import Row
from memplan.steps.generated import layered, linear_chain

TARGET = dataclasses.replace(machine("h100"), host_bandwidth=50e9)
HOST = 10**12
BUSES = tuple(
    dataclasses.replace(TARGET, name=f"h100, {gb:g} GB/s", host_bandwidth=gb * 1e9) for gb in (12.5, 25, 50, 100, 200)
)
GENERATED = {"chain_32": linear_chain(32)} | {f"layered_{seed}": layered(seed) for seed in range(3)}


def names() -> list[str]:
    """What can be asked for."""
    return [*steps.names(), *GENERATED]


def look(name: str, count: int) -> dict[str, Any]:
    """The figures of one step."""
    step = GENERATED[name] if name in GENERATED else steps.load(name)
    offered = {known for known, _ in step.saved_by}
    wanted = [p for p in builtin() if not p.endswith("-disk") and (not p.startswith("torch") or p in offered)]
    rows = list[Row]()
    for host in (0, HOST):
        sizes = budgets(step, host, count)
        found = rank({name: step}, [TARGET], wanted, sizes, host_bytes=host)
        rows += [dataclasses.replace(row, note="host" if host else "") for row in found.rows]
    middle = Budget(budgets(step, HOST, 3)[1], host_bytes=HOST)
    buses = rank({name: step}, BUSES, ["optimal"], [middle.bytes], host_bytes=HOST).rows
    return {
        "ops": len(step.ops),
        "base_bytes": step.base_bytes,
        "planned_in": seconds(step, middle, TARGET),
        "broken": broken(rows, buses),
        "worst_gap": max((row.gap for row in rows if row.policy == "optimal" and row.fits), default=None),
        "buses": {row.machine: row.overhead for row in buses},
        "rows": [plain(row) for row in rows],
    }


def added(name: str, known: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """The figures of one step with the rows of `wanted` made anew, inside the budgets of the others'."""
    step = GENERATED[name] if name in GENERATED else steps.load(name)
    rows = [from_plain(name, row) for row in known["rows"] if row["policy"] not in wanted]
    for host in (0, HOST):
        note = "host" if host else ""
        sizes = sorted({row.budget for row in rows if row.note == note})
        found = rank({name: step}, [TARGET], wanted, sizes, host_bytes=host)
        rows += [dataclasses.replace(row, note=note) for row in found.rows]
    rows.sort(key=lambda row: (row.note, row.budget, not row.fits, row.overhead, row.peak, row.policy))
    return known | {"broken": broken(rows, ()), "rows": [plain(row) for row in rows]}


def budgets(step: Step, host: int, count: int) -> list[int]:
    """From the least that anything fits to what save-all takes, evenly spread on a scale of ratios beyond the base."""
    most = evaluate(step, {}, Budget(2**62), TARGET, "eager", "save-all").peak - step.base_bytes
    least = max(1, smallest_plan(step, TARGET, "eager", Budget(0, host_bytes=host)).peak - step.base_bytes)
    ratio = (most / least) ** (1 / (count - 1))
    return sorted({step.base_bytes + math.ceil(least * ratio**k) for k in range(count - 1)} | {step.base_bytes + most})


def seconds(step: Step, budget: Budget, target: Machine) -> dict[str, float]:
    """What a plan takes of a step of which nothing is known yet: of all cores together, and of the clock."""
    new, spent, clock = dataclasses.replace(step), time.process_time(), time.perf_counter()
    Optimal()(new, budget, target)
    return {"cpu": round(time.process_time() - spent, 2), "clock": round(time.perf_counter() - clock, 2)}


def broken(rows: list[Row], buses: Sequence[Row]) -> list[str]:
    """What must not be."""
    out = list[str]()
    for (budget, host), group in itertools.groupby(rows, key=lambda row: (row.budget, row.note)):
        here = {row.policy: row for row in group}
        mine = here["optimal"]
        for other in here.values():
            if other.fits and not (mine.fits and mine.overhead <= other.overhead + 1e-9):
                out.append(f"{budget} {host}: {mine.overhead:.6f}, {other.policy} {other.overhead:.6f}")
        out += [f"{budget} {host}: {row.policy} is over" for row in here.values() if row.fits and row.peak > budget]
    for of, series in (("budget", [r for r in rows if r.policy == "optimal" and r.fits]), ("bus", list(buses))):
        for before, after in itertools.pairwise(series):
            if before.note == after.note and after.overhead > before.overhead + 1e-12:
                out.append(f"overhead rises with the {of}: {before.overhead:.6f}, {after.overhead:.6f}")
    return out


def plain(row: Row) -> dict[str, Any]:
    """The row without what all have in common; what is infinite is None."""
    values = dataclasses.asdict(row) | {"host": row.note == "host", "seconds": round(row.seconds, 2)}
    return {
        k: None if isinstance(v, float) and math.isinf(v) else v
        for k, v in values.items()
        if k not in ("step", "machine", "note")
    }


def from_plain(name: str, row: dict[str, Any]) -> Row:
    """The row of such values."""
    values: dict[str, Any] = {k: math.inf if v is None else v for k, v in row.items() if k != "host"}
    return Row(name, TARGET.name, note="host" if row["host"] else "", **values)


def main() -> int:
    """Run, print, write after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names())}; default all")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--only", metavar="POLICY,...", help="rank these, beside the rows that the file has of others")
    parser.add_argument("-o", "--out", default="benchmarks/results/policies.json")
    args = parser.parse_args()
    out = Path(args.out)
    found: dict[str, Any] = json.loads(out.read_text())["steps"] if out.exists() else {}
    for name in args.names or names():
        found[name] = added(name, found[name], args.only.split(",")) if args.only else look(name, args.budgets)
        if not args.only:
            found[name]["resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print({"step": name} | {k: v for k, v in found[name].items() if k != "rows"}, flush=True)
        save(out, {"budgets": args.budgets, "steps": dict(sorted(found.items()))})
    return int(any(one["broken"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
