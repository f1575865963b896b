"""The specification: log-prob and entropy from hidden states, and their gradients, tile by tile, in plain torch.

Forward is the same for every way: rows outside, vocabulary inside, online statistics. So equal inputs give equal
log-probs, to the bit, whatever the way and with or without gradients. Never is there more of [T, V] than a tile or two.

Gradients, with g = dloss/dl and k = dloss/dH per row, and s the slope of the softcap:

    dz_j = -p_j (g + k (log p_j + H)) s_j     for j other than the target
    dz_t = (g (1 - p_t) - k p_t (l + H)) s_t

This is also the fast path on the CPU. Letters as in head.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memplan.runtime.kernels.linear_logprob.head import Head
from memplan.runtime.kernels.linear_logprob.rows import Rows, buffer
from memplan.runtime.kernels.linear_logprob.statistics import LOWEST, Results, Statistics, inside
from memplan.runtime.kernels.linear_logprob.sums import Sum
from memplan.runtime.kernels.linear_logprob.vectors import Vectors


@dataclass(frozen=True)
class Forward:
    """What forward leaves: [T] all in the dtype of sums; `logprob_vector` and `entropy_vector`, if asked for, are
    dl/dh and dH/dh, [T, D].
    """

    logprob_T: Tensor
    total_T: Tensor  # logsumexp of the logits
    entropy_T: Tensor | None
    logprob_vector_TD: Tensor | None
    entropy_vector_TD: Tensor | None


def forward(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, mask_T: Tensor | None, *, entropy: bool, vectors: bool
) -> Forward:
    """Log-probs of the labels. Rows that the mask drops get 0."""
    tokens, dtype, device = hidden_TD.shape[0], head.form.sums, hidden_TD.device
    rows = Rows(tokens, mask_T)
    rows.check(labels_T, head.weight_VD.shape[0])
    out = Forward(
        torch.zeros(tokens, dtype=dtype, device=device),
        torch.zeros(tokens, dtype=dtype, device=device),
        torch.zeros(tokens, dtype=dtype, device=device) if entropy else None,
        torch.zeros(hidden_TD.shape, dtype=dtype, device=device) if vectors else None,
        torch.zeros(hidden_TD.shape, dtype=dtype, device=device) if vectors and entropy else None,
    )
    z, scratch = tile_buffers(rows, head, entropy)
    for tile in rows.tiles:
        labels_R = rows.padded(labels_T, tile)
        found = Vectors(head, labels_R, hidden_TD.shape[1], entropy=entropy) if vectors else None
        results = forward_tile(rows.padded(hidden_TD, tile), head, labels_R, z, scratch, found)
        rows.put(out.logprob_T, tile, results.logprob_R)
        rows.put(out.total_T, tile, results.total_R)
        if out.entropy_T is not None and results.entropy_R is not None:
            rows.put(out.entropy_T, tile, results.entropy_R)
        if found is not None and out.logprob_vector_TD is not None:
            rows.put(out.logprob_vector_TD, tile, found.of_logprob(results))
            if out.entropy_vector_TD is not None:
                rows.put(out.entropy_vector_TD, tile, found.of_entropy(results))
    return out


def tile_buffers(rows: Rows, head: Head, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Memory for the logits of one tile, and as much again where entropy is asked for."""
    size = (rows.tallest, head.columns())
    made = [buffer(size, head.form.sums, head.weight_VD.device) for _ in range(1 + entropy)]
    return made[0], made[1] if entropy else None


def forward_tile(
    hidden_RD: Tensor, head: Head, labels_R: Tensor, z: Tensor, scratch: Tensor | None, vectors: Vectors | None
) -> Results:
    """One tile of rows, over the whole vocabulary."""
    hidden_RD = head.operand(hidden_RD)
    statistics = Statistics(labels_R, head.form.sums, entropy=scratch is not None)
    for columns in head.tiles():
        weight_CD = head.weights(columns)
        z_RC = head.logits(hidden_RD, weight_CD, columns, z)
        if vectors is not None:
            vectors.see(z_RC, columns)
        scratch_RC = None if scratch is None else scratch[: z_RC.numel()].view_as(z_RC)
        factor_R, shift_R = statistics.add(z_RC, columns, scratch_RC)
        if vectors is not None:
            vectors.add(z_RC, scratch_RC, weight_CD, factor_R, shift_R)
    return statistics.results()


