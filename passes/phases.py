"""A graph with backward inside -> its forward and backward parts.

In: a functional FX graph into which Dynamo traced `loss.backward()`, or several: one per micro-batch. Out: the parts in
order, forward 1, backward 1, after backward 1, forward 2, ...: a unit is what leads to one backward, and that backward.
What comes after it are the gradients that are added up, an optimizer, and whatever else neither leads to a backward nor
can run before one; it counts as backward. So does a forward that reads what an update before it made (`unplanned`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import getitem
from typing import NamedTuple

from torch import fx

from memplan.ir import Phase
from memplan.passes.calls import has_effects, view_base


def has_backward(graph: fx.GraphModule) -> bool:
    """Whether Dynamo traced backward into the graph. In a joint graph, which has tangents, AOTAutograd did."""
    tangents = any(n.name.startswith("tangents") for n in graph.graph.find_nodes(op="placeholder"))
    return not tangents and any(is_backward(n) for n in graph.graph.nodes)


def is_backward(node: fx.Node) -> bool:
    """Whether Dynamo traced the node while it traced a backward."""
    return bool(node.meta.get("autograd_backward"))


def hoist(graph: fx.GraphModule) -> None:
    """Run what comes after a backward as soon as what it reads is there, so that a gradient is added up, and gone,
    before the next one comes. Only the order of nodes changes.
    """
    nodes = list(graph.graph.nodes)
    place = {node: (i, i) for i, node in enumerate(nodes)}
    late = [n for part in phases(graph) if part.name.startswith("after") for n in nodes if n in part.nodes]
    movable = {n for n in late if n.op == "call_function" and not has_effects(n)}
    alone = {n for n in movable if not any(i.op == "call_function" for i in n.all_input_nodes)}
    for i, node in enumerate(nodes):
        if node in movable - alone:
            reads = [place[n] for n in node.all_input_nodes if n.op == "call_function" and n not in alone]
            place[node] = (max(reads, default=place[node])[0], i)
    for node in reversed(nodes):
        if node in alone and node.users:  # it reads nothing that is made: just before it is read
            place[node] = min((place[u][0], place[node][1]) for u in node.users)
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in sorted(nodes, key=place.__getitem__):
        made[node] = new.node_copy(node, lambda n: made[n])
    graph.graph = new
    graph.recompile()


class Part(NamedTuple):
    """Consecutive nodes of a graph."""

    name: str
    phase: Phase
    unit: int
    nodes: set[fx.Node]


def phases(graph: fx.GraphModule) -> list[Part]:
    """The parts of a graph with backward inside, in order."""
    nodes = list(graph.graph.nodes)
    leads = leading(graph)
    out = [Part("forward 1", "forward", 0, set())]
    inside = _inside(nodes, leads)
    for node in nodes:
        last = out[-1]
        if node.op == "call_function" and node.target is not getitem and view_base(node) is None:
            unit = last.unit + (last.phase == "backward" and node in leads)
            now = last
            if node in leads:
                now = Part(f"forward {unit + 1}", "forward", unit, set())
            elif node in inside:
                now = Part(f"backward {unit + 1}", "backward", unit, set())
            elif last.phase == "backward":
                now = Part(f"after backward {unit + 1}", "backward", unit, set())
            if now.name != last.name:
                out.append(now)
        out[-1].nodes.add(node)
    return out


def leading(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that lead to a backward and depend on none."""
    nodes = list(graph.graph.nodes)
    leads, depends = set[fx.Node](), set[fx.Node]()
    for node in nodes:
        if is_backward(node) or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    for node in reversed(nodes):
        if node not in depends and any(is_backward(u) or u in leads for u in node.users):
            leads.add(node)
    return leads


def _inside(nodes: Sequence[fx.Node], leads: Collection[fx.Node]) -> set[fx.Node]:
    """Nodes between those of a backward: passes that rewrite it do not always mark what they make."""
    inside, ahead = set[fx.Node](), False
    for node in reversed(nodes):
        ahead = is_backward(node) or (ahead and node not in leads)
        if ahead:
            inside.add(node)
    return inside


def unplanned(graph: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on one backward and lead to another."""
    nodes = list(graph.graph.nodes)
    depends, leads = set[fx.Node](), set[fx.Node]()
    for node in nodes:
        if is_backward(node) or any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    for node in reversed(nodes):
        if is_backward(node) or any(u in leads for u in node.users):
            leads.add(node)
    return {n for n in depends & leads if not is_backward(n)}
