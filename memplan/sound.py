"""Can a Step that was read from a file be run in its order?

In: a Step. Out: what is wrong with it, in a sentence; empty: nothing. What must hold: storages are numbered as listed,
each is made once, and an op reads only what is resident, given to its graph, or made before it: no cycle.
"""

from __future__ import annotations

from memplan.ir import Graph, Step


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
