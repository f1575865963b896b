"""Stochastic rounding to bfloat16: up or down with the odds that make the mean exact.

In: float32 values and a generator. Out: the same values, each one of its two neighbours in bfloat16.
A bfloat16 is the upper half of a float32: a random number of 16 bits is added to the lower half, and what is left of
that half is cut off. What bfloat16 holds exactly, zero, infinity and NaN stay what they are.
"""

from __future__ import annotations

import hashlib

import torch

LOWER = -(2**16)  # all bits but the lower half's


def round_(values: torch.Tensor, generator: torch.Generator | None) -> None:
    """Round `values` [k, n], float32 and contiguous, in place. The k of a column share their chance: numbers are half
    of the time. Takes 2 n bytes meanwhile.
    """
    n = values.shape[1]
    words = torch.empty((n + 3) // 4, dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=generator)
    bits = values.view(torch.int32)
    bits.add_(words.view(torch.int16)[:n]).add_(2**15)  # the words' quarters are from -2**15 on
    bits.bitwise_and_(LOWER)


def generator_of(device: torch.device, *of: int) -> torch.Generator | None:
    """A generator whose numbers follow from the device's type and these integers alone; none where there is no data."""
    if device.type == "meta":
        return None
    digest = hashlib.blake2b(repr(of).encode(), digest_size=4).digest()  # a CPU's generator looks at 32 bits
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