@dataclass(frozen=True)
class Coefficients:
    """What backward knows of each row: dloss/dl and dloss/dH, and what forward found; [R] all."""

    logprob_grad: Tensor
    entropy_grad: Tensor | None
    logprob: Tensor
    total: Tensor
    entropy: Tensor | None
    labels: Tensor

    def take(self, rows: Rows, tile: slice) -> Coefficients:
        """Those of a tile."""
        some = (self.logprob_grad, self.entropy_grad, self.logprob, self.total, self.entropy, self.labels)
        taken = [None if x is None else rows.take(x, tile) for x in some]
        return Coefficients(*taken)  # type: ignore[arg-type]


TileGradient = Callable[[Tensor, Tensor, Head, Coefficients, slice, Tensor, Tensor | None], Tensor]


def backward(
    hidden_TD: Tensor,
    head: Head,
    rows: Rows,
    given: Coefficients,
    *,
    way: str,
    needs: tuple[bool, bool, bool],
    tile_gradient: TileGradient | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, where `needs` says so; logits are computed again.

    `way` says what is outside: "rows" finishes a tile of hidden's gradient, and adds to the whole of the weight's;
    "vocab" the other way round. A whole is held in the dtype of sums and rounded once; a float32 gradient is its own.
    """
    dtype, by_rows = head.form.sums, way == "rows"
    of_hidden = Sum(hidden_TD, dtype, piecewise=by_rows) if needs[0] else None
    of_weight = Sum(head.weight_VD, dtype, piecewise=not by_rows) if needs[1] else None
    of_bias = Sum(head.bias_V, dtype, piecewise=False) if needs[2] and head.bias_V is not None else None
    z, scratch = tile_buffers(rows, head, given.entropy is not None or head.form.softcap is not None)
    places, columns = [(tile, rows.where(tile)) for tile in rows.tiles], list(head.tiles())
    pairs = [(p, c) for p in places for c in columns] if by_rows else [(p, c) for c in columns for p in places]
    for (tile, where), part in pairs:
        hidden_RD, weight_CD = head.operand(rows.take(hidden_TD, tile)), head.weights(part)
        compute = tile_gradient or gradient_of_tile
        z_RC = compute(hidden_RD, weight_CD, head, given.take(rows, tile), part, z, scratch)
        if of_hidden is not None:
            of_hidden.add_product(where, z_RC, weight_CD)
        if of_weight is not None:
            of_weight.add_product(part, z_RC.t(), hidden_RD)
        if of_bias is not None:
            of_bias.add(part, z_RC.sum(0))
    return tuple(None if x is None else x.result() for x in (of_hidden, of_weight, of_bias))  # type: ignore[return-value]


def gradient_of_tile(
    hidden_RD: Tensor, weight_CD: Tensor, head: Head, given: Coefficients, columns: slice, z: Tensor, scratch: Any
) -> Tensor:
    """dloss/draw of a tile, [R, C], in the memory of `z`."""
    z_RC = head.logits(hidden_RD, weight_CD, columns, z)
    gradient_tile(z_RC, head, given, columns, scratch)
    return z_RC


def gradient_tile(z_RC: Tensor, head: Head, given: Coefficients, columns: slice, scratch: Tensor | None) -> None:
    """dloss/draw, in the place of the logits."""
    slope_RC = None
    if head.form.softcap is not None:
        slope_RC = head.slope_(z_RC.clone())
    there_R1, at_R1 = inside(given.labels, columns)
    others_R1 = -given.logprob.expm1().unsqueeze(1)
    grad_R1 = given.logprob_grad.unsqueeze(1) * head.form.factor
    target_R1 = grad_R1 * others_R1
    z_RC.sub_(given.total.unsqueeze(1))
    if given.entropy is None or given.entropy_grad is None:
        z_RC.exp_().mul_(-grad_R1)
    else:
        assert scratch is not None
        entropy_R1, weight_R1 = given.entropy.unsqueeze(1), given.entropy_grad.unsqueeze(1) * head.form.factor
        p_RC = torch.exp(z_RC, out=scratch[: z_RC.numel()].view_as(z_RC))
        z_RC.clamp_(min=LOWEST).add_(entropy_R1).mul_(-weight_R1).sub_(grad_R1).mul_(p_RC)
        logprob_R1 = given.logprob.unsqueeze(1)
        target_R1 = target_R1 - weight_R1 * logprob_R1.exp() * (logprob_R1.clamp(min=LOWEST) + entropy_R1)
    z_RC.scatter_(1, at_R1, torch.where(there_R1, target_R1, z_RC.gather(1, at_R1)))
    if slope_RC is not None:
        z_RC.mul_(slope_RC)
