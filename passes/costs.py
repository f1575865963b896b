"""What one op costs: floating-point operations, bytes read and written, and how a fusing compiler sees it.

In: an FX node with fake values. Out: numbers for ir.Op. Nothing is free: an op without a formula still pays
for its memory traffic. Formulas are torch.utils.flop_counter's, plus the ops it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.utils.flop_counter import flop_registry

from memplan.ir import Fusion
from memplan.passes.compat import size_hint

# fmt: off
_REDUCTIONS = frozenset([
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "var", "var_mean", "std", "std_mean",
    "argmax", "argmin", "logsumexp", "norm", "cumsum",
])
_TEMPLATES = frozenset([
    "mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm", "_grouped_mm", "convolution", "convolution_backward",
])
# fmt: on


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among an op's fake results or arguments, nodes replaced by their values."""
    leaves = pytree.tree_leaves(pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), value))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements a tensor shows; an expanded dimension is read once."""
    shape = [size_hint(n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if size_hint(stride)]
    return math.prod(shape) * tensor.element_size()


def name(target: Any) -> str:
    """The op's name without namespace and overload: "mm"."""
    return getattr(getattr(target, "overloadpacket", target), "__name__", str(target))


def flops(node: fx.Node) -> int:
    """Floating-point operations of one call."""
    target, results = name(node.target), tensors(node.meta.get("val"))
    arguments = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), node.args)
    if "scaled_dot_product" in target or target == "flex_attention":
        return _attention(tensors(arguments), backward="backward" in target)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry and not any(isinstance(a, torch.SymInt) for a in pytree.tree_leaves(arguments)):
        return int(flop_registry[packet](*arguments, **node.kwargs, out_val=node.meta.get("val")))
    if target == "_grouped_mm":
        return 2 * _numel(results[:1]) * size_hint(tensors(arguments)[0].shape[-1])
    return _numel(results)


def _attention(inputs: Sequence[torch.Tensor], backward: bool) -> int:
    """Two GEMMs forward and five backward over [B, H, Tq, Tk] (Dao 2023, FlashAttention-2)."""
    query, key, value = [t for t in inputs if t.dim() == 4][backward : 3 + backward]
    scores = _numel([query]) // size_hint(query.shape[-1]) * size_hint(key.shape[-2])
    width = size_hint(query.shape[-1]) + size_hint(value.shape[-1])
    return scores * width * (5 if backward else 2)


def _numel(values: Sequence[torch.Tensor]) -> int:
    return sum(math.prod(size_hint(n) for n in v.shape) for v in values)


def traffic(node: fx.Node) -> int:
    """Bytes read and written; embedding and gather read what they return, not their whole table."""
    results = tensors(node.meta.get("val"))
    inputs = tensors((node.args, node.kwargs))
    if name(node.target) in ("embedding", "gather", "index", "index_select"):
        inputs = [*results, *inputs[1:]]
    return sum(nbytes(t) for t in [*inputs, *results])


def fusion(node: fx.Node) -> Fusion:
    """How Inductor lowers the op."""
    from torch._inductor.lowering import fallbacks, lowerings

    target = node.target
    if name(target) in _TEMPLATES or target in fallbacks or target not in lowerings:
        return "extern"
    if isinstance(node.meta.get("val"), (tuple, list)) or name(target) in _REDUCTIONS or _adds_up(target):
        return "reduction"  # its result is written before anything reads it
    return "pointwise"


def _adds_up(target: Any) -> bool:
    """Several values may meet in one place, so the places are memory."""
    return name(target) in ("scatter_add", "scatter_reduce", "index_put", "index_add", "embedding_dense_backward")
