"""The memory that is really behind tensors.

In: tensors of any kind. Out: the plain tensors that have their memory, and bytes, each storage once. A wrapper subclass
(a quantised state, a DTensor) says the size of what it stands for; its memory is that of the tensors inside it. States
of several parameters can share one table, which is counted once. What is on another device is not counted: a counter of
steps on the host, pages that a driver moves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that have its memory: itself, or what it is around; of a sparse one, its indices and values."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        yield tensor


def nbytes(tensors: Iterable[torch.Tensor], devices: Collection[str]) -> int:
    """Bytes of the storages behind them on devices of these types, each once."""
    there = (p.untyped_storage() for t in tensors for p in plain(t) if p.device.type in devices)
    return sum({storage._cdata: storage.nbytes() for storage in there}.values())
