"""Plan -> the copies of offloaded storages, in the forward and backward FX graphs that follow it. Decides nothing.

Before: forward returns a saved storage x, backward takes it. After: forward returns what is off the device in its
place, and backward copies it back. The handle that crosses is a tensor: when autograd drops it, its place is free.

    forward    x = ..;  t = to_host(x)  ..  h = off(t, x)  ..  -> out, h
    backward   (h)  ..  t = to_device(h)  ..  y = back(t, h);  first use of y

A view of x that backward reads is replayed on y, as any saved view is.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import is_sym_node

from memplan.ir import Plan
from memplan.passes.calls import Sizes
from memplan.runtime.offloaded import BACK, OFF, TO_DEVICE, TO_HOST


def offload(forward: fx.Graph, backward: fx.Graph, plan: Plan) -> None:
    """Put the copies into both graphs."""
    ahead, behind = ({n.name: n for n in g.nodes} for g in (forward, backward))
    moved = {plan.step.tensors[t].name: d for t, d in plan.offloads.items()}
    ops = plan.step.ops
    tickets, handles = dict[str, fx.Node](), dict[str, fx.Node]()
    for name, d in moved.items():
        x, after = ahead[name], ahead[ops[named(d.start_after)].name]
        with forward.inserting_after(_end(max(x, after))):
            tickets[name] = start(forward, x, d.tier)
    for name, d in moved.items():
        at = ahead[ops[named(d.release_at)].name]
        with forward.inserting_after(_end(max(tickets[name], at))):
            handles[name] = release(forward, ahead[name], tickets[name])
    output = forward.output_node()
    output.args = (tuple(handles.get(getattr(n, "name", ""), n) for n in output.args[0]),)  # type: ignore[union-attr]
    for name, d in moved.items():
        _reload(backward, behind[name], handles[name], behind[ops[named(d.reload_at)].name])


def start(graph: fx.Graph, x: fx.Node, tier: str) -> fx.Node:
    """Start the copy of `x`, where the graph is being written; the ticket."""
    known = Sizes()
    strides = [known.of(s) for s in x.meta["val"].stride()]
    order = sorted(range(len(strides)), key=lambda d: (-strides[d], d))  # of the dimensions in memory, outermost first
    return call(graph, TO_HOST, x, tier, order)


def release(graph: fx.Graph, x: fx.Node, ticket: fx.Node) -> fx.Node:
    """Wait for the copy of `x`, and let go of it; the handle."""
    return call(graph, OFF, ticket, x, *ticket.args[1:])


def reload(graph: fx.Graph, handle: fx.Node, like: torch.Tensor) -> fx.Node:
    """Start the copy back of what was like `like`; the ticket."""
    return call(graph, TO_DEVICE, handle, like.device, like.dim())


def arrive(graph: fx.Graph, ticket: fx.Node, handle: fx.Node) -> fx.Node:
    """Wait for the copy back."""
    return call(graph, BACK, ticket, handle, *ticket.args[1:])


def named(point: int | None) -> int:
    """A point of a plan's offload: those are placed."""
    assert point is not None
    return point


def _reload(graph: fx.Graph, saved: fx.Node, handle: fx.Node, before: fx.Node) -> None:
    """`saved` is a placeholder: from now on for the handle."""
    like, saved.meta["val"] = saved.meta["val"], handle.meta["val"]
    users = set(saved.users)
    first = next(n for n in graph.nodes if n in users)
    with graph.inserting_before(min(before, first)):
        ticket = reload(graph, saved, like)
    with graph.inserting_before(first):
        made = arrive(graph, ticket, saved)
    for user in users:
        user.replace_input_with(saved, made)


def call(graph: fx.Graph, op: Any, *args: Any) -> fx.Node:
    node = graph.call_function(op, args)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode:
        node.meta["val"] = op(*values)
    return node


def _end(node: fx.Node) -> fx.Node:
    """The last of what follows an op at once: its results, and sizes read from it."""
    while node.next.target is getitem or is_sym_node(node.next):
        node = node.next
    return node
