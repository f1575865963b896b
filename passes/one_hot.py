"""Adding one number per row into zeros becomes a comparison: no buffer of zeros, and a pointwise op to fuse.

Before: gather's backward, which makes rows x vocabulary zeros and then a second copy of them to add into.

    zeros = full([T, V], 0)                      zeros = new_zeros(x, [T, V])
    grad = scatter_add(zeros, 1, index[T, 1], value[T, 1])

After, with the same bits (each place gets at most one value, added to +0.0):

    grad = where(arange(V) == index, value + 0.0, 0.0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from memplan.passes.compat import drop_dead_code

aten = torch.ops.aten
_ZEROS = (
    aten.full.default,
    aten.new_zeros.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.full_like.default,
)


def rewrite(graph: fx.GraphModule) -> int:
    """Rewrite every such scatter in place; returns how many there were."""
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        zeros, dim, index, value = node.args
        if _is_zeros(zeros) and _one_per_row(node, dim, index, value):
            _replace(graph.graph, node)
            count += 1
    if count:
        drop_dead_code(graph.graph)
        graph.recompile()
    return count


def _is_zeros(node: fx.Node) -> bool:
    if node.target not in _ZEROS:
        return False
    return bool(node.target not in (aten.full.default, aten.full_like.default) or node.args[1] == 0)


def _one_per_row(node: fx.Node, dim: int, index: fx.Node, value: fx.Node) -> bool:
    """One index along `dim`, and every row of the result has one."""
    out, at, source = (n.meta["val"] for n in (node, index, value))
    if not all(isinstance(t.shape[dim], int) for t in (out, at) if t.dim()):
        return False
    wide, narrow, given = (list(map(_expression, t.shape)) for t in (out, at, source))
    if not narrow or narrow[dim] != 1 or given != narrow:
        return False
    wide[dim] = 1
    return wide == narrow


def _expression(n: Any) -> Any:
    """A size to compare with another: comparing symbols themselves would tie the graph to their values."""
    return n.node.expr if isinstance(n, torch.SymInt) else n


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    _, dim, index, value = node.args
    out = node.meta["val"]
    shape = [1] * out.dim()
    shape[dim % out.dim()] = out.shape[dim % out.dim()]

    def call(target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k != "val"}
        with out.fake_mode:
            new.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return new

    with graph.inserting_before(node):
        iota = torch.ops.prims.iota.default  # what arange becomes under Inductor, where this pass comes after that
        size = shape[dim % out.dim()]
        places = call(iota, size, start=0, step=1, dtype=torch.int64, device=out.device, requires_grad=False)
        places = call(aten.view.default, places, shape)
        hit = call(aten.eq.Tensor, places, index)
        positive = call(aten.add.Tensor, value, 0.0)
        zero = call(aten.full.default, [], 0.0, dtype=out.dtype, device=out.device)
        node.replace_all_uses_with(call(aten.where.self, hit, positive, zero))
    graph.erase_node(node)
