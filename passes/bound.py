"""How fast can any plan be? A lower bound on the time of a step inside a budget, from a linear program.

In: a Step, a Budget, a Machine. Out: a Bound: no plan of the class that fits takes less.
The class: the step's own order of ops, each run again at most once, whole storages kept, copied to the host and back
or made again, durations by the machine. Left out is what only makes plans slower or larger (memory of what runs again,
copies that wait behind a release), and decisions may be fractions; so what the bound says holds for every plan, with
policies of any kind, and an infeasible program proves that nothing fits.

    x = kept + away             of each storage that can cross: the fraction that does, on the device or off it
    again                       of each op: the fraction that runs again
    x + again(its maker) >= 1   for what backward reads, >= again(reader) for what runs again
    memory(moment) <= budget    at some moments: what the ops hold, + kept + away - copied out + copied back
    copied(moment)              grows by no more than the bus takes while ops run, and not before there is something

Moments are looked at where ops hold most, one in each of `MOMENTS` equal parts of the time: fewer rows bound less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.ir import Bound, Budget, Machine, Step
from memplan.passes.linear import Program
from memplan.passes.schedule import closure, needs_tangents

MOMENTS = 192
SLACK = 1e-6  # of the time: what a solver's tolerances may be worth


def bound(step: Step, budget: Budget, machine: Machine) -> Bound:
    """The least time of any plan that fits. Seconds are infinite if there is none."""
    order = _order(step)
    uses = _uses(step, order)
    times = np.array([0.0 if step.ops[i].fetches else machine.seconds(step.ops[i]) for i in order])
    needed = {t for i in needs_tangents(step) for t in step.ops[i].inputs} | set(step.backward.outputs)
    # A backward op without a tangent runs in either direction, but runs, if something needs it.
    ahead = {t for op in step.forward.ops for t in op.outputs}
    once = closure(step, needed & step.saveable, ahead | step.given)
    late = sum(machine.seconds(step.ops[i]) for i in once)
    program = _Relaxation(step, budget, machine, order, uses, times)
    program.recomputation(needed)
    rows = program.memory(_held(step, order, uses), late)
    found = program.lp.relaxed()
    base = float(times.sum()) + late
    if found is None:
        return Bound(math.inf)
    slopes = {m: found.slopes[row] * program.second / program.unit for m, row in rows.items()}
    binding = min(slopes, key=lambda m: (slopes[m], m), default=0)
    return Bound(
        base + max(0.0, found.cost * program.second - SLACK * base),
        per_byte=max(0.0, -sum(slopes.values())),
        at=step.ops[order[binding]].name if slopes and slopes[binding] < 0 else "",
    )


def _order(step: Step) -> list[int]:
    """The ops that every plan runs, in order: all of forward, and what needs a tangent."""
    late = set(needs_tangents(step))
    return [
        i for g, span in zip(step.graphs, step.spans, strict=True) for i in span if g.phase == "forward" or i in late
    ]


@dataclass(frozen=True)
class _Use:
    """Of a storage that can cross, as moments: where it is made, where forward needs it last, whether forward returns
    it, where backward reads it for certain, and when backward begins.
    """

    made: int
    left: int
    returned: bool
    reads: tuple[int, ...]
    back: int
    end: int

    @property
    def needed(self) -> int:
        """When a copy has to be there again."""
        return min(self.reads, default=self.end)

    @property
    def last(self) -> int:
        """Up to when it is there if it is kept: what only reads it again may do so when backward begins."""
        return max(self.reads, default=self.back)


def _uses(step: Step, order: Sequence[int]) -> dict[int, _Use]:
    first, count = len(step.forward.ops), len(order)
    made, left, reads = dict[int, int](), dict[int, int](), dict[int, list[int]]()
    for m, i in enumerate(order):
        op = step.ops[i]
        if i < first:
            made.update((t, m) for t in op.outputs if t in step.saveable)
            left.update((t, m) for t in (*op.outputs, *op.inputs) if t in made and _certain(step, i))
            left.update((t, max(left.get(t, 0), m)) for t in op.outputs if t in made)
        else:
            for t in op.inputs:
                if t in step.saveable and _certain(step, i):
                    reads.setdefault(t, []).append(m)
    starts, begins = [m for m, i in enumerate(order) if i >= first], _begins(step, order)
    returned = set(step.forward.outputs)
    for t in step.backward.outputs:
        reads.setdefault(t, []).append(count)
    out = {}
    for t in sorted(step.saveable):
        # What backward makes without a tangent is made in forward if it crosses, at a moment that is not known.
        at = made.get(t, 0)
        back = next((m for m in starts if m > at), count) if t in made else begins[step.producer[t][0]]
        out[t] = _Use(at, left.get(t, back - 1), t in returned, tuple(reads.get(t, ())), back, count)
    return out


def _begins(step: Step, order: Sequence[int]) -> dict[int, int]:
    """Op -> the moment at which its graph begins."""
    out, ran, moment = dict[int, int](), set(order), 0
    for span in step.spans:
        out.update(dict.fromkeys(span, moment))
        moment += len(ran.intersection(span))
    return out


def _certain(step: Step, op: int) -> bool:
    """Whether what it reads is in memory when it runs: a fused op may read it later, or read what it was made from."""
    return not step.fused or step.ops[op].fusion == "extern"


def _for_nothing(step: Step, order: Sequence[int]) -> set[int]:
    """Storages that backward may read to no end: no generated code does, so that they may be gone by then."""
    if not step.fused:
        return set()
    wanted, useless = {*step.backward.outputs, *step.between}, set[int]()
    for i in reversed(order):
        op = step.ops[i]
        if i < len(step.forward.ops):
            continue
        if op.fusion == "extern" or not wanted.isdisjoint(op.outputs):
            wanted.update(op.inputs)
        else:
            useless.update(op.inputs)
    for op in reversed(step.ops):
        if not useless.isdisjoint(op.outputs):
            useless.update(op.inputs)
    return useless


def _held(step: Step, order: Sequence[int], uses: Mapping[int, _Use]) -> NDArray[np.float64]:
    """Bytes that are there at each moment whatever is decided: what an op works on, and what runs on with it."""
    change, here = np.zeros(len(order) + 1), np.zeros(len(order))
    start, end = dict[int, int](), dict[int, int]()
    for m, i in enumerate(order):
        op = step.ops[i]
        here[m] += op.workspace_bytes
        if not step.fused or op.fusion == "extern":
            start.update((t, start.get(t, m)) for t in op.outputs)
            end.update((t, m) for t in (*op.outputs, *op.inputs))
    for t, use in uses.items():
        for m in use.reads if not use.returned else ():
            if m < len(order):
                here[m] += step.tensors[t].bytes
    results = {*step.forward.outputs, *step.backward.outputs}
    for t in start.keys() - set(step.resident):
        until = end[t] + 1
        if t in uses:
            until = len(order) if uses[t].returned else uses[t].left + 1
        elif t in results:
            until = len(order)
        change[start[t]] += step.tensors[t].bytes
        change[until] -= step.tensors[t].bytes
    return np.cumsum(change)[:-1] + here


class _Relaxation:
    """The program of the module's docstring. Bytes count in `unit`, times in `second`, so that numbers are near 1."""

    def __init__(
        self,
        step: Step,
        budget: Budget,
        machine: Machine,
        order: Sequence[int],
        uses: Mapping[int, _Use],
        times: NDArray[np.float64],
    ) -> None:
        self.step, self.budget, self.machine = step, budget, machine
        self.order, self.uses, self.times = order, uses, times
        self.unit = max(1.0, sum(step.tensors[t].bytes for t in uses) / 32)
        self.second = max(float(times.sum()), 1e-30) / 100
        self.rate = self.second / machine.copy_seconds(1, "host") / self.unit
        self.lp = Program()
        self.size = {t: step.tensors[t].bytes / self.unit for t in uses}
        share = 2 * self.unit * machine.contention / machine.bandwidth / self.second
        self.share = {t: share * size for t, size in self.size.items()}
        self.kept = {t: self.lp.variable(1) for t in uses}
        movable = step.offloadable if budget.host_bytes else frozenset()
        self.away = {t: self.lp.variable(1, cost=self.share[t]) for t in uses if t in movable}
        makers = sorted({step.producer[t][0] for t in uses})
        first = len(step.forward.ops)
        self.again = {  # a backward op without a tangent may always run in backward, at no further cost
            i: self.lp.variable(1, cost=self._seconds(i) if i < first else 0.0)
            for i in makers
            if not step.ops[i].fixed or i >= first
        }

    def _seconds(self, op: int) -> float:
        run = self.step.ops[op]
        return 0.0 if run.fetches else self.machine.seconds(run) / self.second

    def _crosses(self, t: int, weight: float) -> list[tuple[int, float]]:
        return [(of[t], weight) for of in (self.kept, self.away) if t in of]

    def recomputation(self, needed: set[int]) -> None:
        """What backward reads crosses or is made again, and so is what that reads."""
        for t in sorted(needed & self.uses.keys()):
            self.lp.row(self._there(t), low=1)
        for i, variable in self.again.items():
            for t in self.step.ops[i].inputs:
                if t in self.uses:
                    self.lp.row([*self._there(t), (variable, -1)], low=0)
        for t in self.away:
            self.lp.row(self._crosses(t, 1), high=1)

    def _there(self, t: int) -> list[tuple[int, float]]:
        maker = self.step.producer[t][0]
        return [*self._crosses(t, 1), *([(self.again[maker], 1.0)] if maker in self.again else [])]

    def memory(self, held: NDArray[np.float64], late: float) -> dict[int, int]:
        """The rows of memory, by moment, and those of the bus."""
        moments = self._moments(held)
        nothing = _for_nothing(self.step, self.order)
        stays = [t for t, use in self.uses.items() if not use.returned and t not in nothing]
        inside = self._running(moments, stays, lambda t: self._crosses(t, self.size[t]), lambda u: (u.left, u.last))
        room = (self.budget.available - self.step.base_bytes) / self.unit
        out, back = self._bus(moments, late) if self.away else ([], [])
        rows = {}
        for q, m in enumerate(moments):
            terms = [(inside[q], 1.0)]
            terms += [(v[q], sign) for v, sign in ((out, -1.0), (back, 1.0)) if v]
            op = self.step.ops[self.order[m]]
            for t in {*op.inputs, *op.outputs} & self.uses.keys():  # among what is held
                if m in self.uses[t].reads and not self.uses[t].returned:
                    terms += self._crosses(t, -self.size[t])
            rows[m] = self.lp.row(terms, high=room - held[m] / self.unit)
        return rows

    def _moments(self, held: NDArray[np.float64]) -> list[int]:
        clock = np.cumsum(self.times)
        part = np.minimum(clock / max(clock[-1], 1e-30) * MOMENTS, MOMENTS - 1).astype(int)
        most = {int(p): int(np.flatnonzero(part == p)[np.argmax(held[part == p])]) for p in np.unique(part)}
        # All that crosses is there when forward ends, and what backward made ahead when backward begins.
        turns = {m for use in self.uses.values() for m in (use.back - 1, use.back) if 0 <= m < len(clock)}
        return sorted({*most.values(), *turns, int(np.argmax(held))})

    def _running(
        self,
        moments: Sequence[int],
        storages: Sequence[int],
        terms: Callable[[int], list[tuple[int, float]]],
        over: Callable[[_Use], tuple[int, int]],
    ) -> list[int]:
        """For each moment a variable: the sum of the terms of the storages that are `over` it: after the first and up
        to the second of their moments.
        """
        change = [list[tuple[int, float]]() for _ in moments]
        for t in storages:
            first, last = over(self.uses[t])
            enters, leaves = np.searchsorted(moments, [first, last], side="right")
            if enters < leaves:
                change[enters] += terms(t)
                if leaves < len(moments):
                    change[leaves] += [(v, -c) for v, c in terms(t)]
        found = list[int]()
        for new in change:
            before = [(found[-1], 1.0)] if found else []
            found.append(self.lp.variable())
            self.lp.row([*before, *new, (found[-1], -1.0)], low=0, high=0)
        return found

    def _bus(self, moments: Sequence[int], late: float) -> tuple[list[int], list[int]]:
        """Variables for what has been copied out, and back, up to each moment."""
        ends = self.lp
        made = self._running(moments, list(self.away), self._leaves, lambda u: (u.made - 1, u.end))
        due = self._running(moments, list(self.away), self._leaves, lambda u: (u.needed - 1, u.end))
        clock, out, back = np.cumsum(self.times) / self.second, list[int](), list[int]()
        ahead, behind = list[tuple[int, float]](), list[tuple[int, float]]()  # time beside the ops that always run
        start = min((use.back for use in self.uses.values()), default=0)
        for q, m in enumerate(moments):
            waits, more = ends.variable(cost=1.0), ends.variable()
            (behind if m >= start else ahead).append((more, 1.0))
            passed = float(clock[m] - (clock[moments[q - 1]] if q else 0.0))
            for copied in (out, back):
                before = [(copied[-1], -1.0)] if copied else []
                copied.append(ends.variable())
                # What leaves has left when its forward graph ends.
                rate = self.rate if copied is back or self.order[m] < len(self.step.forward.ops) else 0.0
                ends.row([(copied[-1], 1.0), *before, (waits, -rate), (more, -rate)], high=rate * passed)
                if before:
                    ends.row([(copied[-1], 1.0), *before], low=0)
            ends.row([(made[q], 1.0), (out[q], -1.0)], low=0)
            ends.row([(back[q], 1.0), (due[q], -1.0)], low=0)
            ends.row([(out[q], 1.0), (back[q], -1.0)], low=0, high=self.budget.host_bytes / self.unit)
        copies = [(v, -self.share[t]) for t, v in self.away.items()]
        again = [(v, -self._seconds(i)) for i, v in self.again.items()]
        ends.row([*ahead, *copies, *self._moved_ahead()], high=0)
        ends.row([*ahead, *behind, *copies, *again], high=late / self.second)
        return out, back

    def _moved_ahead(self) -> list[tuple[int, float]]:
        """Time of backward's ops that run in forward, negative: those whose results cross, and what these need."""
        first = len(self.step.forward.ops)
        ahead = {i: self.lp.variable(1) for i in self.again if i >= first}
        readers: dict[int, list[int]] = {}
        for i in ahead:
            for t in self.step.ops[i].inputs:
                readers.setdefault(t, []).append(i)
        for i, variable in ahead.items():
            wanted = [term for t in self.step.ops[i].outputs if t in self.uses for term in self._crosses(t, 1)]
            wanted += [(ahead[j], 1) for t in self.step.ops[i].outputs for j in readers.get(t, ())]
            self.lp.row([*wanted, (variable, -1)], low=0)
        return [(v, -self._seconds(i)) for i, v in ahead.items()]

    def _leaves(self, t: int) -> list[tuple[int, float]]:
        return [(self.away[t], self.size[t])]
