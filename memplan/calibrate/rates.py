"""What a device does in a second: products by dtype, attention by dtype, bytes of memory.

In: a Clock. Out: pairs of what and its rate, in FLOP/s and B/s. Sizes grow until they take long enough to be timed.
FLOPs are counted as passes/costs.py counts them, so that rate and count fit together: attention forward and backward
as 2 + 5 products, causal, as language models run it, although half of each is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch.nn import functional as F

from memplan.calibrate.clock import Clock

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIDES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
HEADS, HEAD = 8, 64
ELEMENTS = (2**24, 2**26)  # on a CPU and on CUDA, beyond most caches


def products(clock: Clock) -> Iterator[tuple[str, float]]:
    """FLOP/s of square products, for every dtype that the device has."""
    for dtype in DTYPES:
        if dtype is torch.bfloat16 and clock.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue

        def product(side: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
            return lambda: a @ b

        side, seconds = clock.grown(_sides(clock), product)
        yield str(dtype).removeprefix("torch."), 2 * side**3 / seconds
    if clock.cuda and torch.cuda.get_device_capability(clock.device) >= (8, 9):
        side, seconds = clock.grown(_sides(clock), lambda side: _float8_product(clock, side))
        yield "float8_e4m3fn", 2 * side**3 / seconds


def _sides(clock: Clock) -> Iterator[int]:
    return iter(SIDES[: 6 if not clock.cuda else None])


def _float8_product(clock: Clock, side: int) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def attention(clock: Clock, dtypes: Collection[str]) -> Iterator[tuple[str, float]]:
    """FLOP/s of torch's attention, forward and backward, for those of the dtypes that people train in."""
    for dtype in DTYPES:
        if str(dtype).removeprefix("torch.") not in dtypes or dtype is torch.float64:
            continue

        def both_ways(tokens: int, dtype: torch.dtype = dtype) -> Callable[[], object]:
            shape = (1, HEADS, tokens, HEAD)
            q, k, v = (torch.randn(shape, device=clock.device).to(dtype).requires_grad_() for _ in range(3))

            def run() -> object:
                with torch.enable_grad():
                    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    return torch.autograd.grad(out, (q, k, v), out.detach())

            return run

        tokens, seconds = clock.grown(iter(TOKENS), both_ways)
        yield str(dtype).removeprefix("torch."), 7 * HEADS * tokens**2 * 2 * HEAD / seconds


def memory(clock: Clock) -> Iterator[tuple[str, float]]:
    """B/s of a pointwise op that reads two tensors and writes a third, and of a sum, which only reads."""
    size, run = pointwise(clock)
    yield "pointwise", size / clock.seconds(run)
    x = torch.ones(clock.size(*ELEMENTS), device=clock.device)
    yield "reduction", x.nbytes / clock.seconds(x.sum)


def pointwise(clock: Clock) -> tuple[int, Callable[[], object]]:
    """A pointwise op, and the bytes that it reads and writes. Its result is memory that was used before, as what an
    allocator gives out in a step mostly is.
    """
    x, y, out = (torch.ones(clock.size(*ELEMENTS), device=clock.device) for _ in range(3))
    return 3 * x.nbytes, lambda: torch.add(x, y, out=out)
