"""Every difference between the torch versions that memplan supports (2.11 to 2.13), in one place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners

UNKNOWN_SIZE = 8192  # what a size that depends on data is taken to be


def size_hint(n: Any) -> int:
    """The value a size had when the graph was traced."""
    if isinstance(n, torch.SymInt):
        hint = n.node.hint if n.node.has_hint() else None
        return UNKNOWN_SIZE if hint is None else int(hint)
    return int(n)


def symbol_hint(size: torch.SymInt, symbol: Any) -> int:
    """The value that one symbol of a size had when the graph was traced."""
    values = size.node.shape_env.var_to_val if hasattr(size.node.shape_env, "var_to_val") else {}
    found = values.get(symbol)
    return UNKNOWN_SIZE if found is None else int(found)


def extract(
    joint: fx.GraphModule, saved: Sequence[fx.Node], symbols: list[fx.Node], num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's split of a joint graph into forward and backward; `symbols` becomes the size symbols it saved."""
    more: dict[str, Any] = {}
    if "saved_opaque_nodes" in inspect.signature(partitioners._extract_fwd_bwd_modules).parameters:
        more["saved_opaque_nodes"] = []
    return partitioners._extract_fwd_bwd_modules(joint, list(saved), symbols, num_fwd_outputs=num_fwd_outputs, **more)
