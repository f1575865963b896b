"""What one op costs: floating-point operations, bytes read and written, and how a fusing compiler sees it.

In: a Call. Out: numbers for ir.Op. Nothing is free: an op without a formula still pays
for its memory traffic. Formulas are torch.utils.flop_counter's, plus the ops it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from memplan.ir import Fusion
from memplan.passes.calls import Call, name, tensors
from memplan.runtime import tiled
from memplan.runtime.kernels.linear_logprob import work

# fmt: off
_REDUCTIONS = frozenset([
    "sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "var", "var_mean", "std", "std_mean",
    "argmax", "argmin", "logsumexp", "norm", "cumsum",
])
_TEMPLATES = frozenset([
    "mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm", "_grouped_mm", "convolution", "convolution_backward",
])
# fmt: on


FEW_ROWS = 16  # a product of n rows takes as long as n + 16 would: measured on a CPU, 12 % at 128 rows, 6 % at 256


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements a tensor shows; an expanded dimension is read once."""
    shape = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(shape) * tensor.element_size()


def flops(call: Call) -> int:
    """Floating-point operations of one call."""
    target, results = name(call.target), tensors(call.result)
    if "scaled_dot_product" in target or target == "flex_attention":
        return _attention(tensors(call.args), backward="backward" in target)
    packet = getattr(call.target, "overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*call.args, **call.kwargs, out_val=call.result))
    if call.target is tiled.OP:
        part = tiled.one_slice(*call.args)
        done = part.count * sum(flops(Call(*made)) for made in part.calls)
        return done * (part.rows + FEW_ROWS) // max(1, part.rows)
    if (head := work.of(call.target, call.args)) is not None:
        return head.flops
    if target == "_grouped_mm":
        return 2 * _numel(results[:1]) * tensors(call.args)[0].shape[-1]
    return _numel(results)


def _attention(inputs: Sequence[torch.Tensor], backward: bool) -> int:
    """Two GEMMs forward and five backward over [B, H, Tq, Tk] (Dao 2023, FlashAttention-2)."""
    query, key, value = [t for t in inputs if t.dim() == 4][backward : 3 + backward]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return scores * (query.shape[-1] + value.shape[-1]) * (5 if backward else 2)


def _numel(values: Sequence[torch.Tensor]) -> int:
    return sum(v.numel() for v in values)


def traffic(call: Call) -> int:
    """Bytes read and written; embedding and gather read what they return, not their whole table."""
    if call.target is tiled.OP:
        part = tiled.one_slice(*call.args)
        return part.count * sum(traffic(Call(*made)) for made in part.calls)
    if (head := work.of(call.target, call.args)) is not None:
        return head.traffic
    results = tensors(call.result)
    inputs = tensors((call.args, call.kwargs))
    if name(call.target) in ("embedding", "gather", "index", "index_select"):
        inputs = [*results, *inputs[1:]]
    return sum(nbytes(t) for t in [*inputs, *results])


def fusion(call: Call) -> Fusion:
    """How Inductor lowers the op."""
    from torch._inductor.lowering import fallbacks, lowerings

    target = call.target
    if name(target) in _TEMPLATES or target in fallbacks or target not in lowerings:
        return "extern"
    if isinstance(call.result, (tuple, list)) or name(target) in _REDUCTIONS or _adds_up(target):
        return "reduction"  # its result is written before anything reads it
    return "pointwise"


def _adds_up(target: Any) -> bool:
    """Several values may meet in one place, so the places are memory."""
    return name(target) in ("scatter_add", "scatter_reduce", "index_put", "index_add", "embedding_dense_backward")
