"""memplan::to_host, off, to_device and back: what a planned graph calls to move a storage off the device and back.

    t = to_host(x, tier, order)  a ticket: the copy off the device has started
    h = off(t, x, tier, order)   it is done; x may go
    t = to_device(h, device, dims)  a ticket: there is memory on the device, and the copy back has started
    y = back(t, h, device, dims)    it is done

Where a compiler has laid x out in its own way, y is laid out as the traced graph has it: `order` are its dimensions,
outermost first. h has dimensions of size 1 before the `dims` of x, SIX in all at least, so that no compiler takes it
for an image, whose layout it would change by a copy. Handles and tickets are on the CPU, off what is metered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memplan.runtime.host_pool import arena
from memplan.runtime.streams import engine
from memplan.runtime.tickets import blank, redeem, ticket

# Inductor then passes x as it has laid it out, and not a copy that nothing holds on to while it is being read.
TAGS = (torch.Tag.flexible_layout,)
SIX = 6


@torch.library.custom_op("memplan::to_host", mutates_args=(), tags=TAGS)
def to_host(x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    """A ticket for a copy of `x` in a tier's arena."""
    made = arena(tier).empty(x.shape, dense(x.shape, order), x.dtype)
    return ticket(engine(x.device, "out").start(x, made))


@to_host.register_fake
def _(x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    return blank()


@torch.library.custom_op("memplan::off", mutates_args=(), tags=TAGS)
def off(t: torch.Tensor, x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    """The handle of what was copied off the device."""
    made = redeem(t)
    return made.as_strided(*_handle(made, order))


@off.register_fake
def _(t: torch.Tensor, x: torch.Tensor, tier: str, order: Sequence[int]) -> torch.Tensor:
    return torch.empty_strided(*_handle(x, order), dtype=x.dtype, device="cpu")


@torch.library.custom_op("memplan::to_device", mutates_args=(), tags=TAGS)
def to_device(h: torch.Tensor, device: torch.device, dims: int) -> torch.Tensor:
    """A ticket for a copy of `h` on the device."""
    source = h.as_strided(*_inner(h, dims))
    made = torch.empty_strided(source.shape, source.stride(), dtype=h.dtype, device=device)
    return ticket(engine(made.device, "back").start(source, made))


@to_device.register_fake
def _(h: torch.Tensor, device: torch.device, dims: int) -> torch.Tensor:
    return blank()


@torch.library.custom_op("memplan::back", mutates_args=(), tags=TAGS)
def back(t: torch.Tensor, h: torch.Tensor, device: torch.device, dims: int) -> torch.Tensor:
    """What was copied back to the device."""
    return redeem(t)


@back.register_fake
def _(t: torch.Tensor, h: torch.Tensor, device: torch.device, dims: int) -> torch.Tensor:
    return torch.empty_strided(*_inner(h, dims), dtype=h.dtype, device=device)


TO_HOST: Any = torch.ops.memplan.to_host.default
OFF: Any = torch.ops.memplan.off.default
TO_DEVICE: Any = torch.ops.memplan.to_device.default
BACK: Any = torch.ops.memplan.back.default


def dense(shape: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """The strides of a tensor without gaps whose dimensions lie in this order, outermost first."""
    strides: list[Any] = [1] * len(shape)
    size: Any = 1
    for d in reversed(order):
        strides[d] = size
        size = size * shape[d]
    return strides


def _handle(x: torch.Tensor, order: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """Sizes and strides of the handle of `x`."""
    more = max(0, SIX - x.dim())
    return [1] * more + list(x.shape), [x.numel()] * more + dense(x.shape, order)


def _inner(h: torch.Tensor, dims: int) -> tuple[list[Any], list[Any]]:
    """Sizes and strides of what a handle is of."""
    first = h.dim() - dims
    return list(h.shape[first:]), list(h.stride()[first:])
