"""memplan.stream: frozen parameters that live off the device, and are brought in for each use.

In: a module, some of whose parameters are frozen. Out: the same module: its frozen parameters are in the host's memory,
and reading one copies it to the device (memplan::fetch). So it computes the same anywhere, compiled or not, and a step
that memplan compiles sees fetches as ops: the plan says whether backward keeps what was brought in or brings it again,
and each copy starts when the one before it is done (memplan::bring and brought), beside what the device computes.

Embeddings stay: they read a few rows of what they would bring in. In state_dict() a streamed "weight" is called
"parametrizations.weight.original", as torch.nn.utils.parametrize has it; `memplan.unstream` undoes all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from memplan.errors import MemplanError
from memplan.runtime.host_pool import arena
from memplan.runtime.offloaded import TAGS
from memplan.runtime.streams import Copy, engine
from memplan.runtime.tickets import blank, redeem, ticket


@torch.library.custom_op("memplan::fetch", mutates_args=(), tags=TAGS)
def fetch(p: torch.Tensor, device: torch.device, use: int) -> torch.Tensor:
    """A copy of `p` on the device. `use`: which of the graph's it is, so that two are not taken for one."""
    return _start(p, device).landed()


@fetch.register_fake
def _(p: torch.Tensor, device: torch.device, use: int) -> torch.Tensor:
    return torch.empty_like(p, device=device)


@torch.library.custom_op("memplan::bring", mutates_args=(), tags=TAGS)
def bring(p: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A ticket for a copy of `p` on the device."""
    return ticket(_start(p, device))


@bring.register_fake
def _(p: torch.Tensor, device: torch.device) -> torch.Tensor:
    return blank()


@torch.library.custom_op("memplan::brought", mutates_args=(), tags=TAGS)
def brought(t: torch.Tensor, p: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The copy of `p`, once it is done."""
    return redeem(t)


@brought.register_fake
def _(t: torch.Tensor, p: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_like(p, device=device)


FETCH: Any = torch.ops.memplan.fetch.default
BRING: Any = torch.ops.memplan.bring.default
BROUGHT: Any = torch.ops.memplan.brought.default


def _start(p: torch.Tensor, device: torch.device) -> Copy:
    made = torch.empty_like(p, device=device)  # without gaps, whatever has become of the parameter
    return engine(made.device, "back").start(p, made)


class Fetched(nn.Module):
    """The parametrization of a streamed parameter."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        if p.requires_grad:
            raise MemplanError(
                f"a streamed parameter {list(p.shape)} requires a gradient: memplan.unstream(module) first, or "
                "requires_grad_(False)"
            )
        made: torch.Tensor = fetch(p, self.device, 0)
        return made


def stream(module: nn.Module) -> nn.Module:
    """Move the frozen parameters of `module` off their device, but those of embeddings; returns the module.

    On the meta device nothing is moved, and a plan counts it so. Raises MemplanError when nothing is frozen, or when
    the host has no room: then nothing has been moved. What is written to a streamed parameter is lost: it is written to
    a copy. An optimizer or a state_dict made before holds the old memory.
    """
    if not isinstance(module, nn.Module):
        raise MemplanError(f"cannot stream a {type(module).__name__}: give a torch.nn.Module")
    found = list(_frozen(module))
    if not found:
        raise MemplanError(
            f"{type(module).__name__} has no frozen parameters to stream, beside those of embeddings and those that "
            "modules share: set requires_grad_(False) on what is not trained"
        )
    moved = [(owner, name, p.device, _off(p)) for owner, name, p in found]
    for owner, name, device, p in moved:
        setattr(owner, name, p)
        where = torch.device("cpu") if device.type == "meta" else device
        parametrize.register_parametrization(owner, name, Fetched(where), unsafe=True)
    return module


def unstream(module: nn.Module) -> nn.Module:
    """Bring all streamed parameters of `module` back to their device; returns the module."""
    for owner in list(module.modules()):
        streamed = []
        for name in list(getattr(owner, "parametrizations", ())):
            chain: Any = owner.parametrizations[name]  # type: ignore[index]
            if len(chain) == 1 and isinstance(chain[0], Fetched):
                streamed.append((name, chain[0].device, chain.original))
        if streamed:
            own_class(owner)
        for name, device, p in streamed:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            there = torch.empty_like(p, device=device).copy_(p.detach())
            setattr(owner, name, nn.Parameter(there, requires_grad=p.requires_grad))
    return module


def own_class(owner: nn.Module) -> None:
    """Copies of a module share the class that parametrize made for it, from which a property is about to go."""
    shared = type(owner)
    parts = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    owner.__class__ = type(shared.__name__, shared.__bases__, parts)


def _frozen(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Those that are read whole: no embedding's, and none that another module has too."""
    owners: dict[int, int] = {}
    for owner in module.modules():
        for p in owner._parameters.values():
            owners[id(p)] = owners.get(id(p), 0) + (2 if isinstance(owner, nn.Embedding) else 1)
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is None or p.requires_grad or owners[id(p)] > 1 or not p.numel():
                continue
            if not isinstance(owner, parametrize.ParametrizationList):
                yield owner, name, p


def _off(p: nn.Parameter) -> nn.Parameter:
    """The parameter, in the arena."""
    if p.is_meta:
        return p
    like = torch.empty_like(p, device="meta")
    to = arena("host").empty(like.shape, like.stride(), like.dtype)
    return nn.Parameter(to.copy_(p.detach()), requires_grad=False)
