"""AdamW's arithmetic on blocks of both kinds, some at a time.

In: parameters with gradients and states. Out: both updated in place, by torch's fused AdamW. Where a part of a
parameter has low blocks, its moments are copied to float32 and brought into the order of the blocks, and afterwards
brought back, rounded and stored; values and gradients stay where they are. Must hold: no more than `at_once` values are
updated at a time; what has no low block is cut between blocks alone, which is where the fused loop's vectors end too,
so that its bits are those of one call for the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from memplan.runtime.optim.blocks import BLOCK, State, flat
from memplan.runtime.optim.rounding import round_

Moments = tuple[torch.Tensor, torch.Tensor]


def update(parameters: list[torch.Tensor], states: list[State], group: dict[str, Any], generator: Any) -> None:
    """One step of each parameter, whose state's `step` counts it already."""
    both = list(zip(parameters, states, strict=True))
    mixed = min(group["at_once"], sum(p.numel() for p, state in both if state["exp_avg_low"].numel()))
    scratch = torch.empty(4 * mixed, dtype=torch.float32, device=parameters[0].device)
    # One at a time: a gradient that lies in another order than its parameter is copied.
    for batch in _batches((_Part.of(p, state) for p, state in both), group["at_once"]):
        _update(batch, group, generator, scratch)


@dataclass(frozen=True)
class _Part:
    """Consecutive values of a parameter [n] and their moments: those of the `low` blocks that `flags` [blocks] names,
    and the others, with what is left of less than a block at the end.
    """

    value: torch.Tensor
    grad: torch.Tensor
    step: torch.Tensor
    flags: torch.Tensor
    lows: Moments
    highs: Moments
    low: int  # blocks

    @classmethod
    def of(cls, p: torch.Tensor, state: State) -> _Part:
        assert p.grad is not None
        lows, highs = ((state[f"exp_avg_{kind}"], state[f"exp_avg_sq_{kind}"]) for kind in ("low", "high"))
        low = lows[0].numel() // BLOCK
        return cls(flat(p, p), flat(p.grad, p), state["step"], state["low"], lows, highs, low)

    def between(self, begin: int, end: int, low: int) -> tuple[_Part, int]:
        """Its values from `begin`, the beginning of a block before which `low` are low, to `end`; and how many are low
        before `end`. Without data, as many as can be.
        """
        if end - begin == self.value.numel():
            return self, self.low
        flags = self.flags[begin // BLOCK : end // BLOCK]
        until = low
        if self.low:
            until += min(self.low - low, len(flags)) if flags.is_meta else int(flags.sum())
        lows, highs = slice(low * BLOCK, until * BLOCK), slice(begin - low * BLOCK, end - until * BLOCK)
        part = _Part(
            self.value[begin:end], self.grad[begin:end], self.step, flags,
            (self.lows[0][lows], self.lows[1][lows]), (self.highs[0][highs], self.highs[1][highs]), until - low,
        )  # fmt: skip
        return part, until


def _batches(whole: Iterable[_Part], at_once: int) -> Iterator[list[_Part]]:
    """All values, up to `at_once` in each list, cut between blocks. What is left of less than a block is a part of its
    own if other blocks of it are low.
    """
    batch: list[_Part] = []
    room = at_once
    for x in whole:
        at, low, size = 0, 0, x.value.numel()
        while at < size:
            body = size - size % BLOCK
            end = size if not x.low or at == body else body
            if end - at > room:
                end = at + room - room % BLOCK
            if end > at:
                part, low = x.between(at, end, low)
                batch.append(part)
                room -= end - at
                at = end
            if at < size and room < min(BLOCK, size - at):
                yield batch
                batch, room = [], at_once
    if batch:
        yield batch


def _update(
    batch: list[_Part], group: dict[str, Any], generator: torch.Generator | None, scratch: torch.Tensor
) -> None:
    """`scratch` [4 n] float32 holds both moments of n values meanwhile: as they are stored, low blocks first, and in
    the order of the blocks.
    """
    mixed, plain = [x for x in batch if x.low], [x for x in batch if not x.low]
    sizes = [x.value.numel() for x in mixed]
    low, n = sum(x.low for x in mixed), sum(sizes)
    stored, used = scratch[: 4 * n].view(2, 2, n)
    room = used[0]
    if mixed:
        _copy(mixed, stored, to_states=False)
    if low * BLOCK == n:  # in order already
        used = stored
    else:
        order = _order(mixed, scratch.device)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        _permute(stored, used, place)
    pieces = mixed + plain
    m, v = used[0], used[1]
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [x.value for x in pieces],
        [x.grad for x in pieces],
        [*m.split_with_sizes(sizes), *(x.highs[0] for x in plain)],
        [*v.split_with_sizes(sizes), *(x.highs[1] for x in plain)],
        [],
        [x.step.to(scratch.device) for x in pieces],
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
        amsgrad=False, maximize=False,
    )  # fmt: skip
    if used is not stored:
        _permute(used, stored, order)
    if mixed:
        round_(stored[:, : low * BLOCK], generator, room)
        _copy(mixed, stored, to_states=True)  # exact now


def _order(mixed: list[_Part], device: torch.device) -> torch.Tensor:
    """The numbers of the parts' blocks, counted through, low ones first: [2 blocks], as both moments lie."""
    order = torch.cat([x.flags for x in mixed]).argsort(descending=True, stable=True)
    return torch.cat([order, order + len(order)]).to(device)


def _copy(mixed: list[_Part], stored: torch.Tensor, *, to_states: bool) -> None:
    """Between states and `stored` [2, n]: all low blocks, then all others."""
    theirs = [moments[k] for k in range(2) for moments in (*(x.lows for x in mixed), *(x.highs for x in mixed))]
    ours = stored.view(-1).split_with_sizes([t.numel() for t in theirs])
    torch._foreach_copy_(*((theirs, ours) if to_states else (ours, theirs)))


def _permute(source: torch.Tensor, target: torch.Tensor, rows: torch.Tensor) -> None:
    """target's block i is source's block rows[i]."""
    torch.index_select(source.view(-1, BLOCK), 0, rows, out=target.view(-1, BLOCK))
