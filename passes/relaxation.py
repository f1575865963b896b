"""The linear program behind the bound: decisions as fractions, memory at some moments, and the bus.

In: what every plan needs (necessity.py), a Budget, a Machine. Out: a Program whose optimum no plan that fits beats.

    x = kept + away             of each storage that can cross: the fraction that does, on the device or off it
    again                       of each op: the fraction that runs again
    x + again(its maker) >= 1   for what backward reads, >= again(reader) for what runs again
    memory(moment) <= budget    at some moments: what the ops hold, + kept + away - copied out + copied back
    copied(moment)              grows by no more than the bus takes while ops run, and not before there is something

Moments are looked at where ops hold most, one in each of `MOMENTS` equal parts of the time: fewer rows bound less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from memplan.ir import Budget, Machine, Step
from memplan.passes.linear import Program, Solution
from memplan.passes.necessity import Necessity, Use

MOMENTS = 192


class Relaxation:
    """Bytes count in `unit`, times in `second`, so that numbers are near 1."""

    def __init__(self, step: Step, budget: Budget, machine: Machine, needs: Necessity) -> None:
        self.step, self.budget, self.machine, self.needs = step, budget, machine, needs
        self.order, self.uses = needs.order, needs.uses
        seconds = [0.0 if step.ops[i].fetches else machine.seconds(step.ops[i]) for i in self.order]
        self.second = max(sum(seconds), 1e-30) / 100
        self.times = np.array(seconds) / self.second
        self.late = sum(machine.seconds(step.ops[i]) for i in needs.either) / self.second
        self.unit = max(1.0, sum(step.tensors[t].bytes for t in self.uses) / 32)
        self.rate = self.second / machine.copy_seconds(1, "host") / self.unit
        self.lp = Program()
        self.carried = dict[int, tuple[int, ...]]()  # row of the bus -> what is copied up to its moment, and before it
        self.size = {t: step.tensors[t].bytes / self.unit for t in self.uses}
        share = 2 * self.unit * machine.contention / machine.bandwidth / self.second
        self.share = {t: share * size for t, size in self.size.items()}
        self.kept = {t: self.lp.variable(1) for t in self.uses}
        movable = step.offloadable if budget.host_bytes else frozenset()
        self.away = {t: self.lp.variable(1, cost=self.share[t]) for t in self.uses if t in movable}
        makers = sorted({step.producer[t][0] for t in self.uses})
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

    def recomputation(self) -> None:
        """What backward reads crosses or is made again, and so is what that reads."""
        for t in sorted(self.needs.wanted):
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

    def memory(self) -> dict[int, int]:
        """The rows of memory, by moment, and those of the bus."""
        held, moments = self.needs.held, self._moments()
        stays = [t for t, use in self.uses.items() if not use.returned and t not in self.needs.nothing]
        inside = self._running(moments, stays, lambda t: self._crosses(t, self.size[t]), lambda u: (u.left, u.last))
        room = (self.budget.available - self.step.base_bytes) / self.unit
        out, back = self._bus(moments) if self.away else ([], [])
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

    def _moments(self) -> list[int]:
        held = self.needs.held
        clock = np.cumsum(self.times)
        if not len(clock):
            return []
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
        over: Callable[[Use], tuple[int, int]],
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

    def _bus(self, moments: Sequence[int]) -> tuple[list[int], list[int]]:
        """Variables for what has been copied out, and back, up to each moment."""
        lp = self.lp
        made = self._running(moments, list(self.away), self._leaves, lambda u: (u.made - 1, u.end))
        due = self._running(moments, list(self.away), self._leaves, lambda u: (u.needed - 1, u.end))
        clock, out, back = np.cumsum(self.times), list[int](), list[int]()
        ahead, behind = list[tuple[int, float]](), list[tuple[int, float]]()  # time beside the ops that always run
        start = min((use.back for use in self.uses.values()), default=0)
        for q, m in enumerate(moments):
            waits, more = lp.variable(cost=1.0), lp.variable()
            (behind if m >= start else ahead).append((more, 1.0))
            passed = float(clock[m] - (clock[moments[q - 1]] if q else 0.0))
            for copied in (out, back):
                before = [(copied[-1], -1.0)] if copied else []
                copied.append(lp.variable())
                # What leaves has left when its forward graph lp.
                rate = self.rate if copied is back or self.order[m] < len(self.step.forward.ops) else 0.0
                row = lp.row([(copied[-1], 1.0), *before, (waits, -rate), (more, -rate)], high=rate * passed)
                self.carried[row] = (copied[-1], *(v for v, _ in before))
                if before:
                    lp.row([(copied[-1], 1.0), *before], low=0)
            lp.row([(made[q], 1.0), (out[q], -1.0)], low=0)
            lp.row([(back[q], 1.0), (due[q], -1.0)], low=0)
            lp.row([(out[q], 1.0), (back[q], -1.0)], low=0, high=self.budget.host_bytes / self.unit)
        copies = [(v, -self.share[t]) for t, v in self.away.items()]
        again = [(v, -self._seconds(i)) for i, v in self.again.items()]
        lp.row([*ahead, *copies, *self._moved_ahead()], high=0)
        lp.row([*ahead, *behind, *copies, *again], high=self.late)
        return out, back

    def faster_bus(self, found: Solution) -> float:
        """What the optimum's slopes say that a bus twice as fast takes off its cost: each row carries as much again."""
        values, slopes = found.values, found.slopes
        copied = ((row, values[now] - sum(values[v] for v in before)) for row, (now, *before) in self.carried.items())
        return float(-sum(slopes[row] * more for row, more in copied))

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
