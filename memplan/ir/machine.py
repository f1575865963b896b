"""What a device can do, and how much of its memory a step may have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from memplan.ir.decisions import Tier
    from memplan.ir.step import Op


@dataclass(frozen=True)
class Machine:
    """What a device can do. `flops`: dtype -> FLOP/s of products; a dtype that is absent is not supported.

    `attention`: dtype -> FLOP/s of attention, where it is known to differ.
    """

    name: str
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    bandwidth: float  # bytes/s of device memory
    flops: tuple[tuple[str, float], ...]
    host_bandwidth: float = 0.0  # bytes/s between host and device, one direction
    disk_bandwidth: float = 1e9  # bytes/s between device and disk, one direction
    contention: float = 1.0  # of the bytes of a copy, how many compete with ops for device memory; 0: copies cost none
    unified: bool = False  # host and device share one memory
    context_bytes: int = 0  # what the driver takes before the first tensor
    workspace_rules: tuple[tuple[str, float], ...] = ()  # op -> hidden workspace, in multiples of its first output
    attention: tuple[tuple[str, float], ...] = ()

    @functools.cached_property
    def rates(self) -> Mapping[str, float]:
        """`flops` as a mapping."""
        return dict(self.flops)

    @functools.cached_property
    def attention_rates(self) -> Mapping[str, float]:
        """`attention` as a mapping."""
        return dict(self.attention)

    def seconds(self, op: Op) -> float:
        """Roofline (Williams, Waterman, Patterson 2009): the longer of arithmetic and memory traffic."""
        if op.fetches:
            return self.copy_seconds(op.traffic // 2, "host")
        rate = self.rates.get(op.dtype) or self.rates["float32"]
        if self.attention and "attention" in op.target:
            rate = self.attention_rates.get(op.dtype, rate)
        return max(op.flops / rate, (op.traffic if op.priced is None else op.priced) / self.bandwidth)

    def copy_seconds(self, size: int, tier: Tier) -> float:
        """Time of a copy of `size` bytes between the device and a tier."""
        return size / (self.disk_bandwidth if tier == "disk" else self.host_bandwidth or self.bandwidth)


@dataclass(frozen=True)
class Budget:
    """The largest peak allowed on the device. `available` is what is left for the step's own bytes.

    `host_bytes`: the most that may be in the host's memory at a time; 0: nothing is offloaded there.
    `others`: what else is there while the step runs, by name, as of a ledger's leases.
    `listener`: who hears, as the step runs, what it leaves of this (runtime/room.py); 0: nobody.
    """

    bytes: int
    fixed_bytes: int = 0  # context and libraries, measured
    reserve: float = 0.0  # the fraction held back against fragmentation
    note: str = ""  # how it was read: "clamped to the device's 24.0 GB"
    host_bytes: int = 0
    others: tuple[tuple[str, int], ...] = ()
    listener: int = dataclasses.field(default=0, compare=False, repr=False)

    @property
    def reserve_bytes(self) -> int:
        return int(self.reserve * self.bytes)

    @property
    def available(self) -> int:
        return self.bytes - self.reserve_bytes - sum(size for _, size in self.beside)

    @property
    def beside(self) -> tuple[tuple[str, int], ...]:
        """What is there throughout and not the step's, by name, but for what is held back."""
        return (("context", self.fixed_bytes), *self.others) if self.fixed_bytes else self.others

    def leaving(self, available: int) -> Budget:
        """One that leaves so many bytes for the step, and the same beside the device."""
        return Budget(available, host_bytes=self.host_bytes, listener=self.listener)

    def needed_for(self, peak: int) -> int:
        """The smallest budget of this kind that leaves `peak` bytes for the step."""
        there = sum(size for _, size in self.beside)
        size = int((peak + there) / (1 - self.reserve)) - 2  # the reserve is rounded down: look from below
        while dataclasses.replace(self, bytes=size).available < peak:
            size += 1
        return size
