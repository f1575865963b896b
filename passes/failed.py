"""Where a planned step failed: the plan of all that ran in it, and a moment of it. Made only when it has.

In: the compiled variant of a graph, and the place in it that an error came from. Out: a Failure. Of a step in several
graphs the timeline is that of those that have run, together, without what Python allocates between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from memplan.ir import Held, Plan
from memplan.passes import joint
from memplan.runtime.failing import Place

if TYPE_CHECKING:
    from memplan.passes.dispatch import Variant


@dataclass(frozen=True)
class Failure:
    """`moment` is of the plan's timeline; `exact`: it is that of the op that failed, not just of its graph's peak."""

    plan: Plan
    moment: int
    exact: bool


def located(variant: Variant, place: Place) -> Failure:
    """The failure of a variant that has a plan."""
    step, plan = variant.owner.step, variant.compiled.plan
    assert plan is not None
    runs = [] if step is None else [*step.runs]
    if step is not None and step.now is not None and place.phase != "backward":
        runs.append(step.now)
    own = [k for k, run in enumerate(runs) if run.variant is variant]
    if step is None or not own:
        return Failure(plan, *place.moment_of(plan.timeline))
    held, k = step.held_now(), own[-1]
    if len(runs) == 1:
        plan = variant.with_held(runs[k].sizes, held)
        return Failure(plan, *place.moment_of(plan.timeline))
    parts = [run.part(run.variant.with_held(run.sizes, Held())) for run in runs]
    moment, exact = place.moment_of(parts[k].plan.timeline)
    timeline = joint.compose(parts, held, f"{plan.step.name}, {len(parts)} graphs")
    budget = variant.owner.partitioner.budget
    return Failure(replace(plan, timeline=timeline, budget=budget), joint.placed(parts, k, moment), exact)
