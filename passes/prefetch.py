"""memplan::fetch -> bring and brought: each copy of a streamed parameter starts when the one before it is done.

Before: a planned graph that fetches parameters where it uses them, and waits for each. After: the first copy starts
when the graph does, each other one after the fetch before it, and the device waits where the fetch was. lifetimes.py
counts the memory from where the copy starts, by the same rule.
"""

from __future__ import annotations

from torch import fx

from memplan.passes.offload import call
from memplan.runtime.streamed import BRING, BROUGHT, FETCH


def prefetch(graph: fx.Graph) -> None:
    """Rewrite the fetches of a graph."""
    spread(graph, [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")])


def spread(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Rewrite the fetches among consecutive nodes."""
    fetches = [n for n in nodes if n.target is FETCH]
    before = nodes[0] if fetches else None  # where the next copy may start
    for node in fetches:
        with graph.inserting_before(before):
            ticket = call(graph, BRING, *node.args[:2])
        with graph.inserting_before(node):
            made = call(graph, BROUGHT, ticket, *ticket.args)
        for new in (ticket, made):
            new.meta |= {k: v for k, v in node.meta.items() if k not in new.meta}
        before = node.next
        node.replace_all_uses_with(made)
        graph.erase_node(node)
