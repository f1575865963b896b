"""The same function on CUDA: two kernels, what forward keeps of each row, and the gradient of a tile of logits.

Each kernel gets its logits in one of two ways, `multiplies` says which:

    it multiplies     one launch over the whole vocabulary (forward), or for one tile of gradients (backward)
    it does the rest  cuBLAS multiplies tile by tile, and the kernel does all else on that in one pass

Products with the gradients are cuBLAS's in both. Statistics are those of statistics.py, in float32. Rows that do not
count are read as zeros, and a block of them is left at once; nobody waits for the device. Not here, but in plain torch
(reference.py): float64, and the vectors of a frozen head.

Letters: R rows and C columns of a block, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memplan.runtime.kernels.linear_logprob.head import Head
from memplan.runtime.kernels.linear_logprob.reference import Coefficients, Forward, tile_buffers
from memplan.runtime.kernels.linear_logprob.rows import Rows
from memplan.runtime.kernels.linear_logprob.statistics import Statistics

WIDEST = 1024  # hidden size up to which a kernel multiplies itself: a guess, no GPU has measured it
BLOCK_R, BLOCK_C, BLOCK_D = 32, 64, 32


def multiplies(hidden: Tensor, head: Head) -> bool:
    """Whether kernels multiply: narrow hidden states, and operands as they are, side by side in memory."""
    weight = head.weight_VD
    same = hidden.dtype == weight.dtype == head.form.compute
    return same and head.scale is None and hidden.shape[-1] <= WIDEST and hidden.stride(-1) == weight.stride(-1) == 1


@triton.jit
def _logits(
    hidden, weight, raw, bias, r, c, row_ok, col_ok, hidden_stride, weight_stride, raw_stride, inner, outer,
    D: tl.constexpr, MULTIPLY: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z [R, C] of a block, and the slope of its softcap."""
    if MULTIPLY:
        z = tl.zeros((R, C), tl.float32)
        for start in range(0, D, BLOCK):
            d = start + tl.arange(0, BLOCK)
            d_ok = d < D
            h = tl.load(hidden + r[:, None] * hidden_stride + d[None, :], row_ok[:, None] & d_ok[None, :], other=0.0)
            w = tl.load(weight + c[None, :] * weight_stride + d[:, None], d_ok[:, None] & col_ok[None, :], other=0.0)
            z = tl.dot(h, w, z, input_precision="ieee")
    else:
        z = tl.load(raw + r[:, None] * raw_stride + c[None, :], row_ok[:, None] & col_ok[None, :], other=0.0)
    if BIAS:
        z += tl.load(bias + c, col_ok, other=0.0).to(tl.float32)[None, :]
    z = z * inner
    slope = tl.full((R, C), 1.0, tl.float32)
    if SOFTCAP:
        e = tl.exp(-2 * tl.abs(z))
        t = tl.where(z < 0, e - 1, 1 - e) / (1 + e)  # tanh
        slope = 1 - t * t
        z = t * outer
    return z, slope


