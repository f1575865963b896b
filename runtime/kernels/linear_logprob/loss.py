"""A loss whose gradient is found in the same pass: 3 products instead of 4, where each row's loss needs its row alone.

    def loss(logprob, old, advantage):  # of some rows
        ratio = (logprob - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage) / tokens

    total, logprob = linear_logprob_loss(hidden, lm_head.weight, labels, loss, (old, advantage))

In: what linear_logprob takes, the loss of some rows as a function, and what of each row it reads. Out: the sum of the
losses, and the log-probs, without gradient, for what one logs. Losses that need a whole sequence first (a ratio by
sequence, a quantile) are not of this kind.

The logits of a strip of rows stay until its coefficients are known: a strip is STRIP bytes, or EVEN rows.
On CUDA these log-probs are of plain torch, those of linear_logprob of kernels: for ratios that are exactly 1, take the
old ones from here too.

Gradients wait in float32 for what comes back in backward, are multiplied with it on the device and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.runtime.kernels.linear_logprob.api import checked
from memplan.runtime.kernels.linear_logprob.head import EVEN, Form, Head
from memplan.runtime.kernels.linear_logprob.rows import Rows
from memplan.runtime.kernels.linear_logprob.statistics import Statistics, inside
from memplan.runtime.kernels.linear_logprob.sums import Sum

STRIP = 6 * 2**20  # bytes of logits: as few as products are still quick with, 48 rows of 32,000 tokens

F = TypeVar("F", bound=Callable[..., Any])
RowLoss = Callable[..., Tensor]  # (logprob [R], *data [R, ...]) -> loss [R]


def _outside_of_graphs(function: F) -> F:
    """The loss is called tile by tile, and gradients are held outside of any graph: a compiled step breaks its own."""
    disable: Any = torch.compiler.disable
    outside: F = disable(function, reason="linear_logprob_loss computes its gradient in forward")
    return outside


@_outside_of_graphs
def linear_logprob_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: RowLoss,
    data: Sequence[Tensor] = (),
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weight_scale: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over rows of loss(logprob, *data), and the log-probs, [...] without gradient.

    hidden [..., D], weight [V, D], labels [...], data [..., *any] each; `loss` sees some rows of them, [R] and
    [R, *any], in any order, and only rows that the mask counts (on CUDA also others, as zeros; their loss is dropped).
    Divide by the number of tokens in `loss`. There is one backward: the gradients themselves are kept, not the graph.
    A compiled step breaks its graph here.
    Raises MemplanError as linear_logprob does, on data that wants a gradient, and on a loss of another shape.
    """
    given, form = checked((hidden, weight, labels, bias, mask, weight_scale), (temperature, logit_scale, softcap))
    for k, x in enumerate(data):
        if x.shape[: labels.ndim] != labels.shape:
            raise MemplanError(f"data[{k}] {list(x.shape)} does not fit labels {list(labels.shape)}: one value per row")
        if x.requires_grad:
            raise MemplanError(f"data[{k}] wants a gradient and gets none here: detach it, or use linear_logprob")
    flat = [x.reshape(-1, *x.shape[labels.ndim :]) for x in data]
    hidden_TD, weight_VD, labels_T, bias_V, mask_T, scale = given
    apply: Any = _Loss.apply
    total, logprob = apply(hidden_TD, weight_VD, bias_V, scale, labels_T, mask_T, Form(*form), loss, flat)
    return total, logprob.view(labels.shape)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: Tensor | None,
        labels_T: Tensor,
        mask_T: Tensor | None,
        form: Form,
        loss: RowLoss,
        data: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight_VD, bias_V, scale, form)
        with torch.autocast(hidden_TD.device.type, enabled=False):
            found = one_pass(hidden_TD, head, labels_T, mask_T, loss, data, ctx.needs_input_grad[:3])
        ctx.sums, ctx.dtypes = found.sums, [None if x is None else x.dtype for x in (hidden_TD, weight_VD, bias_V)]
        ctx.mark_non_differentiable(found.logprob_T)
        return found.total, found.logprob_T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.sums is None:
            raise MemplanError("linear_logprob_loss has one backward, which has been: use linear_logprob for more")
        sums, ctx.sums = ctx.sums, None  # held by nobody else, a gradient becomes .grad without a copy
        made = []
        for dtype in ctx.dtypes:
            total = sums.pop(0)
            made.append(None if total is None else total.mul_(grads[0]).to(dtype))
            del total
        return (*made, *[None] * 6)


@dataclass
class OnePass:
    """The loss, the log-probs [T], and the sums that are the gradients of hidden, weight and bias, where wanted."""

    total: Tensor
    logprob_T: Tensor
    sums: list[Tensor | None]


