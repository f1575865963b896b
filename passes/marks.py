"""Marks: the moments of a plan from which on its step needs less of the device, where it tells who shares that.

In: a Plan. Out: moments of its backward, and the planned graph with an op after each (runtime/passed.py). The first is
where backward starts, each other one where what is needed until the end, the optimizer's step included, has fallen by
another part of what the step takes. A mark is put behind an op that makes one buffer of its own, which no compiler
fuses away; so it may come a little later than it could.
"""

from __future__ import annotations

import hashlib
import itertools

from torch import fx

from memplan.ir import Plan
from memplan.passes.kernel_order import PART
from memplan.passes.offload import call
from memplan.passes.recompute import MOMENT
from memplan.runtime.passed import PASSED

PARTS = 16  # of what a step takes: marks are at most so many, and one


def marks(plan: Plan) -> tuple[int, ...]:
    """The moments of a plan behind which its step can tell what it leaves."""
    timeline, step = plan.timeline, plan.step
    after = needed_after(timeline.totals)
    runs = [run for own in plan.runs for run in own]
    found, least = list[int](), 0
    for moment, run in enumerate(runs):
        op = step.ops[run.op]
        alone = len(op.outputs) == 1 and step.tensors[op.outputs[0]].name == op.name and op.fusion == "extern"
        if not alone or timeline.moments[moment].phase != "backward":
            continue
        if not found or after[moment] <= least - timeline.peak_above_base / PARTS:
            found.append(moment)
            least = after[moment]
    return tuple(found)


def needed_after(totals: tuple[int, ...]) -> list[int]:
    """Of each moment: the most bytes that are alive after it."""
    return [*itertools.accumulate(reversed(totals[1:]), max)][::-1] + list(totals[-1:])


def left(plan: Plan) -> tuple[int, ...]:
    """Bytes of the budget that the step leaves from each of its marks on."""
    after = needed_after(plan.timeline.totals)
    return tuple(max(plan.budget.available - after[moment], 0) for moment in plan.marks)


def name_of(plan: Plan) -> str:
    """What a plan is called in its graph: the same at all sizes."""
    said = repr((plan.step.name, [op.name for op in plan.step.ops], plan.decisions))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def put(module: fx.GraphModule, plan: Plan) -> None:
    """Put the marks into the graph that has the plan's backward."""
    by_moment = {n.meta[MOMENT]: n for n in module.graph.nodes if MOMENT in n.meta}
    for mark, moment in enumerate(plan.marks):
        made = by_moment[moment]
        with module.graph.inserting_after(made):
            node = call(module.graph, PASSED, made, plan.budget.listener, name_of(plan), mark)
        node.meta |= {key: value for key, value in made.meta.items() if key == PART}
    if plan.marks:
        module.recompile()
