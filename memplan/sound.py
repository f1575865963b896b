"""Can a Step that was read from a file be run in its order, and can a Timeline or a Plan be?

In: one of them. Out: what is wrong with it, in a sentence; empty: nothing. What must hold: storages are numbered as
listed, each is made once, and an op reads only what is resident, given to its graph, or made before it: no cycle.
Blocks are alive from one moment of their timeline to a later one; bytes and seconds are numbers, and not below zero.
"""

from __future__ import annotations

import math

from memplan.ir import Graph, Plan, Step, Timeline

MOST = 2**63  # bytes of anything


def unsound(step: Step) -> str:
    """The first thing that is wrong."""
    there = set(step.resident)
    for graph in step.graphs:
        for t in (
            *step.resident,
            *graph.inputs,
            *graph.outputs,
            *(t for op in graph.ops for t in op.inputs + op.outputs),
        ):
            if not 0 <= t < len(step.tensors):
                return f"graph {graph.name!r} names storage {t}, and the step has {len(step.tensors)}: is it cut short?"
        there.update(graph.inputs)
        if wrong := _out_of_order(step, graph, there):
            return wrong
    return ""


def _out_of_order(step: Step, graph: Graph, there: set[int]) -> str:
    """An op that reads too early, or makes what is there, or a result that nobody makes; `there` grows."""
    name = [tensor.name for tensor in step.tensors]
    for op in graph.ops:
        for t in op.inputs:
            if t not in there:
                return f"op {op.name!r} reads {name[t]!r}, which nothing before it makes: a cycle, or ops out of order"
        for t in op.outputs:
            if t in there:
                return f"op {op.name!r} makes {name[t]!r}, which is there already: a storage is made once"
            there.add(t)
    for t in graph.outputs:
        if t not in there:
            return f"graph {graph.name!r} returns {name[t]!r}, which nothing makes: is it cut short?"
    return ""


def impossible(value: Plan | Timeline) -> str:
    """The first thing that is wrong with a timeline, and with what a plan says of its step's storages."""
    timeline = value.timeline if isinstance(value, Plan) else value
    return _of_timeline(timeline) or (_of_plan(value) if isinstance(value, Plan) else "")


def _of_timeline(timeline: Timeline) -> str:
    count = len(timeline.moments)
    for moment in timeline.moments:
        for what, seconds in (("is at", moment.seconds), ("waits for", moment.stall)):
            if not 0 <= seconds < math.inf:
                return f"moment {moment.name!r} {what} {seconds} seconds"
    for block in (*timeline.blocks, *timeline.host, *timeline.others):
        if not 0 <= block.start <= block.end <= count:
            return f"block {block.name!r} is alive from {block.start} to {block.end}, and there are {count} moments"
        if not 0 <= block.bytes < MOST:
            return f"block {block.name!r} has {block.bytes} bytes"
    kinds = [kind for kind, _ in timeline.base]
    if len({*kinds}) < len(kinds):
        return f"a kind is there twice throughout: {', '.join(kinds)}"
    odd = ((kind, size) for kind, size in timeline.base if not 0 <= size < MOST)
    return next((f"{size} bytes of {kind} are there throughout" for kind, size in odd), "")


def _of_plan(plan: Plan) -> str:
    named = {t for t, _ in plan.decisions} | {t for members, _ in plan.reasons for t in members}
    count = len(plan.step.tensors)
    if outside := [t for t in sorted(named) if not 0 <= t < count]:
        return f"it decides on storage {outside[0]}, and the step has {count}"
    if not 0 <= plan.budget.reserve < 1:
        return f"a reserve of {plan.budget.reserve}, which is a fraction"
    if plan.bound is not None and plan.bound.at and plan.bound.at not in {op.name for op in plan.step.ops}:
        return f"its bound is at {plan.bound.at!r}, and no op is called so"
    return ""
