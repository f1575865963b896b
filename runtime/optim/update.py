"""AdamW's arithmetic on blocks of both kinds, some at a time.

In: parameters with gradients and states. Out: both updated in place. What is low is copied to float32, updated as
torch's foreach has it, rounded, and copied back. Must hold: no more than `at_once` values are copied at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from memplan.runtime.optim.blocks import BLOCK, State, flat, layout, rows_of
from memplan.runtime.optim.rounding import round_


def update(parameters: list[torch.Tensor], states: list[State], group: dict[str, Any], generator: Any) -> None:
    """One step of each parameter, whose state's `step` counts it already."""
    pieces = (piece for p, state in zip(parameters, states, strict=True) for piece in _pieces(p, state))
    for batch in _batches(pieces, group["at_once"]):
        _update(batch, group, generator)


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter that is updated in one go: all flat, or all [rows, BLOCK] of which `rows` are meant."""

    value: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    rows: torch.Tensor | None = None

    def cut(self, values: int) -> Iterator[_Piece]:
        """Pieces of so many values, and the rest."""
        if self.rows is None:
            for a, b in ((0, values), (values, len(self.value))):
                m, v = self.exp_avg[a:b], self.exp_avg_sq[a:b]
                yield _Piece(self.value[a:b], self.grad[a:b], m, v, self.step)
            return
        n = values // BLOCK
        for a, b in ((0, n), (n, len(self.rows))):
            m, v = self.exp_avg[a:b], self.exp_avg_sq[a:b]
            yield _Piece(self.value, self.grad, m, v, self.step, self.rows[a:b])


def _pieces(p: torch.Tensor, state: State) -> Iterator[_Piece]:
    """A parameter's low blocks, the others, and the rest of less than a block."""
    assert p.grad is not None
    value, grad, step = flat(p, p), flat(p.grad, p), state["step"]
    low, high = layout(state)
    body = (low + high) * BLOCK
    moments = [(state[f"exp_avg_{kind}"], state[f"exp_avg_sq_{kind}"]) for kind in ("low", "high")]
    if low and high:
        of_rows = (value[:body].view(-1, BLOCK), grad[:body].view(-1, BLOCK))
        for (m, v), n, is_low in zip(moments, (low, high), (True, False), strict=True):
            m, v = (t[: n * BLOCK].view(n, BLOCK) for t in (m, v))
            yield _Piece(*of_rows, m, v, step, rows_of(state["low"], is_low, n))
        rest, start = high * BLOCK, body
    else:
        if low:
            yield _Piece(value[:body], grad[:body], *moments[0], step)
        rest, start = 0, low * BLOCK
    if start < len(value):
        m, v = moments[1]
        yield _Piece(value[start:], grad[start:], m[rest:], v[rest:], step)


def _batches(pieces: Iterable[_Piece], at_once: int) -> Iterator[list[_Piece]]:
    """The pieces, cut, `at_once` values in each list."""
    batch: list[_Piece] = []
    room = at_once
    for piece in pieces:
        while piece.exp_avg.numel() >= room:
            first, piece = piece.cut(room - room % BLOCK)
            yield [*batch, first] if first.exp_avg.numel() else batch
            batch, room = [], at_once
        if piece.exp_avg.numel():
            batch.append(piece)
            room -= piece.exp_avg.numel()
    if batch:
        yield batch


def _update(batch: list[_Piece], group: dict[str, Any], generator: torch.Generator | None) -> None:
    """AdamW, as torch's foreach has it (torch/optim/adam.py, _multi_tensor_adam), on float32 copies of what is low."""
    low = [x for x in batch if x.exp_avg.dtype == torch.bfloat16]
    stored = [x.exp_avg for x in low] + [x.exp_avg_sq for x in low]
    sizes = [t.numel() for t in stored]
    buffer = torch.empty(sum(sizes), device=batch[0].value.device)
    copies = [part.view_as(t) for part, t in zip(torch.split(buffer, sizes), stored, strict=True)] if low else []
    if low:
        torch._foreach_copy_(copies, stored)
    rest = [x for x in batch if x.exp_avg.dtype != torch.bfloat16]
    pieces = low + rest
    exp_avgs = copies[: len(low)] + [x.exp_avg for x in rest]
    exp_avg_sqs = copies[len(low) :] + [x.exp_avg_sq for x in rest]
    values = [x.value if x.rows is None else x.value.index_select(0, x.rows) for x in pieces]
    _adamw(values, [_grad(x) for x in pieces], exp_avgs, exp_avg_sqs, [x.step for x in pieces], group)
    for x, value in zip(pieces, values, strict=True):
        if x.rows is not None:
            x.value.index_copy_(0, x.rows, value)
    del values
    if low:
        round_(buffer.view(2, -1), generator)
        torch._foreach_copy_(stored, copies)  # exact now


def _grad(x: _Piece) -> torch.Tensor:
    return x.grad if x.rows is None else x.grad.index_select(0, x.rows)


def _adamw(
    values: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    group: dict[str, Any],
) -> None:
    (beta1, beta2), lr = group["betas"], group["lr"]
    counts = [1.0 if step.is_meta else step.item() for step in steps]
    if group["weight_decay"] != 0:
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    grads.clear()  # copies go
    roots = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(roots, [(1 - beta2**n) ** 0.5 for n in counts])
    torch._foreach_add_(roots, group["eps"])
    torch._foreach_addcdiv_(values, exp_avgs, roots, [-(lr / (1 - beta1**n)) for n in counts])