@triton.jit
def _statistics_kernel(
    hidden, weight, raw, bias, labels, keep, top, total, target, weighted,
    T, first, hidden_stride, weight_stride, raw_stride, inner, outer,
    D: tl.constexpr, columns: tl.constexpr,
    MULTIPLY: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add `columns` logits of R rows to their statistics; the first of them is token `first`."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    row_ok = r < T
    if KEEP:
        row_ok = row_ok & (tl.load(keep + r, row_ok, other=0) != 0)
    if tl.max(row_ok.to(tl.int32), 0) == 0:
        return
    label = tl.load(labels + r, row_ok, other=-1) - first
    m, s = tl.load(top + r, row_ok, other=0.0), tl.load(total + r, row_ok, other=0.0)
    t = tl.load(target + r, row_ok, other=0.0)
    a = tl.zeros((R,), tl.float32)
    if ENTROPY:
        a = tl.load(weighted + r, row_ok, other=0.0)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C).to(tl.int64)
        col_ok = c < columns
        z, _ = _logits(
            hidden, weight, raw, bias, r, c, row_ok, col_ok, hidden_stride, weight_stride, raw_stride, inner, outer,
            D, MULTIPLY, BIAS, SOFTCAP, R, C, BLOCK,
        )  # fmt: skip
        is_target = (c[None, :] == label[:, None]) & col_ok[None, :]
        here = tl.max(is_target.to(tl.int32), 1) > 0
        t = tl.where(here, tl.sum(tl.where(is_target, z, 0.0), 1), t)
        z = tl.where(is_target | (col_ok[None, :] == 0), float("-inf"), z)
        highest = tl.maximum(m, tl.max(z, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        shift = tl.maximum(m - finite, -800.0)
        z = z - finite[:, None]
        e = tl.exp(z)
        if ENTROPY:
            a = tl.exp(shift) * (a + shift * s) + tl.sum(e * tl.maximum(z, -800.0), 1)
        s = tl.exp(shift) * s + tl.sum(e, 1)
        m = highest
    tl.store(top + r, m, row_ok)
    tl.store(total + r, s, row_ok)
    tl.store(target + r, t, row_ok)
    if ENTROPY:
        tl.store(weighted + r, a, row_ok)


@triton.jit
def _gradient_kernel(
    hidden, weight, raw, bias, labels, logprob, total, entropy, logprob_grad, entropy_grad, out,
    T, first, hidden_stride, weight_stride, raw_stride, inner, outer, factor,
    D: tl.constexpr, columns: tl.constexpr,
    MULTIPLY: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/draw of a block, to out [R, columns], which may be where the products are."""
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.program_id(1).to(tl.int64) * C + tl.arange(0, C)
    row_ok, col_ok = r < T, c < columns
    z, slope = _logits(
        hidden, weight, raw, bias, r, c, row_ok, col_ok, hidden_stride, weight_stride, raw_stride, inner, outer,
        D, MULTIPLY, BIAS, SOFTCAP, R, C, BLOCK,
    )  # fmt: skip
    is_target = c[None, :] == (tl.load(labels + r, row_ok, other=-1) - first)[:, None]
    logp = tl.load(logprob + r, row_ok, other=0.0)
    g = tl.load(logprob_grad + r, row_ok, other=0.0)
    log_p = z - tl.load(total + r, row_ok, other=0.0)[:, None]
    p = tl.exp(log_p)
    p_target = tl.exp(logp)
    # 1 - exp(l), near 0 by its series: to l = -0.1 five terms are exact to float32
    series = -logp * (1 + logp / 2 * (1 + logp / 3 * (1 + logp / 4 * (1 + logp / 5))))
    others = tl.where(logp > -0.1, series, 1 - p_target)
    of_target = g * others
    of_other = -p * g[:, None]
    if ENTROPY:
        h, k = tl.load(entropy + r, row_ok, other=0.0), tl.load(entropy_grad + r, row_ok, other=0.0)
        of_target -= k * p_target * (tl.maximum(logp, -800.0) + h)
        of_other -= p * k[:, None] * (tl.maximum(log_p, -800.0) + h[:, None])
    gradient = tl.where(is_target, of_target[:, None], of_other) * slope * factor
    tl.store(out + r[:, None] * columns + c[None, :], gradient, row_ok[:, None] & col_ok[None, :])


# ---- launching -------------------------------------------------------------------------------------------------------


def _numbers(head: Head) -> tuple[float, float]:
    """What products are multiplied with, and what tanh is."""
    form = head.form
    if form.softcap is None:
        return form.factor, 1.0
    return form.logit_scale / form.softcap, form.softcap / form.temperature


def _sizes(head: Head) -> dict[str, Any]:
    return {"SOFTCAP": head.form.softcap is not None, "R": BLOCK_R, "C": BLOCK_C, "BLOCK": BLOCK_D}


def _products(hidden_RD: Tensor, weight_CD: Tensor, z: Tensor) -> Tensor:
    """hidden @ weight.T in the memory of z, [R, C]."""
    raw_RC = z[: hidden_RD.shape[0] * weight_CD.shape[0]].view(hidden_RD.shape[0], -1)
    return torch.mm(hidden_RD, weight_CD.t(), out=raw_RC)


def forward(hidden_TD: Tensor, head: Head, labels_T: Tensor, mask_T: Tensor | None, *, entropy: bool) -> Forward:
    """As reference.forward, without vectors."""
    rows = Rows(hidden_TD.shape[0], None)
    keep_T = None if mask_T is None else mask_T.to(torch.int8)
    found = Statistics(labels_T, head.form.sums, entropy=entropy)
    if multiplies(hidden_TD, head):
        everything = slice(0, head.weight_VD.shape[0])
        whole = slice(0, hidden_TD.shape[0])
        _add(found, whole, everything, head, keep_T, hidden_TD, head.weight_VD, None)
    else:
        z = tile_buffers(rows, head, False)[0]
        for tile in rows.tiles:
            hidden_RD = head.operand(hidden_TD[tile])
            for columns in head.tiles():
                raw_RC = _products(hidden_RD, head.weights(columns), z)
                _add(found, tile, columns, head, keep_T, hidden_RD, head.weight_VD, raw_RC)
    results = found.results()
    made = [results.logprob_R, results.total_R, results.entropy_R]
    if mask_T is not None:
        made = [None if x is None else x.where(mask_T, 0) for x in made]
    logprob_T, total_T, entropy_T = made
    assert logprob_T is not None and total_T is not None
    return Forward(logprob_T, total_T, entropy_T, None, None)


def _add(
    found: Statistics,
    tile: slice,
    columns: slice,
    head: Head,
    keep_T: Tensor | None,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    raw_RC: Tensor | None,
) -> None:
    """Add a tile to the statistics of its rows, in place."""
    count = tile.stop - tile.start
    if not count:
        return
    bias = None if head.bias_V is None else head.bias_V[columns].contiguous()
    keep_R = None if keep_T is None else keep_T[tile]
    any_R = found.top_R
    _statistics_kernel[(triton.cdiv(count, BLOCK_R),)](
        hidden_RD, weight_VD, any_R if raw_RC is None else raw_RC, any_R if bias is None else bias,
        found.labels_R[tile], any_R if keep_R is None else keep_R, found.top_R[tile], found.sum_R[tile],
        found.target_R[tile], any_R if found.weighted_R is None else found.weighted_R[tile],
        count, columns.start, hidden_RD.stride(0), weight_VD.stride(0), columns.stop - columns.start, *_numbers(head),
        D=hidden_RD.shape[1], columns=columns.stop - columns.start,
        MULTIPLY=raw_RC is None, BIAS=bias is not None, KEEP=keep_R is not None, ENTROPY=found.weighted_R is not None,
        **_sizes(head),
    )  # fmt: skip


def gradient_of_tile(
    hidden_RD: Tensor, weight_CD: Tensor, head: Head, given: Coefficients, columns: slice, z: Tensor, scratch: Any
) -> Tensor:
    """As reference.gradient_of_tile; what backward calls for each tile."""
    rows, width = hidden_RD.shape
    own = head.weight_VD.dtype == hidden_RD.dtype and multiplies(hidden_RD, head)
    z_RC = z[: rows * weight_CD.shape[0]].view(rows, -1)
    if not own:
        _products(hidden_RD, weight_CD, z)
    bias = None if head.bias_V is None else head.bias_V[columns].contiguous()
    of_entropy = given.entropy is not None and given.entropy_grad is not None
    _gradient_kernel[(triton.cdiv(rows, BLOCK_R), triton.cdiv(z_RC.shape[1], BLOCK_C))](
        hidden_RD, weight_CD, z_RC, z_RC if bias is None else bias, given.labels, given.logprob, given.total,
        given.entropy if of_entropy else given.logprob, given.logprob_grad.contiguous(),
        given.entropy_grad.contiguous() if of_entropy and given.entropy_grad is not None else given.logprob, z_RC,
        rows, columns.start, hidden_RD.stride(0), weight_CD.stride(0), z_RC.shape[1], *_numbers(head), head.form.factor,
        D=width, columns=z_RC.shape[1], MULTIPLY=own, BIAS=bias is not None, ENTROPY=of_entropy, **_sizes(head),
    )  # fmt: skip
    return z_RC
