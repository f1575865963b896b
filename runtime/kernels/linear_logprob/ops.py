"""torch.ops.memplan.linear_logprob and its backward: opaque to compilers, so that tiles stay one after the other.

An op cannot return None: what was not asked for is an empty tensor. There are no second derivatives; asking for them
raises. CUDA tensors go to triton.py if triton is there and knows the dtypes, all others to reference.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from memplan.runtime.kernels.linear_logprob import reference
from memplan.runtime.kernels.linear_logprob.head import Form, Head
from memplan.runtime.kernels.linear_logprob.rows import Rows


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    weight_scale: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    entropy: bool,
    way: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [T], entropies [T], logsumexps [T], and for way "vectors" dl/dh and dH/dh [T, D]."""
    head = Head(weight, bias, weight_scale, Form(temperature, logit_scale, softcap, compute))
    some: list[Tensor | None] = []
    kernels = kernels_for(hidden, head)
    with without_autocast(hidden):
        if kernels is not None:  # with vectors too, so that log-probs have equal bits: that is a product more
            found = kernels.forward(hidden, head, labels, mask, entropy=entropy)
            some = [found.logprob_T, found.entropy_T, found.total_T]
        if kernels is None or way == "vectors":
            found = reference.forward(hidden, head, labels, mask, entropy=entropy, vectors=way == "vectors")
    some = some or [found.logprob_T, found.entropy_T, found.total_T]
    some += [found.logprob_vector_TD, found.entropy_vector_TD]
    return tuple(found.logprob_T.new_empty(0) if x is None else x for x in some)  # type: ignore[return-value]


linear_logprob = torch.library.custom_op("memplan::linear_logprob", forward, mutates_args=())


@linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    weight_scale: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    entropy: bool,
    way: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, tokens, vectors = Form(compute=compute).sums, hidden.shape[0], way == "vectors"
    shapes: list[Any] = [
        [tokens],
        [tokens] if entropy else [0],
        [tokens],
        hidden.shape if vectors else [0],
        hidden.shape if vectors and entropy else [0],
    ]
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def backward(
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    weight_scale: Tensor | None,
    logprob: Tensor,
    entropy: Tensor,
    total: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    way: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias."""
    head = Head(weight, bias, weight_scale, Form(temperature, logit_scale, softcap, compute))
    rows = Rows(hidden.shape[0], mask)
    given = reference.Coefficients(
        logprob_grad, entropy_grad, logprob, total, None if entropy_grad is None else entropy, labels
    )
    if way == "auto":
        way = smaller(hidden, weight, head.form.sums)
    kernels = kernels_for(hidden, head)
    tile = None if kernels is None else kernels.gradient_of_tile
    wanted = (needs[0], needs[1], needs[2])
    with without_autocast(hidden):
        found = reference.backward(hidden, head, rows, given, way=way, needs=wanted, tile_gradient=tile)
    return tuple(hidden.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


linear_logprob_backward = torch.library.custom_op("memplan::linear_logprob_backward", backward, mutates_args=())


def without_autocast(hidden: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operands are rounded as `compute` says, and nothing else is."""
    return contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False)


def kernels_for(hidden: Tensor, head: Head) -> Any:
    """The module of CUDA kernels, where they apply: triton is imported only there."""
    if hidden.device.type != "cuda" or head.form.sums != torch.float32 or not _has_triton():
        return None
    from memplan.runtime.kernels.linear_logprob import triton

    return triton


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def smaller(hidden: Tensor, weight: Tensor, sums: torch.dtype) -> str:
    """The way whose sums take less memory beside the gradients: a narrower gradient needs a whole sum."""
    rows = weight.numel() if weight.dtype != sums else 0
    vocabulary = hidden.numel() if hidden.dtype != sums else 0
    return "rows" if rows < vocabulary else "vocab"


@linear_logprob_backward.register_fake
def _(logprob_grad: Tensor, entropy_grad: Tensor | None, hidden: Tensor, weight: Tensor, labels: Tensor,
      bias: Tensor | None, mask: Tensor | None, weight_scale: Tensor | None, logprob: Tensor, entropy: Tensor,
      total: Tensor, temperature: float, logit_scale: float, softcap: float | None, compute: torch.dtype, way: str,
      needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    like = (hidden, weight, bias)
    made = [
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(like, needs, strict=True)
    ]
    return made[0], made[1], made[2]


@torch.library.custom_op("memplan::scale_vectors", mutates_args=())
def scale_vectors(
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    logprob_vector: Tensor,
    entropy_vector: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of hidden: each row's vectors times its gradients, in `dtype`. An op, so that nobody derives it."""
    rows = Rows(logprob_vector.shape[0], mask)
    made = torch.zeros(logprob_vector.shape, dtype=dtype, device=logprob_vector.device)
    for tile in rows.tiles:
        product = rows.take(logprob_vector, tile) * rows.take(logprob_grad, tile).unsqueeze(1)
        if entropy_grad is not None:
            product.addcmul_(rows.take(entropy_vector, tile), rows.take(entropy_grad, tile).unsqueeze(1))
        rows.put(made, tile, product)
    return made


@scale_vectors.register_fake
def _(logprob_grad: Tensor, entropy_grad: Tensor | None, logprob_vector: Tensor, entropy_vector: Tensor,
      mask: Tensor | None, dtype: torch.dtype) -> Tensor:  # fmt: skip
    return logprob_vector.new_empty(logprob_vector.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, mask, weight_scale, *form, entropy, way = inputs
    logprob, entropies, total, logprob_vector, entropy_vector = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(total, logprob_vector, entropy_vector)
    ctx.form, ctx.way, ctx.entropy, ctx.dtype = form, way, entropy, hidden.dtype
    if way == "vectors":
        ctx.save_for_backward(mask, logprob_vector, entropy_vector)
    else:
        ctx.save_for_backward(hidden, weight, labels, bias, mask, weight_scale, logprob, entropies, total)


def _backward(ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    found: list[Tensor | None] = [None, None, None]
    if logprob_grad is not None or (entropy_grad is not None and ctx.entropy):
        entropy_grad = entropy_grad if ctx.entropy else None
        if logprob_grad is None:
            assert entropy_grad is not None
            logprob_grad = torch.zeros_like(entropy_grad)
        if ctx.way == "vectors":
            mask, logprob_vector, entropy_vector = ctx.saved_tensors
            found[0] = scale_vectors(logprob_grad, entropy_grad, logprob_vector, entropy_vector, mask, ctx.dtype)
        else:
            needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
            made = linear_logprob_backward(logprob_grad, entropy_grad, *ctx.saved_tensors, *ctx.form, ctx.way, needs)
            found = [x if need else None for x, need in zip(made, needs, strict=True)]
    return (found[0], found[1], None, found[2], *[None] * 8)


linear_logprob.register_autograd(_backward, setup_context=_setup)
