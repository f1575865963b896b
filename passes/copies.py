"""Where the copies of offloaded storages start and end: the points that a decision leaves open, and all as moments.

In: a Step, the Runs of its graphs, an Offload per storage, a Machine. Out: the same Offloads with all points named.
What must hold: bytes follow from the points alone; the machine's bandwidth only chooses them. A copy to the host starts
when the storage is made and nothing that reads it in forward comes after its release; a copy back is there when the
first op of backward reads it. Copies of one direction run one after the other, in the order in which they start.

    forward    a            b    c          start after a; release at c: the copy is done by then
    backward        c'  b'       a'         reload before b': the copy is done when a' reads it

`in_flight`: how many copies of one direction may be under way, or waiting, at a time: with 0 the device waits for each
where it starts, which takes the least memory and the most time; None: as many as it takes for nobody to wait.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from memplan.ir import Machine, Offload, Run, Step

Runs = Sequence[Sequence[Run]]


class Copy(NamedTuple):
    """An offloaded storage's points as moments: on the device over [made, release] and [reload, last use]."""

    storage: int
    start: int
    release: int
    reload: int
    first_use: int


class _Gap(NamedTuple):
    """Between a storage's uses in forward and in backward: moments, and the bounds of what may be in between."""

    storage: int
    unit: int
    made: int
    last_forward: int
    end_forward: int
    start_backward: int
    first_backward: int


def placed(
    step: Step, runs: Runs, offloads: Mapping[int, Offload], machine: Machine, in_flight: int | None = None
) -> dict[int, Offload]:
    """The offloads with the points that are None filled in. One that backward never reads is left out."""
    at = _places(step, runs, "forward")
    gaps = _gaps(step, runs, offloads)
    starts = {gap.storage: at[gap.unit].get(offloads[gap.storage].start_after, gap.made) for gap in gaps}
    placer = _Placer(step, [run.op for own in runs for run in own], machine, in_flight)
    out = placer.out(gaps, offloads, starts)
    return placer.back(gaps, out)


def moments(step: Step, runs: Runs, offloads: Mapping[int, Offload]) -> list[Copy]:
    """Placed offloads as moments, in the order in which they are made. A point that names an op which does not run
    where it should is at -1.
    """
    ahead, behind = (_places(step, runs, phase) for phase in ("forward", "backward"))
    found = []
    for gap in _gaps(step, runs, offloads):
        d, unit = offloads[gap.storage], gap.unit
        points = (ahead[unit].get(d.start_after), ahead[unit].get(d.release_at), behind[unit].get(d.reload_at))
        start, release, reload = (-1 if p is None else p for p in points)
        found.append(Copy(gap.storage, start, release, reload, gap.first_backward))
    return found


def _places(step: Step, runs: Runs, phase: str) -> dict[int, dict[int | None, int]]:
    """Unit -> the moments of the ops that it runs in a phase."""
    out, moment = dict[int, dict[int | None, int]](), 0
    for graph, own in zip(step.graphs, runs, strict=True):
        for run in own:
            if graph.phase == phase:
                out.setdefault(graph.unit, {})[run.op] = moment
            moment += 1
    return out


def _gaps(step: Step, runs: Runs, offloads: Mapping[int, Offload]) -> list[_Gap]:
    """Of the storages that a forward graph makes and the backward graph of its unit reads, in the order made."""
    bounds, first = list[tuple[int, int]](), 0
    for own in runs:
        bounds.append((first, first + len(own) - 1))
        first += len(own)
    out, readers = list[tuple[_Gap, int]](), step.once(_readers)
    for k, (graph, own) in enumerate(zip(step.graphs, runs, strict=True)):
        behind = [b for b, g in enumerate(step.graphs) if g.phase == "backward" and g.unit == graph.unit]
        if graph.phase != "forward" or not behind:
            continue
        here, back = _moments_of(own, bounds[k][0]), bounds[behind[0]][0]
        later = [_moments_of(runs[b], bounds[b][0]) for b in behind]
        for t in offloads:
            maker, op = step.producer[t]
            users = readers.get(t, ())
            used = min((at[i] for at in later for i in users if i in at), default=None)
            if maker in here and used is not None:
                last = max([here[maker], *(here[i] for i in users if i in here)])
                gap = _Gap(t, graph.unit, here[maker], last, bounds[k][1], back, used)
                out.append((gap, op.outputs.index(t)))
    return [gap for gap, _ in sorted(out, key=lambda found: (found[0].made, found[1]))]


def _moments_of(runs: Sequence[Run], first: int) -> dict[int, int]:
    """Op -> the moment at which it runs in a graph that begins at `first`; none runs twice there."""
    return {run.op: moment for moment, run in enumerate(runs, first)}


def _readers(step: Step) -> dict[int, list[int]]:
    """Storage -> the ops that read it."""
    found = dict[int, list[int]]()
    for i, op in enumerate(step.ops):
        for t in op.inputs:
            found.setdefault(t, []).append(i)
    return found


class _Placer:
    """Chooses points by when each op ends if nothing waits: `ends`, for the ops in `order`."""

    def __init__(self, step: Step, order: Sequence[int], machine: Machine, in_flight: int | None) -> None:
        self.step, self.order, self.machine, self.in_flight = step, order, machine, in_flight
        self.ends = list(itertools.accumulate(map(step.seconds(machine).__getitem__, order)))

    def out(
        self, gaps: Sequence[_Gap], offloads: Mapping[int, Offload], starts: Mapping[int, int]
    ) -> dict[int, Offload]:
        """A copy that has started is released when it is done, as far as the machine can tell."""
        free, placed = 0.0, dict[int, Offload]()
        queue = sorted(gaps, key=lambda gap: starts[gap.storage])
        for k, gap in enumerate(queue):
            start, given = starts[gap.storage], offloads[gap.storage]
            free = max(free, self.ends[start]) + self._seconds(gap, given)
            release = bisect.bisect_left(self.ends, free)
            if self.in_flight is not None and k + self.in_flight < len(queue):
                release = min(release, starts[queue[k + self.in_flight].storage])
            release = min(max(release, gap.last_forward, start), gap.end_forward)
            start_after = self.order[start] if given.start_after is None else given.start_after
            release_at = self.order[release] if given.release_at is None else given.release_at
            placed[gap.storage] = replace(given, start_after=start_after, release_at=release_at)
        return placed

    def back(self, gaps: Sequence[_Gap], offloads: Mapping[int, Offload]) -> dict[int, Offload]:
        """A copy back starts as late as it can and still be there in time, and so can those after it."""
        placed, deadline = dict(offloads), math.inf
        queue = sorted(gaps, key=lambda gap: -gap.first_backward)
        for k, gap in enumerate(queue):
            given = placed[gap.storage]
            before = self.ends[gap.first_backward - 1]
            deadline = min(deadline, before) - self._seconds(gap, given)
            reload = bisect.bisect_right(self.ends, deadline)  # under way then: memory is there before it starts
            if self.in_flight is not None and k + self.in_flight < len(queue):
                reload = max(reload, queue[k + self.in_flight].first_backward)
            reload = min(max(reload, gap.start_backward), gap.first_backward)
            if given.reload_at is None:
                placed[gap.storage] = replace(given, reload_at=self.order[reload])
        return placed

    def _seconds(self, gap: _Gap, given: Offload) -> float:
        return self.machine.copy_seconds(self.step.tensors[gap.storage].bytes, given.tier)
