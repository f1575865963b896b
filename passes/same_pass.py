"""The gradient in the same pass: the loop of backward joined to that of forward, so that nothing is computed twice.

Before: a loop of forward, and a loop of backward which starts from what the first returned and from the gradient of one
scalar, the tangent. After: one loop, in forward, which does the work of both with 1 for the tangent. What it returns is
multiplied by the tangent in backward.

    before    logprobs = F(h, W)                 |...| dh, dW = B(h, W, dlogprobs(logprobs, tangent))
    after     logprobs, dh1, dW1 = FB(h, W)      |...| dh, dW = dh1 * tangent, dW1 * tangent

What must hold: what lies between the loops keeps rows apart; each result of the second is the tangent times something,
which is proved op by op, not assumed; and no part of it is in float16, where a loss scale in the tangent keeps what is
small from becoming 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from memplan.passes.bodies import LINEAR, NotTiled
from memplan.passes.calls import ancestors, descendants, name, tensors
from memplan.passes.row_locality import Region

# the operands that must each be the tangent times something, or zero
TERMS = {"add": (0, 1), "sub": (0, 1), "where": (1, 2), "masked_fill": (0, 2), "cat": (0,), "scatter": (0, 3),
         "scatter_add": (0, 3), "slice_scatter": (0, 1), "select_scatter": (0, 1)}  # fmt: skip
FILLS = ("full", "full_like", "zeros", "zeros_like", "new_zeros")


def between(
    ahead: Iterable[fx.Node], behind: Iterable[fx.Node], results: Iterable[fx.Node], region: Region
) -> tuple[set[fx.Node], fx.Node | None]:
    """What lies between the loops of forward and backward, and belongs to one that does the work of both; the tangent,
    if there is one: where backward is inside of the graph it is the number 1. `results`: of the loop of backward.
    Raises NotTiled where one loop would not do.
    """
    wanted = ancestors(behind) | set(results)
    inner = descendants(n for n in ahead if n in region.turn) & wanted - set(results)
    if not inner <= region.keeps.keys():
        raise NotTiled("what leads from it to the loss is not computed row by row")
    tangents = [n for n in wanted if n.op == "placeholder" and n.name.startswith("tangents")]
    if len(tangents) > 1 or any(n.meta["val"].dim() > 0 for n in tangents):
        raise NotTiled("it does not start from the gradient of one loss")
    scaled = descendants(tangents) & wanted
    if any(t.dtype is torch.float16 for n in scaled for t in tensors(n.meta.get("val"))):
        raise NotTiled("its gradients are float16, which a loss scale keeps from vanishing")
    for node in scaled - set(tangents):
        if not _proportional(node, scaled):
            raise NotTiled(f"{node.target} is not known to be proportional to the loss's gradient")
    return inner, tangents[0] if tangents else None


def _proportional(node: fx.Node, scaled: Collection[fx.Node]) -> bool:
    """Whether its result is the tangent times something if each operand in `scaled` is, and the others are not."""
    op = name(node.target)
    if getattr(node.target, "namespace", "") not in ("aten", "prims"):
        return False  # somebody's own op, whatever its name
    if op in FILLS:  # the operand gives it its shape
        return _zero(node)
    if op in ("mul", "mm", "bmm", "fma"):
        one = sum(a in scaled for a in node.args[:2] if isinstance(a, fx.Node)) == 1
        return one and all(a in scaled for a in node.args[2:])
    positions = TERMS.get(op, (0,) if op in LINEAR or op.endswith(("_backward", "_backward_data")) else ())
    given: Any = node.args[0] if op == "cat" else [node.args[k] for k in positions if k < len(node.args)]
    terms = list(given) if positions else []
    proportional = bool(terms) and all(t in scaled or _zero(t) for t in terms)
    return proportional and not any(n in scaled and n not in terms for n in node.all_input_nodes)


def _zero(value: Any) -> bool:
    if isinstance(value, fx.Node):
        op = name(value.target)
        if op == "scalar_tensor":
            return bool(value.args[0] == 0)
        return op in FILLS and ("zeros" in op or value.args[1:2] == (0,))
    return isinstance(value, (int, float)) and value == 0
