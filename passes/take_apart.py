"""Ops that hide a sum over rows -> smaller ops, which keep rows apart up to the sum.

Before: torch's cross entropy, nll_loss_forward and nll_loss_backward, which average over the rows that count inside of
one op; mean over rows; and ones_like(loss), which starts a backward inside of a graph and seems to depend on the loss.
After: torch's own decompositions; sum and division; 1. The values are the same, up to the order of the sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx


def take_apart(graph: fx.GraphModule) -> None:
    """Rewrite every one in place."""
    _cross_entropies(graph)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.ones_like.default and node.meta["val"].dim() == 0:
            like = node.meta["val"]
            node.target, node.args = torch.ops.aten.full.default, ([], 1)
            node.kwargs = {"dtype": like.dtype, "device": like.device}
        elif node.target in (torch.ops.aten.mean.default, torch.ops.aten.mean.dim):
            _mean(graph.graph, node)
    graph.graph.eliminate_dead_code()


def _mean(graph: fx.Graph, node: fx.Node) -> None:
    """Of all, or over the first dimension and others: a sum over rows, divided by how many there are."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    given: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [d % len(shape) for d in given]
    if 0 not in dims or not shape or any(isinstance(shape[d], torch.SymInt) for d in dims):
        return
    value = node.meta["val"]
    with graph.inserting_before(node):
        dtype = {"dtype": value.dtype}
        total = graph.call_function(torch.ops.aten.sum.dim_IntList, (source, list(dims), *node.args[2:]), dtype)
        new = graph.call_function(torch.ops.aten.div.Tensor, (total, math.prod(shape[d] for d in dims)))
    total.meta, new.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(new)


def _cross_entropies(joint: fx.GraphModule) -> None:
    table = get_decompositions([torch.ops.aten.nll_loss_forward, torch.ops.aten.nll_loss_backward])
    for node in [n for n in joint.graph.nodes if n.target in table]:
        names = [a.name for a in node.target._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        nodes = {k: v for k, v in given.items() if isinstance(v, fx.Node)}
        rest = {k: v for k, v in given.items() if k not in nodes}

        def apart(
            *values: torch.Tensor, op: Any = table[node.target], names: Any = tuple(nodes), rest: Any = rest
        ) -> Any:
            results = op(**dict(zip(names, values, strict=True)), **rest)
            return tuple(results) if isinstance(results, tuple) else results  # of its own type, it would be a node

        mode = detect_fake_mode([n.meta["val"] for n in nodes.values()])
        assert mode is not None
        with mode:
            parts = make_fx(apart)(*(n.meta["val"] for n in nodes.values()))
        made: dict[fx.Node, Any] = dict(zip(parts.graph.find_nodes(op="placeholder"), nodes.values(), strict=True))
        with joint.graph.inserting_before(node):
            results: Any = joint.graph.graph_copy(parts.graph, made)
        for new in made.values():
            new.meta.setdefault("stack_trace", node.meta.get("stack_trace"))
        if isinstance(results, fx.Node):
            node.replace_all_uses_with(results)
        else:
            for user in list(node.users):  # getitem
                user.replace_all_uses_with(results[user.args[1]])
