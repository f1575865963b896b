"""Tickets: what stands in a graph for a copy that is under way.

In: a Copy. Out: a tensor of a few bytes, off the device, that a compiler may pass on and drop as any other; and, in
exchange for it, what the copy has made. So whatever reads the result depends on the wait by its data, and no compiler
can move it ahead. A ticket that is dropped lets go of its copy.
"""

from __future__ import annotations

import ctypes
import weakref

import torch

from memplan.runtime.streams import Copy

BYTES = 8


class _Stub(ctypes.Structure):
    """The memory of a ticket, which its storage holds, and with it the copy."""

    _fields_ = (("bytes", ctypes.c_char * BYTES),)
    copy: Copy | None = None

    def __del__(self) -> None:
        if self.copy is not None:
            self.copy.abandon()


_stubs: weakref.WeakValueDictionary[int, _Stub] = weakref.WeakValueDictionary()  # by address


def ticket(copy: Copy) -> torch.Tensor:
    """A ticket for a copy."""
    stub = _Stub()
    stub.copy = copy
    made = torch.frombuffer(stub, dtype=torch.uint8)
    _stubs[made.data_ptr()] = stub
    return made


def redeem(made: torch.Tensor) -> torch.Tensor:
    """Wait for the copy of a ticket, and take what it made. Once."""
    stub = _stubs.pop(made.data_ptr())
    copy, stub.copy = stub.copy, None
    assert copy is not None
    return copy.landed()


def blank() -> torch.Tensor:
    """What a ticket looks like."""
    return torch.empty(BYTES, dtype=torch.uint8, device="cpu")
