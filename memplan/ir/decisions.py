"""What is decided for the gap between a storage's last forward and first backward use, and what runs then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Keep:
    """The storage stays on the device until its last use in backward."""


@dataclass(frozen=True)
class Recompute:
    """The storage is freed after its last use in forward and computed again just before backward needs it."""


Tier = Literal["host", "disk"]


@dataclass(frozen=True)
class Offload:
    """The storage is copied to a tier below the device and freed there; backward copies it back before it needs it.

    Each point is an op, an index into Step.ops; None: placed by passes/copies.py, from the machine's bandwidth.
    `start_after`: the op of the forward graph after which the copy starts. `release_at`: the op of the forward graph
    after which the device waits for the copy, and the memory is freed. `reload_at`: the op of the backward graph
    before which memory is allocated again and the copy back starts; the first op that reads it waits for that copy.
    So bytes follow from the order of ops alone: a copy that is late costs time, never memory.
    """

    tier: Tier = "host"
    start_after: int | None = None
    release_at: int | None = None
    reload_at: int | None = None


Decision = Keep | Recompute | Offload
Decisions = Mapping[int, Decision]  # storage -> decision; a storage left out is kept if backward reads it


@dataclass(frozen=True)
class Run:
    """One execution of an op: `op` indexes Step.ops; `again` marks a recomputation."""

    op: int
    again: bool = False
