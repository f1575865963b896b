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
    gaps = {gap.storage: gap for gap in _gaps(step, runs, offloads)}
    order = [run.op for own in runs for run in own]
    ends = _ends(step, order, machine)
    at = _places(step, runs, "forward")
    starts = {t: at[gap.unit].get(offloads[t].start_after, gap.made) for t, gap in gaps.items()}
    out = _out(step, gaps, offloads, starts, order, ends, machine, in_flight)
    return _back(step, gaps, out, order, ends, machine, in_flight)


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
    out = []
    for k, (graph, own) in enumerate(zip(step.graphs, runs, strict=True)):
        behind = [b for b, g in enumerate(step.graphs) if g.phase == "backward" and g.unit == graph.unit]
        if graph.phase != "forward" or not behind:
            continue
        made, last, (start, end) = dict[int, int](), dict[int, int](), bounds[k]
        for moment, run in enumerate(own, start):
            op = step.ops[run.op]
            made.update((t, moment) for t in op.outputs if t in offloads)
            last.update((t, moment) for t in (*op.inputs, *op.outputs) if t in made)
        first_use = dict[int, int]()
        for b in behind:
            for moment, run in enumerate(runs[b], bounds[b][0]):
                for t in step.ops[run.op].inputs:
                    first_use.setdefault(t, moment)
        back = bounds[behind[0]][0]
        out += [_Gap(t, graph.unit, made[t], last[t], end, back, first_use[t]) for t in made if t in first_use]
    return sorted(out, key=lambda gap: gap.made)


def _ends(step: Step, order: Sequence[int], machine: Machine) -> list[float]:
    """When each moment ends if nothing waits."""
    clock, ends = 0.0, []
    for i in order:
        clock += machine.seconds(step.ops[i])
        ends.append(clock)
    return ends


def _out(
    step: Step,
    gaps: Mapping[int, _Gap],
    offloads: Mapping[int, Offload],
    starts: Mapping[int, int],
    order: Sequence[int],
    ends: Sequence[float],
    machine: Machine,
    in_flight: int | None,
) -> dict[int, Offload]:
    """Each copy starts when its storage is made, and is released when it is done, as far as the machine can tell."""
    free, out = 0.0, dict[int, Offload]()
    queue = sorted(gaps.values(), key=lambda gap: starts[gap.storage])
    for k, gap in enumerate(queue):
        t, start = gap.storage, starts[gap.storage]
        given = offloads[t]
        free = max(free, ends[start]) + machine.copy_seconds(step.tensors[t].bytes, given.tier)
        release = bisect.bisect_left(ends, free)
        if in_flight is not None and k + in_flight < len(queue):
            release = min(release, starts[queue[k + in_flight].storage])
        release = min(max(release, gap.last_forward, start), gap.end_forward)
        out[t] = replace(
            given,
            start_after=order[start] if given.start_after is None else given.start_after,
            release_at=order[release] if given.release_at is None else given.release_at,
        )
    return out


def _back(
    step: Step,
    gaps: Mapping[int, _Gap],
    offloads: Mapping[int, Offload],
    order: Sequence[int],
    ends: Sequence[float],
    machine: Machine,
    in_flight: int | None,
) -> dict[int, Offload]:
    """Each copy back starts as late as it can and still be there in time, and so can those after it."""
    out = dict(offloads)
    late = sorted(gaps.values(), key=lambda gap: -gap.first_backward)
    deadline = float("inf")
    for k, gap in enumerate(late):
        t = gap.storage
        before = ends[gap.first_backward - 1] if gap.first_backward else 0.0
        deadline = min(deadline, before) - machine.copy_seconds(step.tensors[t].bytes, out[t].tier)
        reload = bisect.bisect_right(ends, deadline)  # the moment under way then: memory is there before it starts
        if in_flight is not None:
            reload = max(reload, late[k + in_flight].first_backward if k + in_flight < len(late) else 0)
        reload = min(max(reload, gap.start_backward), gap.first_backward)
        if out[t].reload_at is None:
            out[t] = replace(out[t], reload_at=order[reload])
    return out
