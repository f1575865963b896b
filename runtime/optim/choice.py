"""Which blocks of HybridAdamW's moments are in bfloat16.

In: parameters with their gradients or states, and a group's rule. Out: for each parameter which blocks are low, and how
many; without data (on meta) how many there may be. A block counts by the mean square of its gradients.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from memplan.runtime.optim.blocks import BLOCK, State, flat, mean_squares

THRESHOLD = 1e-3


def squares_of(p: torch.Tensor, state: State | None, group: dict[str, Any]) -> torch.Tensor:
    """Mean squares of a parameter's gradients [blocks]."""
    if state is None:
        assert p.grad is not None
        blocks = p.numel() // BLOCK
        rows = flat(p.grad, p)[: blocks * BLOCK].view(blocks, BLOCK)
        norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms.square_().div_(BLOCK)
    seen = 1 - group["betas"][1] ** float(state["step"]) if not state["step"].is_meta else 1.0
    return mean_squares(state, group["at_once"]).div_(seen)


def lowest(squares: list[torch.Tensor], group: dict[str, Any]) -> list[tuple[torch.Tensor, int]]:
    """For each parameter which blocks are low, [blocks] as bool on the CPU, and how many."""
    sizes = [s.numel() for s in squares]
    if not squares:
        return []
    if squares[0].is_meta:
        counts = _counts_without_data(sizes, group)
        return [(torch.empty_like(s, dtype=torch.bool), n) for s, n in zip(squares, counts, strict=True)]
    if group["share"] is None:
        limit = THRESHOLD if group["threshold"] is None else group["threshold"]
        lows = [s < limit**2 for s in squares]
    else:
        together = torch.cat(squares).nan_to_num_(nan=math.inf)
        low = torch.zeros_like(together, dtype=torch.bool)
        low[together.argsort(stable=True)[: math.ceil(group["share"] * len(together))]] = True
        lows = [part.clone() for part in torch.split(low, sizes)]
    return [(low, int(low.sum())) for low in (low.cpu() for low in lows)]


def _counts_without_data(sizes: list[int], group: dict[str, Any]) -> list[int]:
    """How many blocks are low where gradients are not known: `share` of them; of a threshold, none, which is the most
    bytes. "most": what takes a step the most beside its states, all but one.
    """
    how = group.get("without_data")
    if how == "most":
        return [max(n - 1, min(n, 1)) for n in sizes]
    share = 0.0 if how == "none" or group["share"] is None else group["share"]
    ends = [math.ceil(share * sum(sizes[:i])) for i in range(len(sizes) + 1)]
    return [b - a for a, b in itertools.pairwise(ends)]
