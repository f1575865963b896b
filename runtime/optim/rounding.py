"""Stochastic rounding to bfloat16: up or down with the odds that make the mean exact.

In: float32 values and a generator. Out: the same values, each one of its two neighbours in bfloat16.
A bfloat16 is the upper half of a float32: a random number of 16 bits is added to the lower half, and what is left of
that half is cut off. What bfloat16 holds exactly, zero, infinity and NaN stay what they are; a NaN's own bits do not.
"""

from __future__ import annotations

import hashlib
import math

import torch

LOWER = -(2**16)  # all bits but the lower half's
COLUMNS = 256


def round_(values: torch.Tensor, generator: torch.Generator | None, room: torch.Tensor | None = None) -> None:
    """Round `values` [k, n], float32, in place. The k of a column share their chance. Takes 4 n bytes meanwhile, those
    of `room` [n or more, rounded up to whole rows], float32, if it is given.

    To draw a number for each took half of the time. The n are seen as rows of 256, a number is drawn for each row and
    for each column, and each value's is the exclusive or of its two: every one is equally likely, and any two are
    independent, so the mean is exact and errors add up as those of independent roundings do.
    """
    n = values.shape[1]
    rows = -(-n // COLUMNS)
    drawn = torch.empty(rows + COLUMNS, dtype=torch.int32, device=values.device)
    drawn.random_(0, 2**16, generator=generator)
    if room is None:
        room = values.new_empty(rows * COLUMNS)
    chance = room[: rows * COLUMNS].view(torch.int32)
    torch.bitwise_xor(drawn[:rows, None], drawn[rows:], out=chance.view(rows, COLUMNS))
    # CUDA's NaN is all ones: one more, and it would be zero. A CPU sees at half the price that there is none.
    if values.device.type != "cpu" or not math.isfinite(values.sum()):
        values.nan_to_num_(math.nan, math.inf, -math.inf)
    values.view(torch.int32).add_(chance[:n]).bitwise_and_(LOWER)


def generator_of(device: torch.device, *of: int) -> torch.Generator | None:
    """A generator whose numbers follow from the device's type and these integers alone; none where there is no data."""
    if device.type == "meta":
        return None
    digest = hashlib.blake2b(repr(of).encode(), digest_size=4).digest()  # a CPU's generator looks at 32 bits
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
