"""torch's cross entropy -> smaller ops, which keep rows apart up to the sum.

Before: nll_loss_forward and nll_loss_backward, which average over the rows that count inside of one op. After: torch's
own decompositions of them, with the same values, up to the order of the sum. Inductor has taken them apart already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx


def take_apart(joint: fx.GraphModule) -> None:
    """Rewrite every one in place."""
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
    joint.graph.eliminate_dead_code()
