"""The memory inside a few ops, in multiples of their first result: what no trace can see.

In: a Clock. Out: pairs of an op and its factor, for Machine.workspace_rules; ops that need nothing are left out.
Peaks are those that memplan.record() sees while the op runs. Attention's backward is whichever torch takes here; on
CUDA it stands for the CPU's too, which traces made without that device show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from memplan.calibrate.clock import Clock
from memplan.runtime.recorder import record

LEAST = 0.01  # a smaller factor is rounding
CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
ATTENTION = {  # what autograd calls it -> what a graph does
    "ScaledDotProductFlashAttentionForCpuBackward0": CPU_ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": "aten._scaled_dot_product_flash_attention_backward.default",
    "ScaledDotProductEfficientAttentionBackward0": "aten._scaled_dot_product_efficient_attention_backward.default",
    "ScaledDotProductCudnnAttentionBackward0": "aten._scaled_dot_product_cudnn_attention_backward.default",
}

Results = Sequence[torch.Tensor | None]


def workspaces(clock: Clock) -> Iterator[tuple[str, float]]:
    """Every op that needs memory beside its inputs and results."""
    for op, factor in (*_attention(clock), *_others(clock)):
        if factor > LEAST:
            yield op, factor


def _attention(clock: Clock) -> Iterator[tuple[str, float]]:
    dtype = torch.bfloat16 if clock.cuda and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    shape = (1, 8, clock.size(512, 2048, 32), 64)
    q, k, v = (torch.randn(shape, device=clock.device).to(dtype).requires_grad_() for _ in range(3))
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    op = ATTENTION.get(type(out.grad_fn).__name__)
    if op is None:
        return  # torch took it apart: its pieces are ops that a trace sees
    gradient = torch.ones_like(out)
    factor = _factor(clock, lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
    yield op, factor
    if op != CPU_ATTENTION:
        yield CPU_ATTENTION, factor


def _others(clock: Clock) -> Iterator[tuple[str, float]]:
    aten: Any = torch.ops.aten
    side = clock.size(32, 128, 8)
    images, filters = (torch.randn(shape, device=clock.device) for shape in ((4, 32, side, side), (32, 32, 3, 3)))
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
    yield str(aten.convolution.default), _factor(clock, lambda: [aten.convolution(images, filters, None, *how)])
    backward = (images, images, filters, None, *how, [True, True, False])
    yield str(aten.convolution_backward.default), _factor(clock, lambda: aten.convolution_backward(*backward))
    rows, width = clock.size(1024, 8192, 16), 256
    x, table = torch.randn(rows, width, device=clock.device), 4 * rows
    ids = torch.arange(rows, device=clock.device)
    yield (
        str(aten.embedding_dense_backward.default),
        _factor(clock, lambda: [aten.embedding_dense_backward(x, ids, table, -1, False)]),
    )
    yield str(aten.sort.default), _factor(clock, lambda: aten.sort(x))


def _factor(clock: Clock, run: Callable[[], Results]) -> float:
    """The peak while it runs beyond its results, in multiples of the first."""
    run()  # libraries keep what they take the first time
    with record(clock.device) as seen:
        results = [t for t in run() if t is not None]
    sizes = [t.untyped_storage().nbytes() for t in results]
    return max(0, seen.timeline.peak_above_base - sum(sizes)) / max(1, sizes[0])
