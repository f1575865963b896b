"""Where a planned step failed: the plan of all that ran in it, and a moment of it. Made only when it has.

In: the compiled variant of a graph, and the place in it that an error came from. Out: a Failure. Of a step in several
graphs the timeline is that of those that have run, together, without what Python allocates between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memplan.ir import Plan
from memplan.passes import joint
from memplan.runtime.failing import Place

if TYPE_CHECKING:
    from memplan.passes.dispatch import Variant
    from memplan.passes.whole_step import Run


@dataclass(frozen=True)
class Failure:
    """`moment` is of the plan's timeline; `exact`: it is that of the op that failed, not just of its graph's peak."""

    plan: Plan
    moment: int
    exact: bool


def located(variant: Variant, place: Place) -> Failure:
    """The failure of a variant that has a plan: the plan as it was made, with what was held when it was looked at last.
    There is no memory to look again, and a recording under way would record each call of it.
    """
    step, plan = variant.owner.step, variant.compiled.plan
    assert plan is not None
    runs = [] if step is None else [*step.runs]
    if step is not None and step.now is not None and place.phase != "backward":
        runs.append(step.now)
    own = [k for k, run in enumerate(runs) if run.variant is variant]
    if step is None or not own:
        return Failure(plan, *place.moment_of(plan.timeline))
    k = own[-1]
    parts = [run.part(_made(run)) for run in runs]
    plan = parts[k].plan
    moment, exact = place.moment_of(plan.timeline)
    if len(parts) == 1:
        return Failure(plan, moment, exact)
    timeline = joint.compose(parts, step.held, f"{plan.step.name}, {len(parts)} graphs")
    budget = variant.owner.partitioner.budget
    return Failure(replace(plan, timeline=timeline, budget=budget), joint.placed(parts, k, moment), exact)


def _made(run: Run) -> Plan:
    """The plan of a run, for its own sizes where there is one."""
    plan = run.variant.plans.get(run.sizes, run.variant.compiled.plan)
    assert plan is not None
    return plan
