"""How the states of HybridAdamW lie in memory: two tensors for each moment, and which block is in which.

A state: `step`, a float32 scalar, and `low` [blocks], bool, both on the CPU, where each step reads them; `strides`, how
the parameter lies in memory, whose order all values have; and for each moment `exp_avg` and `exp_avg_sq`: `.._low`,
bfloat16, the low blocks one after the other, and `.._high`, float32, the other blocks and then the values that are left
of less than a block. In: states and which blocks shall be low. Out: states of that form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.runtime.optim.rounding import round_

BLOCK = 256
MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {"low": torch.bfloat16, "high": torch.float32}
State = dict[str, Any]


def flat(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values of `t` [numel] in the order in which those of `like`, a parameter, lie in memory: a view, or a copy
    where it lies otherwise. Raises MemplanError for a parameter that has holes, or values twice.
    """
    if t.is_contiguous() and like.is_contiguous():
        return t.view(-1)
    if not _fills(like):
        raise MemplanError(
            f"a parameter of shape {list(like.shape)} and strides {list(like.stride())} does not fill its memory, "
            "which HybridAdamW cuts into blocks: make it contiguous"
        )
    if t.stride() != like.stride():
        t = torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return t.as_strided((t.numel(),), (1,))


def _fills(t: torch.Tensor) -> bool:
    """Whether each value of the memory from the first to the last is one of the tensor's, once."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def new_state(p: torch.Tensor, low: torch.Tensor, count: int) -> State:
    """The state of a parameter before its first step; `count` of the blocks are `low`."""
    sizes = {"low": count * BLOCK, "high": p.numel() - count * BLOCK}
    state: State = {"step": torch.zeros((), dtype=torch.float32, device=_host(p)), "low": low, "strides": p.stride()}
    for moment in MOMENTS:
        for kind, size in sizes.items():
            state[f"{moment}_{kind}"] = torch.zeros(size, dtype=DTYPES[kind], device=p.device)
    return state


def _host(p: torch.Tensor) -> str:
    return "meta" if p.is_meta else "cpu"


def layout(state: State) -> tuple[int, int]:
    """How many blocks are low, and how many are not."""
    low = state["exp_avg_low"].numel() // BLOCK
    return low, state["low"].numel() - low


def rows_of(low: torch.Tensor, kind: bool, count: int) -> torch.Tensor:
    """The numbers of the `count` blocks that are low, or not, in order."""
    return torch.nonzero_static(low == kind, size=count).view(count)


def mean_squares(state: State, at_once: int) -> torch.Tensor:
    """The mean second moment of each block [blocks]."""
    means = torch.empty(state["low"].numel(), dtype=torch.float32, device=state["exp_avg_low"].device)
    for kind, n in zip(DTYPES, layout(state), strict=True):
        for rows, part in _parts(state["low"], kind, n, state[f"exp_avg_sq_{kind}"], at_once):
            means.index_copy_(0, rows.to(means.device), part.float().mean(1))
    return means


def repack(state: State, low: torch.Tensor, count: int, at_once: int, generator: torch.Generator | None) -> None:
    """Hold the blocks `low`, of which there are `count`, in bfloat16, and the others in float32. What was in bfloat16
    keeps its value. Takes one new moment beside the states. Interrupted after the first change, the state has no
    `low`, and `fits` refuses it.
    """
    if not low.is_meta and torch.equal(low, state["low"]):
        return
    was, blocks = state["low"], low.numel()
    for moment in MOMENTS:
        old = {kind: state[f"{moment}_{kind}"] for kind in DTYPES}
        rest = old["high"][blocks * BLOCK - old["low"].numel() :]
        for kind, n, tail in (("low", count, rest[:0]), ("high", blocks - count, rest)):
            new = torch.empty(n * BLOCK + tail.numel(), dtype=DTYPES[kind], device=tail.device)
            for rows, part in _parts(low, kind, n, new, at_once):
                values = _read(old, was, rows)
                if kind == "low":
                    round_(values.view(1, -1), generator)
                part.copy_(values)
            new[n * BLOCK :].copy_(tail)
            state.pop("low", None)
            state[f"{moment}_{kind}"] = new
    state["low"] = low


def fits(state: State, p: torch.Tensor) -> None:
    """Raises MemplanError for a state whose `repack` was interrupted, or whose parameter lies otherwise than it did."""
    if "low" not in state:
        raise MemplanError(
            f"the state of a parameter of shape {list(p.shape)} is half changed: a step was interrupted, by an error "
            "or for want of memory, while HybridAdamW chose blocks anew; give load_state_dict() what was saved before"
        )
    was, now = state["strides"], p.stride()
    if was != now and any(size > 1 and was[i : i + 1] != now[i : i + 1] for i, size in enumerate(p.shape)):
        raise MemplanError(
            f"a parameter of shape {list(p.shape)} has strides {now} and its state those of {was}, and "
            "HybridAdamW's moments lie as the parameter does: choose its memory format before the first step, and load "
            "states into parameters of the same"
        )


def restored(state: Mapping[str, Any], p: torch.Tensor) -> State:
    """A state that was saved, in its own dtypes. Raises MemplanError unless it is one of this parameter."""
    names = [f"{moment}_{kind}" for moment in MOMENTS for kind in DTYPES]
    found = {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor)}
    low = state["exp_avg_low"].numel() if "exp_avg_low" in found else 0
    sizes = {"step": (), "low": (p.numel() // BLOCK,)}
    sizes |= {name: (low if name.endswith("low") else p.numel() - low,) for name in names}
    if found != sizes or int(state["low"].sum()) * BLOCK != low:
        raise MemplanError(
            f"the state to load for a parameter of shape {list(p.shape)} has {found or 'nothing'}, which is not "
            f"HybridAdamW's of {p.numel()} values: load what state_dict() of one over the same parameters returned"
        )
    strides = tuple(state.get("strides", ()))
    fits({"low": state["low"], "strides": strides}, p)
    dtypes = {name: DTYPES[name.rpartition("_")[2]] for name in names} | {"step": torch.float32, "low": torch.bool}
    kept = {name: state[name].to(p.device if name in names else _host(p), dtypes[name]) for name in sizes}
    return kept | {"strides": strides}


def _parts(
    low: torch.Tensor, kind: str, count: int, held: torch.Tensor, at_once: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of one kind, up to `at_once` values at a time: their numbers [n], and where they are held [n, BLOCK]."""
    if not count:
        return
    rows = torch.split(rows_of(low, kind == "low", count), at_once // BLOCK)
    yield from zip(rows, torch.split(held[: count * BLOCK].view(count, BLOCK), at_once // BLOCK), strict=True)


def _read(held: Mapping[str, torch.Tensor], low: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Blocks of a moment, as float32 [rows, BLOCK]."""
    found = {}
    for kind, values in held.items():
        blocks = values[: values.numel() // BLOCK * BLOCK].view(-1, BLOCK)
        if len(blocks):
            place = (low == (kind == "low")).cumsum(0)[rows].sub_(1).clamp_(0, len(blocks) - 1)
            found[kind] = blocks.index_select(0, place.to(blocks.device)).float()
    if len(found) == 1:
        return next(iter(found.values()))
    return torch.where(low[rows, None].to(found["low"].device), found["low"], found["high"])
