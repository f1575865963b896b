"""AdamW whose moments are held in bfloat16 where gradients are small, and in float32 elsewhere.

In: parameters in float32, with gradients. Out: parameters updated as torch.optim.AdamW does, and states of fewer bytes.
A moment is cut into blocks of 256 values. The blocks in bfloat16 ("low") lie one after the other in one tensor, the
others and what is left of less than a block in another, so what a block does not need is free. Which are low is chosen
at a parameter's first step and again every `every` steps, from the root mean square of each block's gradients, over the
time that the second moment looks back on (at the first step: of that gradient). Values are rounded to bfloat16 up or
down by chance (rounding.py), or a second moment would stand still: a step changes it by 1/1000, bfloat16 by 1/256.
Must hold: with no block low, the arithmetic is that of torch's foreach AdamW, op by op. The random numbers of a step
follow from the seed and the number of the step, so that a run that was saved and loaded goes on bit for bit.
What a step takes beside the states is bounded by `at_once`, and by one moment of one parameter while blocks are chosen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.runtime.optim.blocks import BLOCK, flat, layout, mean_squares, new_state, repack, restored, rows_of
from memplan.runtime.optim.rounding import generator_of, round_

THRESHOLD = 1e-3
State = dict[str, torch.Tensor]


class HybridAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with moments in bfloat16 or float32, block by block.

    `threshold`: blocks whose gradients are below it on average (root mean square) are in bfloat16; 1e-3 unless `share`
    is given. `share`, 0 to 1: that part of a group's blocks is, those of the smallest gradients; then the bytes are
    known ahead, 8 - 4 * share for each value. `every`: steps from one choice to the next. `seed`: of the rounding.
    `at_once`: how many values are updated at a time; a step takes up to 30 bytes for each of them.
    Raises MemplanError for what it cannot do, with what can be done.
    """

    # What a step without data may be run as, to know the most that one can take (runtime/optimizers.py).
    extremes = ({"every": 1}, {"every": 1, "without_data": "none"}, {"every": 1, "without_data": "most"})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        threshold: float | None = None,
        share: float | None = None,
        every: int = 100,
        seed: int = 0,
        at_once: int = 2**17,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
            threshold=threshold, share=share, every=every, seed=seed, at_once=at_once, calls=0,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises MemplanError."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except MemplanError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            given = [p for p in group["params"] if p.grad is not None]
            for p in given:
                if p.grad.is_sparse:
                    raise MemplanError("a gradient is sparse, and HybridAdamW takes none: use torch.optim.SparseAdam")
            if given:
                generator = generator_of(given[0].device, group["seed"], number, group["calls"])
                self._choose(group, given, generator)
                group["calls"] += 1
                _add_one([self.state[p]["step"] for p in given])
                pieces = (piece for p in given for piece in _pieces(p, self.state[p]))
                for batch in _batches(pieces, group["at_once"]):
                    _update(batch, group, generator)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the states are the same bits again. Raises MemplanError for another optimizer's."""
        mine = [p for group in self.param_groups for p in group["params"]]
        theirs = [key for group in state_dict["param_groups"] for key in group["params"]]
        if len(mine) != len(theirs) or not all("at_once" in group for group in state_dict["param_groups"]):
            raise MemplanError(
                f"the state to load is of {len(theirs)} parameters, and of no HybridAdamW over these {len(mine)}: give "
                "what state_dict() of one over the same parameters returned"
            )
        for key, p in zip(theirs, mine, strict=True):
            if key in state_dict["state"]:
                restored(state_dict["state"][key], p)
        super().load_state_dict(state_dict)  # which makes all states float32, exactly
        for p in mine:
            if p in self.state:
                self.state[p] = restored(self.state[p], p)

    def _choose(self, group: dict[str, Any], given: list[torch.Tensor], generator: torch.Generator | None) -> None:
        """Make the states of parameters that have none; when it is time, choose anew for all."""
        due = group["calls"] % group["every"] == 0
        chosen = [p for p in group["params"] if p in self.state] if due else []
        chosen += [p for p in given if p not in self.state]
        squares = [_squares(p, self.state.get(p), group) for p in chosen]
        lows = _lowest(squares, group)
        # Those that shrink come first, so that the sum is never above what it was and what it will be.
        order = sorted(range(len(chosen)), key=lambda i: self._grows(chosen[i], lows[i]))
        for i in order:
            p, (low, count) = chosen[i], lows[i]
            if p not in self.state:
                self.state[p] = new_state(p, low, count)
            else:
                repack(self.state[p], low, count, group["at_once"], generator)

    def _grows(self, p: torch.Tensor, low: tuple[torch.Tensor, int]) -> int:
        """By how many blocks the part of a parameter's that is in float32 grows."""
        blocks = low[0].numel()
        return layout(self.state[p])[0] - low[1] if p in self.state else blocks - low[1]


# ---- which blocks are low --------------------------------------------------------------------------------------------


def _squares(p: torch.Tensor, state: State | None, group: dict[str, Any]) -> torch.Tensor:
    """Mean squares of a parameter's gradients [blocks]."""
    if state is None:
        assert p.grad is not None
        blocks = p.numel() // BLOCK
        rows = flat(p.grad, p)[: blocks * BLOCK].view(blocks, BLOCK)
        norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms.square_().div_(BLOCK)
    seen = 1 - group["betas"][1] ** float(state["step"]) if not state["step"].is_meta else 1.0
    return mean_squares(state, group["at_once"]).div_(seen)


def _lowest(squares: list[torch.Tensor], group: dict[str, Any]) -> list[tuple[torch.Tensor, int]]:
    """For each parameter which blocks are low, [blocks] as bool, and how many."""
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
    return [(low, int(low.sum())) for low in lows]


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


# ---- the update ------------------------------------------------------------------------------------------------------


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


def _add_one(steps: list[torch.Tensor]) -> None:
    torch._foreach_add_(steps, 1.0)


# ---- what can be asked -----------------------------------------------------------------------------------------------


def _check(group: dict[str, Any]) -> None:
    """Raises MemplanError for options or parameters that cannot be."""

    def number(name: str, low: float, high: float, whole: bool = False) -> None:
        value = group[name]
        kinds = int if whole else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
            raise MemplanError(
                f"HybridAdamW's {name} is {value!r}: it is {'an int' if whole else 'a number'} from {low:g}"
                + ("" if high == math.inf else f" to {high:g}")
            )

    for name in ("lr", "eps", "weight_decay"):
        number(name, 0, math.inf)
    number("every", 1, math.inf, whole=True)
    number("at_once", BLOCK, math.inf, whole=True)
    number("seed", -math.inf, math.inf, whole=True)
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= b < 1 for b in betas)):
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
    for p in group["params"]:
        if p.dtype != torch.float32:
            raise MemplanError(
                f"a parameter of shape {list(p.shape)} is {p.dtype}, and HybridAdamW updates float32 alone: of others "
                "torch.optim.AdamW holds moments in their own dtype"
            )
        flat(p, p)
    if len(devices := {str(p.device) for p in group["params"]}) > 1:
        raise MemplanError(
            f"a group's parameters are on {' and '.join(sorted(devices))}: give HybridAdamW one group for each device"
        )
