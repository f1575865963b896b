"""Log-probs of given tokens straight from hidden states and the LM head, without ever a [T, V] tensor.

    logprob = linear_logprob(hidden, lm_head.weight, tokens, temperature=0.7)

In: hidden states and the head in float16, bfloat16, float32 or float64, or a frozen head in float8 with its scale.
Out: log-probs, and entropies if asked for, in float32 (float64 for float64): rounded to bfloat16 they would put
gradients 10 % off. What must hold: equal inputs give equal log-probs, to the bit, whatever the way and with or without
gradients, so that the ratio of equal policies is exactly 1.
"""

from __future__ import annotations

import math
import typing
from typing import Literal

import torch
from torch import Tensor

from memplan.errors import MemplanError, did_you_mean
from memplan.runtime.kernels.linear_logprob.head import FLOAT8
from memplan.runtime.kernels.linear_logprob.ops import linear_logprob as _op

Way = Literal["auto", "rows", "vocab", "vectors"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@typing.overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    weight_scale: Tensor | None = ..., temperature: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    entropy: Literal[False] = ..., way: Way = ...,
) -> Tensor: ...  # fmt: skip
@typing.overload
def linear_logprob(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = ..., mask: Tensor | None = ...,
    weight_scale: Tensor | None = ..., temperature: float = ..., logit_scale: float = ..., softcap: float | None = ...,
    entropy: Literal[True], way: Way = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weight_scale: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    way: Way = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log_softmax(z)[label] of each row, with z as head.py says; and the entropy of softmax(z), if `entropy`.

    hidden [..., D], weight [V, D], labels [...] int64, bias [V]; mask [...]: rows where it is 0 (or False) are not
    projected, get 0, and take no part in gradients. weight_scale: of a float8 weight, one value or [V].
    Under autocast, operands are rounded to its dtype, as F.linear would, in backward too.

    `way`, which changes memory and time, never the result:

        rows     tiles of rows outside; 4 products with backward. A weight narrower than float32 has a float32 sum
                 beside its gradient, 4 V D bytes
        vocab    tiles of the vocabulary outside; 4 products. Hidden states narrower than float32 have a float32 sum
                 beside their gradient, 4 T D bytes, and the weight nothing
        vectors  for a frozen head: forward keeps dl/dh, 4 T D bytes (and dH/dh), backward is one product per row; 2
                 products
        auto     vectors if the head is frozen and hidden is not; otherwise that of rows and vocab with the smaller sum,
                 vocab if they are equal

    Raises MemplanError on shapes, dtypes and values that make no sense, and on a label that is no token. On CUDA nobody
    waits to look at labels: the log-prob and the gradients of such a row are nan.
    """
    trainable = [weight.requires_grad, bias is not None and bias.requires_grad]
    given, form = checked((hidden, weight, labels, bias, mask, weight_scale), (temperature, logit_scale, softcap))
    chosen = _way(way, hidden, frozen=not any(trainable))
    rows = hidden.shape[:-1]
    logprob, entropies, *_ = _op(*given, *form, entropy, chosen)
    return (logprob.view(rows), entropies.view(rows)) if entropy else logprob.view(rows)


Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def checked(
    given: Operands, numbers: tuple[float, float, float | None]
) -> tuple[Operands, tuple[float, float, float | None, torch.dtype]]:
    """hidden, weight, labels, bias, mask and weight_scale, flat: [T, D], [V, D], [T], [V], [T] bool; and temperature,
    logit_scale, softcap and the dtype of operands, as head.Form has them. Raises MemplanError as linear_logprob does.
    """
    hidden, weight, labels, bias, mask, scale = given
    temperature, logit_scale, softcap = numbers
    check(*given)
    check_numbers(*numbers)
    rows = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1), None if mask is None else mask.reshape(-1) != 0
    cap = None if softcap is None else float(softcap)
    form = float(temperature), float(logit_scale), cap, compute_dtype(hidden, weight)
    return (rows[0], weight, rows[1], bias, rows[2], scale), form


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What operands are rounded to: autocast's dtype, or the wider of both."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype if weight.dtype in FLOAT8 else torch.promote_types(hidden.dtype, weight.dtype)


def _way(way: str, hidden: Tensor, *, frozen: bool) -> str:
    valid = typing.get_args(Way)
    if way not in valid:
        raise MemplanError(f"way {way!r} is not offered: it is one of {', '.join(valid)}{did_you_mean(way, valid)}")
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    if way == "vectors" and not frozen:
        raise MemplanError(
            "way 'vectors' is for a frozen head: weight or bias wants a gradient; take 'vocab' or 'rows'"
        )
    if way == "auto" and frozen and wanted:
        return "vectors"
    return "auto" if way == "vectors" and not wanted else way


def check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | None
) -> None:
    """Shapes, dtypes and devices."""
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise MemplanError(f"hidden {_shape(hidden)} and weight {_shape(weight)} do not fit: need [..., D] and [V, D]")
    vocabulary = weight.shape[0]
    if vocabulary < 1:
        raise MemplanError(f"weight {_shape(weight)} has no tokens: need [V, D] with V at least 1")
    if labels.shape != hidden.shape[:-1] or labels.dtype not in (torch.int64, torch.int32):
        raise MemplanError(
            f"labels {_shape(labels)} of {labels.dtype} do not fit hidden {_shape(hidden)}: need {_shape(hidden, -1)} "
            "of int64, one token per row"
        )
    if mask is not None and mask.shape != labels.shape:
        raise MemplanError(f"mask {_shape(mask)} does not fit labels {_shape(labels)}: give one value per row")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise MemplanError(f"bias {_shape(bias)} does not fit weight {_shape(weight)}: need [{vocabulary}]")
    if hidden.dtype not in FLOATS or (weight.dtype not in FLOATS and weight.dtype not in FLOAT8):
        raise MemplanError(
            f"hidden of {hidden.dtype} and weight of {weight.dtype} are not offered: need float16, bfloat16, float32 "
            "or float64, and for a frozen weight also float8_e4m3fn or float8_e5m2 with weight_scale"
        )
    if (weight.dtype in FLOAT8) != (scale is not None):
        raise MemplanError(f"weight of {weight.dtype}: weight_scale goes with float8 weights, and they with it")
    if scale is not None and scale.numel() not in (1, vocabulary):
        raise MemplanError(
            f"weight_scale {_shape(scale)} does not fit: give one value, or one for each of {vocabulary}"
        )
    if weight.dtype in FLOAT8 and weight.requires_grad:
        raise MemplanError(
            "a float8 weight has no gradient here: call requires_grad_(False) on it, or train a wider one"
        )
    if scale is not None and scale.requires_grad:
        raise MemplanError("weight_scale has no gradient here: detach it")
    devices = {str(x.device) for x in (hidden, weight, labels, bias, mask, scale) if x is not None}
    if len(devices) > 1:
        raise MemplanError(f"tensors are on {', '.join(sorted(devices))}: move them to one device")


def check_numbers(temperature: float, logit_scale: float, softcap: float | None) -> None:
    """Refuse what makes no distribution."""
    for name, value in (("temperature", temperature), ("softcap", 1.0 if softcap is None else softcap)):
        if not 0 < value < math.inf:
            raise MemplanError(f"{name}={value} must be a positive number" + ", or None" * (name == "softcap"))
    if not abs(logit_scale) < math.inf:  # compilers know no isfinite
        raise MemplanError(f"logit_scale={logit_scale} must be a finite number")


def _shape(x: Tensor, end: int | None = None) -> str:
    return f"[{', '.join(str(n) for n in x.shape[:end])}]"
