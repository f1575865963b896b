"""memplan::to_host, to_device and landed: what a planned graph calls to move a storage off the device and back.

    h = to_host(x, tier, order)  a CPU tensor off the device; the copy has started
    landed(h, x, "out")          the device waits until it is done; x may go
    y = to_device(h, device)     memory on the device; the copy back has started
    landed(y, h, "back")         the device waits until it is done; y may be read

`landed` says that it writes to its first argument, so no compiler moves what reads it before the copy is there; and it
reads the second, so that one stays alive until then. Where a compiler has laid x out in its own way, y is laid out as
the traced graph has it: `order` are its dimensions, outermost first. h has one more dimension than x, of size 1, so
that no compiler takes it for an image, whose layout it would change by a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memplan.runtime.host_pool import arena
from memplan.runtime.streams import engine

# Inductor then passes x as it has laid it out, and not a copy that nothing holds on to while it is being read.
TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op("memplan::to_host", mutates_args=(), tags=TAGS)
def to_host(x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    """A copy of `x` in a tier's arena, under way."""
    made = arena(tier).empty(x.shape, dense(x.shape, order), x.dtype)
    engine(x.device, "out").copy(x, made)
    return made.unsqueeze(0)


@to_host.register_fake
def _(x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    strides = dense(x.shape, order)
    return torch.empty_strided((1, *x.shape), (x.numel(), *strides), dtype=x.dtype, device="cpu")


@torch.library.custom_op("memplan::to_device", mutates_args=(), tags=TAGS)
def to_device(h: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `h` on the device, under way."""
    made = torch.empty_strided(h.shape[1:], h.stride()[1:], dtype=h.dtype, device=device)
    engine(made.device, "back").copy(h.squeeze(0), made)
    return made


@to_device.register_fake
def _(h: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(h.shape[1:], h.stride()[1:], dtype=h.dtype, device=device)


@torch.library.custom_op("memplan::landed", mutates_args=("to",), tags=TAGS)
def landed(to: torch.Tensor, source: torch.Tensor, direction: str) -> None:
    """Wait for the copy from `source` to `to`: "out" of the device, or "back"."""
    device = source.device if direction == "out" else to.device
    engine(device, direction).landed(to)


@landed.register_fake
def _(to: torch.Tensor, source: torch.Tensor, direction: str) -> None:
    return None


TO_HOST: Any = torch.ops.memplan.to_host.default
TO_DEVICE: Any = torch.ops.memplan.to_device.default
LANDED: Any = torch.ops.memplan.landed.default


def dense(shape: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """The strides of a tensor without gaps whose dimensions lie in this order, outermost first."""
    strides: list[Any] = [1] * len(shape)
    size: Any = 1
    for d in reversed(order):
        strides[d] = size
        size = size * shape[d]
    return strides
