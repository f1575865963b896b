"""What HybridAdamW can be asked. In: a parameter group, or its parameters. Out: nothing, or MemplanError."""

from __future__ import annotations

import math
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.runtime.optim.blocks import BLOCK, flat


def check(group: dict[str, Any]) -> None:
    """Raises MemplanError for options that cannot be."""

    def number(name: str, low: float, high: float, whole: bool = False) -> None:
        value = group[name]
        kinds = int if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            raise MemplanError(
                f"HybridAdamW's {name} is {value!r}: it is {'an int' if whole else 'a number'}"
                + ("" if low == -math.inf else f" from {low:g}")
                + ("" if high == math.inf else f" to {high:g}")
            )

    for name in ("lr", "eps", "weight_decay"):
        number(name, 0, math.inf)
    number("every", 1, math.inf, whole=True)
    number("at_once", BLOCK, math.inf, whole=True)
    number("seed", -math.inf, math.inf, whole=True)
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(map(_is_decay, betas))):
        raise MemplanError(f"HybridAdamW's betas are {betas!r}: give two numbers from 0 to below 1")
    if group["threshold"] is not None and group["share"] is not None:
        raise MemplanError(
            f"HybridAdamW has threshold={group['threshold']!r} and share={group['share']!r}, two rules for one choice: "
            "leave one of them out"
        )
    if group["threshold"] is not None:
        number("threshold", 0, math.inf)
    if group["share"] is not None:
        number("share", 0, 1)


def _is_decay(beta: Any) -> bool:
    return isinstance(beta, (int, float)) and 0 <= beta < 1


def check_all(parameters: list[torch.Tensor]) -> None:
    """Raises MemplanError for parameters that cannot be, or not in one group."""
    for p in parameters:
        check_parameter(p)
        flat(p, p)
    if len(devices := {str(p.device) for p in parameters}) > 1:
        raise MemplanError(
            f"a group's parameters are on {' and '.join(sorted(devices))}: give HybridAdamW one group for each device"
        )


def check_parameter(p: torch.Tensor) -> None:
    """Raises MemplanError for a parameter that is not float32, or sparse."""
    if p.dtype != torch.float32:
        raise MemplanError(
            f"a parameter of shape {list(p.shape)} is {p.dtype}, and HybridAdamW updates float32 alone: of others "
            "torch.optim.AdamW holds moments in their own dtype"
        )
    if p.layout != torch.strided:
        raise MemplanError(
            f"a parameter of shape {list(p.shape)} is {p.layout}, and HybridAdamW updates dense ones: make it dense"
        )
