"""Bytes that ops allocate, counted on tensors that have no data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.runtime.storages import plain


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that ops make, as long as they live."""

    def __init__(self, there: Iterable[torch.Tensor | None], *, keep: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {p.untyped_storage()._cdata for t in there if t is not None for p in plain(t)}
        self.total = self.peak = 0
        self.keep = keep  # calls, with what describes their operands
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (p for r in pytree.tree_leaves(result) if isinstance(r, torch.Tensor) for p in plain(r)):
            self.count(tensor.untyped_storage())
        if self.keep:
            self.calls.append(pytree.tree_map_only(torch.Tensor, _hollow, (func, args, kwargs or {}, result)))
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is not there yet, until it is gone."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.total += size
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.total -= size


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that layout that holds on to nothing."""
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
