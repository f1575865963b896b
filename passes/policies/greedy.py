"""Give up what is cheapest to recompute or to copy per byte, until the step fits.

In: a step and a budget. Out: the first point of a path that fits. A point is a set of storages to save. For a
price per byte, the set that is cheapest in saved bytes and recomputation together is a minimum cut; as the price
grows, ever more is recomputed, block by block. Paths are made with every block boundary saved and with every
second, third, ... only; the other built-in policies' sets are points too. Where the host has room, some of these are
points again with part of what they save off the device: what the bus can take in time, or what frees the most.
The path is sorted by the time of recomputation and of copies, and does not depend on the budget. So the first point
that fits is its fastest, and peaks and overheads are monotone in the budget by construction.
When nothing on the path fits, its point of least peak is returned and the pipeline says what is short.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from memplan.ir import Budget, Decisions, Machine, Offload, Step
from memplan.passes.blocks import frontiers
from memplan.passes.policies.block_checkpoint import SqrtN, keep_only
from memplan.passes.policies.min_cut import cuts
from memplan.passes.policies.offload import SMALL, away, decided, in_time, oldest_first
from memplan.passes.schedule import closure, moved_ahead, needs_tangents, saved_by, schedule
from memplan.passes.simulate import NONE, copying, peak

STRIDES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)  # blocks per segment; beyond: no boundary at all
MOVED = 24  # points, evenly spread over the bytes that cross, that are tried with some of these off the device
BACKLOGS = (0.0, 1 / 32, 1 / 8)  # of these bytes, which may wait for a copy: what waits longer stays
SHARES, IN_FLIGHT = (0.5, 1.0), (0, 1)  # or so much leaves, the device waiting for it: less memory, and more time


class Point(NamedTuple):
    """`saved` cross, `offloads` of them off the device; `seconds` of recomputation and copies follow; `crossing` bytes
    are on the device when forward ends.
    """

    seconds: float
    crossing: int
    saved: frozenset[int]
    offloads: Mapping[int, Offload] = NONE


@dataclass(frozen=True)
class Greedy:
    """`points`: into how many pieces the path divides the bytes of save-all. `small`: bytes of what is not copied."""

    points: int = 96
    small: int = SMALL
    name: str = "greedy"
    finds_least: ClassVar[bool] = True

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        points = step.once(path, machine, self.points)
        if budget.host_bytes:
            points = sorted([*points, *moved(step, points, budget, machine, self.small)], key=in_order)
        best = choose(step, points, budget.available)
        return decided(step.read_in_backward | best.saved, best.saved, best.offloads)


def choose(step: Step, points: list[Point], available: int) -> Point:
    """The first point whose peak is `available` bytes at most; if there is none, that of least peak."""
    room = available - step.base_bytes
    late = []
    least: tuple[int, int] | None = None
    for i, point in enumerate(points):
        if point.crossing > room:
            late.append(i)
            continue
        found = peak(step, point.saved, point.offloads)
        if found <= available:
            return point
        least = min(least or (found, i), (found, i))
    # Nothing fits. The bytes that cross bound a peak from below, so most points need no simulation.
    for i in sorted(late, key=lambda i: points[i].crossing):
        if least is not None and step.base_bytes + points[i].crossing > least[0]:
            break
        found = peak(step, points[i].saved, points[i].offloads)
        least = min(least or (found, i), (found, i))
    return points[least[1]] if least else Point(0.0, 0, step.read_in_backward)


def moved(
    step: Step,
    points: Sequence[Point],
    budget: Budget,
    machine: Machine,
    small: int,
    room: float = math.inf,
    limit: float = math.inf,
) -> Iterator[Point]:
    """Points with part of what they save off the device, but for those that leave more than `room` there, or that
    would have to wait for the bus until the `limit`.
    """
    ahead = sum(step.seconds(machine)[: len(step.forward.ops)])
    ahead += sum(step.seconds(machine)[i] for i in moved_ahead(step, step.saveable))
    ordered = sorted(points, key=lambda p: -p.crossing)
    for k in sorted({round(i * (len(ordered) - 1) / (MOVED - 1)) for i in range(MOVED)} if ordered else ()):
        point = ordered[k]
        large = [t for t in point.saved & step.offloadable if step.tensors[t].bytes >= small]
        oldest, runs = oldest_first(step, large), schedule(step, point.saved)
        total = sum(step.tensors[t].bytes for t in oldest)
        ways: list[tuple[list[int], int | None]] = [
            (in_time(step, runs, oldest, machine, int(b * total)), None) for b in BACKLOGS
        ]
        ways += [(_first(step, oldest, int(share * total)), n) for share in SHARES for n in IN_FLIGHT]
        for wanted, in_flight in ways if total else ():
            size = sum(step.tensors[t].bytes for t in wanted)
            waits = max(0.0, machine.copy_seconds(min(size, budget.host_bytes), "host") - ahead)
            if point.crossing - size > room or point.seconds + waits >= limit:
                continue
            off = away(step, point.saved, wanted, budget, machine, in_flight=in_flight, small=small, runs=runs)
            left = point.crossing - sum(step.tensors[t].bytes for t in off)
            yield Point(point.seconds + copying(step, runs, off, machine), left, point.saved, off)


def _first(step: Step, storages: Sequence[int], size: int) -> list[int]:
    """The first of them, of `size` bytes together."""
    before = itertools.accumulate((step.tensors[t].bytes for t in storages), initial=0)
    return [t for t, n in zip(storages, before, strict=False) if n < size]


def least_beside_others(step: Step, machine: Machine) -> frozenset[int]:
    """The set of the path with the least sum of its peak and what it carries from forward to backward: what other
    graphs of a larger step have to run beside.
    """
    points = sorted(step.once(path, machine, Greedy().points), key=lambda p: p.crossing)
    best: tuple[int, frozenset[int]] | None = None
    for point in points:
        if best is not None and step.base_bytes + 2 * point.crossing >= best[0]:  # a peak is at least what is carried
            break
        found = peak(step, point.saved) + point.crossing
        if best is None or found < best[0]:
            best = found, point.saved
    return best[1] if best else step.read_in_backward


def path(step: Step, machine: Machine, points: int) -> list[Point]:
    """Sets of storages to save, from the fastest to the slowest."""
    seconds = step.seconds(machine)
    roots = {t for i in step.once(needs_tangents) for t in step.ops[i].inputs} | set(step.backward.outputs)
    measured = (_measure(step, seconds, roots, saved) for saved in dict.fromkeys(_sets(step, machine, points)))
    return sorted((point for point in measured if point), key=in_order)


def in_order(point: Point) -> tuple[object, ...]:
    return point.seconds, point.crossing, sorted(point.saved), sorted(point.offloads)


def _sets(step: Step, machine: Machine, points: int) -> Iterator[frozenset[int]]:
    yield step.read_in_backward
    boundaries = frontiers(step)
    for every in (*(s for s in STRIDES if s <= len(boundaries)), len(boundaries) + 1):
        chosen = frozenset[int]().union(*boundaries[every - 1 :: every])
        yield saved_by(step, keep_only(step, chosen))
        yield from cuts(step, machine, chosen, points if every == 1 else points // 2)
    yield saved_by(step, SqrtN()(step, Budget(0), machine))
    for name, saved in step.saved_by:
        if name.startswith("torch"):
            yield frozenset(saved)


def _measure(step: Step, seconds: Sequence[float], roots: set[int], saved: Collection[int]) -> Point | None:
    """The point, less what backward never reads; None if an op would run twice that must not."""
    late = closure(step, roots & step.saveable, {*step.given, *saved})
    crossing = frozenset(roots.union(*(step.ops[i].inputs for i in late)).intersection(saved))
    ran = {*range(len(step.forward.ops)), *moved_ahead(step, crossing)}
    again = [i for i in late if i in ran]
    if any(step.ops[i].fixed for i in again):
        return None
    return Point(sum(seconds[i] for i in again), sum(step.tensors[t].bytes for t in crossing), crossing)
