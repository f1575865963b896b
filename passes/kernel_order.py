"""Inductor's kernels, kept in the order of the plan.

Inductor starts from the graph's order and moves ops only to fuse them. What it fuses must not move far: the bytes of a
plan follow from its order. Two kernels of which one reads the other may be fused, as that saves a buffer; two that only
read the same may be where no library call (a product, attention, a loop over slices) comes between, and else either
would hold what it reads, or what it makes, all that time. And nothing is fused across the parts of a graph with its
backward inside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

PART = "memplan_part"  # in a node's meta: which part of a graph it belongs to


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While it is open, Inductor fuses only what stays near its place."""
    from torch._inductor.scheduler import Scheduler

    can_fuse: Any = Scheduler.can_fuse

    def near(self: Any, first: Any, second: Any, *args: Any, **more: Any) -> bool:
        if _part(first) != _part(second):
            return False
        reads = first.get_operation_names() & second.ancestors or second.get_operation_names() & first.ancestors
        if not reads:
            if not hasattr(self, "memplan_places"):
                self.memplan_places = _places(self.nodes)
            if _latest(self.memplan_places, first) != _latest(self.memplan_places, second):
                return False
        return bool(can_fuse(self, first, second, *args, **more))

    with mock.patch.object(Scheduler, "can_fuse", near):
        yield


def _places(kernels: Any) -> dict[str, int]:
    """Of each op, before it is fused: how many library calls come before it."""
    places, count = dict[str, int](), 0
    for kernel in kernels:
        count += kernel.is_extern() or kernel.is_template()
        places |= {one.get_name(): count for one in kernel.get_nodes()}
    return places


def _latest(places: dict[str, int], kernel: Any) -> int:
    return max(places.get(one.get_name(), 0) for one in kernel.get_nodes())


def _part(kernel: Any) -> int:
    """The latest part of what was inlined into a kernel."""
    origins = (origin for one in kernel.get_nodes() for origin in getattr(one.node, "origins", ()))
    return max((origin.meta.get(PART, 0) for origin in origins), default=0)
