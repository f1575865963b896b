"""What runs outside of a graph, written into its plan. Torch-free.

In: the plan of a unit, and the Gap measured between its forward and its backward. Out: the same plan with the Gap in
its Step, as an op at the end of forward that keeps what is kept and one at the start of backward, and in its timeline,
as a moment each. So a step that is put together from such plans counts it, and policies see it. Nothing runs such a
plan: its decisions are still those of the unit's own storages.
"""

from __future__ import annotations

import dataclasses

from memplan.ir import Block, Gap, Moment, Op, Plan, Step, Tensor, Timeline

OUTSIDE = "outside of graphs"


def with_gap(plan: Plan, gap: Gap | None) -> Plan:
    """The plan with what runs between its forward and its backward."""
    if gap is None:
        return plan
    return dataclasses.replace(plan, step=_step(plan.step, gap), timeline=_timeline(plan.timeline, gap))


def _step(step: Step, gap: Gap) -> Step:
    kept, left = len(step.tensors), len(step.tensors) + 1
    tensors = (
        Tensor(f"{gap.name}, kept", gap.kept, "activation"),
        Tensor(f"{gap.name}, left", gap.backward_kept, "temporary"),
    )
    ahead = Op(gap.name, OUTSIDE, (), (kept,), workspace_bytes=max(0, gap.bytes - gap.kept), fixed=f"it runs {OUTSIDE}")
    back = dataclasses.replace(
        ahead,
        name=f"{gap.name}, backward",
        inputs=(kept, *step.backward.inputs[:1]),  # after the tangents
        outputs=(left,),
        workspace_bytes=max(0, gap.backward_bytes - gap.backward_kept),
    )
    forward, backward = step.graphs
    graphs = (
        dataclasses.replace(forward, ops=(*forward.ops, ahead)),
        dataclasses.replace(backward, ops=(back, *backward.ops), outputs=(*backward.outputs, left)),
    )
    return dataclasses.replace(step, tensors=(*step.tensors, *tensors), graphs=graphs, gaps=(*step.gaps, gap))


def _timeline(timeline: Timeline, gap: Gap) -> Timeline:
    first = sum(m.phase != "backward" for m in timeline.moments)
    count = len(timeline.moments) + 2
    blocks = [
        dataclasses.replace(b, start=b.start + 2 * (b.start >= first), end=b.end + 2 * (b.end > first))
        for b in timeline.blocks
    ]
    blocks += [
        Block(gap.name, max(0, gap.bytes - gap.kept), "temporary", first, first + 1),
        Block(f"{gap.name}, kept", gap.kept, "activation", first, first + 2, "keep"),
        Block(f"{gap.name}, backward", gap.backward_bytes, "temporary", first + 1, first + 2),
        Block(f"{gap.name}, left", gap.backward_kept, "temporary", first + 2, count),
    ]
    before = timeline.moments[first - 1].seconds if first else 0.0
    pair = (Moment(gap.name, before, "forward"), Moment(f"{gap.name}, backward", before, "backward"))
    moments = (*timeline.moments[:first], *pair, *timeline.moments[first:])
    return dataclasses.replace(timeline, moments=moments, blocks=tuple(b for b in blocks if b.bytes or b.start < b.end))