def one_pass(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    mask_T: Tensor | None,
    loss: RowLoss,
    data: Sequence[Tensor],
    needs: Sequence[bool],
) -> OnePass:
    """Strip after strip: logits, log-probs, losses, and what they add to the gradients."""
    vocabulary, dtype = head.weight_VD.shape[0], head.form.sums
    height = max(EVEN, STRIP // (dtype.itemsize * vocabulary) // EVEN * EVEN)
    rows = Rows(hidden_TD.shape[0], mask_T, height)
    rows.check(labels_T, vocabulary)
    sums = [
        Sum(x, dtype, piecewise=False) if need and x is not None else None
        for x, need in zip((hidden_TD, head.weight_VD, head.bias_V), needs, strict=True)
    ]
    logprob_T = torch.zeros(hidden_TD.shape[0], dtype=dtype, device=hidden_TD.device)
    total = logprob_T.new_zeros(())
    memory = [logprob_T.new_empty(rows.tallest * vocabulary) for _ in range(1 + bool(head.form.softcap))]
    for tile in rows.tiles:
        strip = Strip(head, head.operand(rows.padded(hidden_TD, tile)), rows.padded(labels_T, tile), memory)
        count = tile.stop - tile.start
        logprob_R = strip.logprob_R[:count]
        loss_R, grad_R = _derived(loss, logprob_R, [rows.take(x, tile) for x in data])
        rows.put(logprob_T, tile, logprob_R)
        if rows.mask_T is not None:
            keep_R = rows.mask_T[tile]
            loss_R, grad_R = loss_R.where(keep_R, 0), grad_R.where(keep_R, 0)
        total += loss_R.sum()
        strip.add_gradients(grad_R, rows.where(tile), sums)
    return OnePass(total, logprob_T, [None if s is None else s.total for s in sums])


def _derived(loss: RowLoss, logprob_R: Tensor, data: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of each row, and its derivative."""
    with torch.enable_grad():
        variable = logprob_R.detach().requires_grad_()
        loss_R = loss(variable, *data)
        if loss_R.shape != logprob_R.shape:
            raise MemplanError(
                f"the loss of {logprob_R.shape[0]} rows is {list(loss_R.shape)}: return one value per row, no sum"
            )
        if not loss_R.requires_grad:
            return loss_R, torch.zeros_like(logprob_R)
        (grad_R,) = torch.autograd.grad(loss_R.sum(), variable)
    return loss_R.detach(), grad_R


class Strip:
    """Some rows over the whole vocabulary: log-probs first, gradients once there are coefficients.

    Of each tile e = exp(z - what was taken off) stays, and p = e exp(what was taken off - logsumexp).
    """

    def __init__(self, head: Head, hidden_RD: Tensor, labels_R: Tensor, memory: Sequence[Tensor]) -> None:
        self.head, self.hidden_RD, self.labels_R = head, hidden_RD, labels_R
        self.tiles: list[tuple[slice, Tensor, Tensor, Tensor | None]] = []
        statistics = Statistics(labels_R, head.form.sums, entropy=False)
        for columns in head.tiles():
            start = columns.start * hidden_RD.shape[0]
            z_RC = head.logits(hidden_RD, head.weights(columns), columns, memory[0][start:])
            slope_RC = None
            if len(memory) > 1:
                slope_RC = head.slope_(memory[1][start : start + z_RC.numel()].view_as(z_RC).copy_(z_RC))
            statistics.add(z_RC, columns)
            self.tiles.append((columns, z_RC, statistics.taken_off_R, slope_RC))
        results = statistics.results()
        self.logprob_R, self.total_R = results.logprob_R, results.total_R

    def add_gradients(self, grad_R: Tensor, where: slice | Tensor, sums: Sequence[Sum | None]) -> None:
        """Add to the gradients of hidden, weight and bias what rows with these derivatives of the loss add."""
        count = grad_R.shape[0]
        grad_R = grad_R * self.head.form.factor
        target_R1 = -(grad_R * self.logprob_R[:count].expm1()).unsqueeze(1)
        of_hidden, of_weight, of_bias = sums
        for columns, e_RC, taken_off_R, slope_RC in self.tiles:
            z_RC = e_RC[:count].mul_(-(grad_R * (taken_off_R - self.total_R)[:count].exp()).unsqueeze(1))
            there_R1, at_R1 = inside(self.labels_R[:count], columns)
            z_RC.scatter_(1, at_R1, torch.where(there_R1, target_R1, z_RC.gather(1, at_R1)))
            if slope_RC is not None:
                z_RC.mul_(slope_RC[:count])
            if of_hidden is not None:
                of_hidden.add_product(where, z_RC, self.head.weights(columns))
            if of_weight is not None:
                of_weight.add_product(columns, z_RC.t(), self.hidden_RD[:count])
            if of_bias is not None:
                of_bias.add(columns, z_RC.sum(0))
