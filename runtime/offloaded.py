"""memplan::to_host, to_device and landed: what a planned graph calls to move a storage off the device and back.

    h = to_host(x, tier)        a CPU tensor off the device; the copy has started
    landed(h, x, "out")         the device waits until it is done; x may go
    y = to_device(h, device)    memory on the device; the copy back has started
    landed(y, h, "back")        the device waits until it is done; y may be read

`landed` says that it writes to its first argument, so no compiler moves what reads it before the copy is there; and it
reads the second, so that one stays alive until then. Sizes and strides are the source's.
"""

from __future__ import annotations

from typing import Any

import torch

from memplan.runtime.host_pool import arena
from memplan.runtime.streams import engine

# Inductor then passes x as it lays it out, rather than a copy in the layout of the traced graph.
TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op("memplan::to_host", mutates_args=(), tags=TAGS)
def to_host(x: torch.Tensor, tier: str) -> torch.Tensor:
    """A copy of `x` in a tier's arena, under way."""
    made = arena(tier).empty_like(x)
    engine(x.device, "out").copy(x, made)
    return made


@to_host.register_fake
def _(x: torch.Tensor, tier: str) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


@torch.library.custom_op("memplan::to_device", mutates_args=(), tags=TAGS)
def to_device(h: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `h` on the device, under way."""
    made = torch.empty_strided(h.shape, h.stride(), dtype=h.dtype, device=device)
    engine(made.device, "back").copy(h, made)
    return made


@to_device.register_fake
def _(h: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(h.shape, h.stride(), dtype=h.dtype, device=device)


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
