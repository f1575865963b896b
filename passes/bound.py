"""How fast can any plan be? A lower bound on the time of a step inside a budget, from a linear program.

In: a Step, a Budget, a Machine. Out: a Bound: no plan of the class that fits takes less.
The class: the step's own order of ops, each run again at most once, whole storages kept, copied to the host and back
or made again, durations by the machine. Left out is what only makes plans slower or larger (memory of what runs again,
copies that wait behind a release), and decisions may be fractions; so what the bound says holds for every plan, with
policies of any kind, and an infeasible program (relaxation.py) proves that nothing fits.
"""

from __future__ import annotations

import math
from dataclasses import replace

from memplan.ir import Bound, Budget, Machine, Plan, Step
from memplan.passes.necessity import necessity
from memplan.passes.relaxation import Relaxation

SLACK = 1e-6  # of the time: what a solver's tolerances may be worth


def with_bound(plan: Plan) -> Plan:
    """The plan with its bound; none where it uses what is outside of the class, the disk, or where nothing fits."""
    found = bound(plan.step, plan.budget, plan.machine)
    outside = any(offload.tier != "host" for offload in plan.offloads.values())
    return plan if outside or math.isinf(found.seconds) else replace(plan, bound=found)


def bound(step: Step, budget: Budget, machine: Machine) -> Bound:
    """The least time of any plan that fits. Seconds are infinite if there is none."""
    program = Relaxation(step, budget, machine, necessity(step))
    program.recomputation()
    rows = program.memory()
    found = program.lp.relaxed()
    base = (float(program.times.sum()) + program.late) * program.second
    if found is None:
        return Bound(math.inf)
    slopes = {m: float(found.slopes[row]) * program.second / program.unit for m, row in rows.items()}
    least = Bound(
        base + max(0.0, found.cost * program.second - SLACK * base),
        per_byte=max(0.0, -sum(slopes.values())),
        per_bus=max(0.0, program.faster_bus(found) * program.second),
    )
    binding = min(slopes, key=lambda m: (slopes[m], m), default=0)
    if not slopes or slopes[binding] >= 0:
        return least
    needs = int(program.needs.held[binding])
    return replace(least, at=step.ops[program.order[binding]].name, needs=needs)
