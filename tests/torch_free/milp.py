"""The best plan of a step as an integer program: what planners and bounds are judged by where enumeration ends.

In: a Step of up to about 100 ops that no compiler fuses, a Budget, a Machine. Out: a Found: decisions, and the time of
the best plan of the class that keeps each storage or makes it again. The class is the planner's: the step's own order,
each op run again at most once, as late as it is needed. What must hold: bytes and seconds are the simulator's, to the
byte; so a solution, simulated, is what the program says of it. It shares with the planner the matrix that Program
builds, and with the simulator the order in which ops of backward run ahead.

    crosses[t]            whether a storage crosses: all that is decided; the rest follows, and need not be whole
    ahead[e]              whether an op of backward without a tangent runs in forward: what it makes crosses
    runs[i, slot]         whether op i runs in the slot before an op of backward: what is made of it is read there, and
                          is not there: of what crosses or was made before nothing runs again
    alive[t, between]     backwards from each read to where it was made last; bytes at each moment <= budget

Memory at a moment whose op does not run is part of what is alive before and after it, so its row asks for nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from memplan.ir import Budget, Machine, Offload, Step
from memplan.passes.linear import Program
from memplan.passes.schedule import closure, needs_tangents, schedule


class Moment(NamedTuple):
    """`runs`: the variable that says whether the op runs here; `slot`: of a graph, counted through all; -1: forward."""

    op: int
    runs: int
    graph: int
    slot: int = -1


class Found(NamedTuple):
    """`seconds` of the step; `least`: no plan of the class takes less, equal where the search ended by itself."""

    saved: frozenset[int]
    seconds: float
    least: float
    values: NDArray[np.float64]


class Whole(Program):
    """A Program whose whole variables are whole."""

    def best(self, limit: float = math.inf) -> tuple[NDArray[np.float64], float, float] | None:
        """Values, their cost, and what no solution costs less than, after `limit` seconds at most; None: there is no
        solution. Raises TimeoutError where none was found in time.
        """
        options: dict[str, float] = {"mip_rel_gap": 1e-7} | ({"time_limit": limit} if limit < math.inf else {})
        with _quiet():
            found = milp(
                self.cost,
                integrality=np.array(self.whole, dtype=int),
                bounds=Bounds(self.lower, self.upper),
                constraints=LinearConstraint(self._matrix(), self.low, self.high),
                options=options,
            )
        if found.status == 2:
            return None
        if found.x is None:
            raise TimeoutError(found.message)
        return found.x, float(found.fun), float(found.mip_dual_bound)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS writes to the process's stdout at times, past Python's."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


class Kept(Whole):
    """The program of plans that keep or make again. Bytes count in `unit`, seconds in `second`: numbers are near 1."""

    def __init__(self, step: Step, budget: Budget, machine: Machine) -> None:
        super().__init__()
        assert not step.fused and not any(op.fetches for op in step.ops)
        self.step, self.budget, self.machine = step, budget, machine
        self.first = len(step.forward.ops)
        self.late = set(needs_tangents(step))
        self.second = max(sum(map(machine.seconds, step.ops)), 1e-30) / 100
        self.unit = max(1.0, sum(tensor.bytes for tensor in step.tensors) / 32)
        self.one = self.variable(1)
        self.lower[self.one] = 1.0
        self.crosses = {t: self.variable(1, whole=True) for t in sorted(step.saveable)}
        self.ran = dict[int, int]()  # op -> the variable that says whether it has run in backward by now
        self.moments = list[Moment]()
        self.order()
        self.change: list[list[tuple[int, float]]] = [[] for _ in range(len(self.moments) + 1)]
        self.memory()

    def solved(self, limit: float = math.inf) -> Found | None:
        """The best plan; None: none fits."""
        found = self.best(limit)
        if found is None:
            return None
        values, cost, least = found
        saved = frozenset(t for t, v in self.crosses.items() if values[v] > 0.5)
        return Found(saved, cost * self.second, least * self.second, values)

    # The order of execution.

    def order(self) -> None:
        """Every moment at which an op can run, whatever is decided, in order."""
        step = self.step
        self.ahead = {i: self.variable(1, cost=self.seconds(i)) for i in range(self.first, len(step.ops))}
        for i in self.late:
            del self.ahead[i]
        for e, variable in self.ahead.items():
            made = [t for t in step.ops[e].outputs if t in self.crosses]
            reasons = [self.crosses[t] for t in made]
            reasons += [v for i, v in self.ahead.items() if not set(made).isdisjoint(step.ops[i].inputs)]
            self.any_of(variable, reasons)
        slot = 0
        for g, (graph, own) in enumerate(zip(step.graphs, schedule(step, step.saveable), strict=True)):
            if graph.phase == "forward":
                self.moments += [Moment(run.op, self.ahead.get(run.op, self.one), g) for run in own]
                continue
            for i in sorted(self.late.intersection(step.spans[g])):
                self.slot(g, slot, step.ops[i].inputs)
                self.moments.append(Moment(i, self.one, g, slot))
                slot += 1
            self.slot(g, slot, sorted(graph.outputs))
            slot += 1
        self.cost[self.one] = sum(self.seconds(i) for i in (*range(self.first), *self.late))
        for e, variable in self.ahead.items():
            if step.ops[e].fixed and e in self.ran:
                self.row([(variable, 1), (self.ran[e], 1)], high=1)

    def slot(self, graph: int, slot: int, wanted: Iterable[int]) -> None:
        """What runs before an op that reads `wanted`: each op that makes what is not there, and no other."""
        step, wanted = self.step, set(wanted)
        known = step.given | step.late
        candidates = closure(step, wanted, known)
        runs = {}
        for i in candidates:
            again = self.variable(0 if step.ops[i].fixed and i < self.first else 1, cost=self.seconds(i))
            before, now = self.ran.get(i), self.variable(1)
            self.row([(now, 1), (again, -1), *([(before, -1.0)] if before is not None else [])], low=0, high=0)
            runs[i], self.ran[i] = again, now
        for t in sorted(wanted & self.crosses.keys()):
            self.row([(self.ran[step.producer[t][0]], 1), (self.crosses[t], 1)], low=1)
        for i in candidates:
            for t in step.ops[i].inputs:
                if t in self.crosses:
                    self.row([(self.ran[step.producer[t][0]], 1), (self.crosses[t], 1), (self.ran[i], -1)], low=0)
        for i in candidates:
            self.row([(runs[i], -1), *self.reasons(i, wanted, runs)], low=0)
        self.moments += [Moment(i, runs[i], graph, slot) for i in candidates]

    def reasons(self, op: int, wanted: Iterable[int], runs: dict[int, int]) -> list[tuple[int, float]]:
        """At least 1 in sum where the op has to run in this slot, 0 where it must not."""
        terms = list[tuple[int, float]]()
        for t in self.step.ops[op].outputs:
            if t not in self.crosses:
                continue
            readers = [runs[i] for i in runs if t in self.step.ops[i].inputs] + ([self.one] if t in wanted else [])
            terms += [(self.both_but(v, self.crosses[t]), 1.0) for v in readers]
        return terms

    def both_but(self, yes: int, no: int) -> int:
        """A variable: at most whether the first is 1 and the second is not."""
        both = self.variable(1)
        self.row([(both, 1), (yes, -1)], high=0)
        self.row([(both, 1), (no, 1)], high=1)
        return both

    def any_of(self, variable: int, reasons: Sequence[int]) -> None:
        for reason in reasons:
            self.row([(variable, 1), (reason, -1)], low=0)
        self.row([(variable, -1), *((reason, 1) for reason in reasons)], low=0)

    def seconds(self, op: int) -> float:
        return self.machine.seconds(self.step.ops[op]) / self.second

    # Memory.

    def memory(self) -> None:
        """Bytes at every moment, inside the budget."""
        reads, makes = self.events()
        for t in sorted({*reads, *makes} - set(self.step.resident)):
            self.lives(t, reads.get(t, {}), makes.get(t, {}))
        self.inside()
        # Bytes are whole: half a byte more lets nothing in. HiGHS's presolve loses plans that fill a room to the byte.
        room = (self.budget.available + 0.5 - self.step.base_bytes) / self.unit
        before: int | None = None
        for change in self.change[:-1]:
            now = self.variable(room)
            self.row([(now, 1), *([(before, -1.0)] if before is not None else []), *_minus(change)], low=0, high=0)
            before = now

    def events(self) -> tuple[dict[int, dict[int, int]], dict[int, dict[int, int]]]:
        """storage -> moment -> the variable that says whether it is read, or made, there."""
        step = self.step
        reads, makes = dict[int, dict[int, int]](), dict[int, dict[int, int]]()
        for m, moment in enumerate(self.moments):
            op = step.ops[moment.op]
            for t in op.inputs:
                reads.setdefault(t, {})[m] = moment.runs
            for t in op.outputs:
                makes.setdefault(t, {})[m] = moment.runs
        for g, graph in enumerate(step.graphs):  # what its caller holds while it runs
            own = [(m, moment.runs) for m, moment in enumerate(self.moments) if moment.graph == g]
            last = max((k for k, (_, v) in enumerate(own) if v == self.one), default=0)
            for t in graph.inputs:
                reads.setdefault(t, {}).update(own[last:])
                if own and t in step.producer:  # up to where it begins, even if nothing runs there
                    reads[t][own[0][0] - 1] = self.one
        for t in step.backward.outputs:
            reads.setdefault(t, {})[len(self.moments)] = self.one
        return reads, makes

    def lives(self, t: int, reads: dict[int, int], makes: dict[int, int]) -> None:
        """From where it is made to where it is read last. A result of forward is held, and may be made again beside."""
        step, size = self.step, self.step.tensors[t].bytes / self.unit
        held, moments = t in step.forward.outputs, len(self.moments)
        if held:
            begin = min(makes)
            self.occupies(self.one, size, begin, moments)
            start = next((m for m, moment in enumerate(self.moments) if moment.slot >= 0), moments)
            if t not in self.crosses:
                return
            reads = {m: self.both_at_least(v, self.crosses[t]) for m, v in reads.items() if m >= start}
            makes = {m: v for m, v in makes.items() if m > begin}
        first = min(makes, default=min((m for m, x in enumerate(self.moments) if self.reads_from(x, t)), default=0))
        after, until = None, moments
        for m in sorted({*reads, *makes}, reverse=True):
            alive = self.variable(1)
            if after is not None:
                self.occupies(after, size, m + 1, until)
                self.row([(alive, 1), (after, -1)], low=0)
            if m in reads:
                self.row([(alive, 1), (reads[m], -1)], low=0)
            after, until = alive, m + 1
            if m in makes and (m != first or held):
                after, until = self.made_again(t, m, makes[m], alive, size), m
            elif m in makes:
                self.row([(alive, 1), (makes[m], -1)], low=0)
        if after is not None and not held:
            self.occupies(after, size, first, until)

    def reads_from(self, moment: Moment, t: int) -> bool:
        """Whether it is in a graph that is given the storage."""
        return t in self.step.graphs[moment.graph].inputs

    def made_again(self, t: int, m: int, runs: int, alive: int, size: float) -> int:
        """Whether it is alive before an op that may make it again: what crosses stays, and is made for nothing."""
        if t not in self.crosses:
            new = None
        else:
            new = runs if len(self.step.ops[self.moments[m].op].outputs) == 1 else self.both_but(runs, self.crosses[t])
        self.occupies(alive, size, m, m + 1)
        if new != runs:
            self.change[m] += [(runs, size)]
            self.change[m + 1] += [(runs, -size)]
        before = self.variable(1)
        if new is None:
            self.row([(before, 1), (alive, -1)], low=0)
        else:
            if new != runs:
                self.change[m] += [(new, -size)]
                self.change[m + 1] += [(new, size)]
            self.row([(alive, 1), (new, -1)], low=0)
            self.row([(before, 1), (alive, -1), (new, 1)], low=0)
        return before

    def both_at_least(self, yes: int, no: int) -> int:
        """A variable: at least whether the first is 1 and the second is not."""
        both = self.variable(1)
        self.row([(both, 1), (yes, -1), (no, 1)], low=0)
        return both

    def occupies(self, variable: int, size: float, begin: int, end: int) -> None:
        """So many bytes over the moments [begin, end) where the variable is 1."""
        if size and begin < end:
            self.change[begin].append((variable, size))
            self.change[min(end, len(self.moments))].append((variable, -size))

    def inside(self) -> None:
        """Workspaces, and the generator states that what runs again waits for, with the one that is put back."""
        begun = dict[int, int]()
        for m, moment in enumerate(self.moments):
            op = self.step.ops[moment.op]
            self.occupies(moment.runs, op.workspace_bytes / self.unit, m, m + 1)
            if not op.rng_bytes:
                continue
            if moment.slot >= 0 and moment.op in begun:
                again = moment.runs
                if moment.op in self.ahead:  # the second run, if the first was ahead
                    again = self.variable(1)
                    self.row([(again, 1), (moment.runs, -1), (self.ahead[moment.op], -1)], low=-1)
                self.occupies(again, op.rng_bytes / self.unit, begun[moment.op], m + 1)
                self.occupies(again, op.rng_bytes / self.unit, m, m + 1)
            begun.setdefault(moment.op, m)


def _minus(terms: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(v, -c) for v, c in terms]


class Moved(Kept):
    """The program of plans that keep, make again, or copy to the host and back, of a step of one forward and one
    backward graph. No plan takes less than its optimum, wherever the copies' points are; but not all that it promises
    can be had: copies may share the bus, come back between two ops of backward, and what only runs again reads them
    without waiting. So a plan that is simulated stands beside it, and says how near the optimum is.

        gone[t, moment]     whether it is off the device: from its release in forward to its reload in backward
        waits[moment]       time after it: for copies, or that copies cost the device
        copies that begin at a or later and are done at b take no longer than from a to b, for each a and b
    """

    def __init__(self, step: Step, budget: Budget, machine: Machine) -> None:
        assert [graph.phase for graph in step.graphs] == ["forward", "backward"]
        super().__init__(step, budget, machine)

    def memory(self) -> None:
        """With what is off the device."""
        step, machine = self.step, self.machine
        self.waits = [self.variable(cost=1.0) for _ in self.moments]
        self.away = {t: self.variable(1, whole=True) for t in sorted(step.offloadable) if step.tensors[t].bytes}
        bytes_of = [(v, step.tensors[t].bytes / self.unit) for t, v in self.away.items()]
        self.row(bytes_of, high=(self.budget.host_bytes + 0.5) / self.unit)
        share = 2 * machine.contention * self.unit / machine.bandwidth / self.second
        self.row([*((w, 1.0) for w in self.waits), *((v, -share * size) for v, size in bytes_of)], low=0)
        self.gone = {t: dict[int, int]() for t in self.away}  # from each moment on
        reads, makes = self.events()
        begin = next((m for m, moment in enumerate(self.moments) if moment.slot >= 0), len(self.moments))
        for t in self.away:
            self.leaves(t, begin, min(makes[t]), reads.get(t, {}))
            self.returns(t, begin, reads.get(t, {}))
        self.bus(begin, {t: min(makes[t]) for t in self.away}, reads)
        super().memory()

    def leaves(self, t: int, begin: int, made: int, reads: dict[int, int]) -> None:
        """Off the device from the moment after its release, behind what reads it in forward; all by the end of that."""
        self.row([(self.crosses[t], 1), (self.away[t], -1)], low=0)
        last = max((m for m in (made, *reads) if m < begin and (m == made or reads[m] == self.one)), default=made)
        before = None
        for m in range(last + 1, begin):
            now = self.variable(1, whole=True)
            self.row([(now, 1), *([(before, -1.0)] if before is not None else [])], low=0)
            self.row([(self.away[t], 1), (now, -1)], low=0)
            for later in (r for r in reads if m <= r < begin):
                self.row([(now, 1), (reads[later], 1)], high=1)
            self.is_gone(t, now, m, m + 1)
            before = now

    def returns(self, t: int, begin: int, reads: dict[int, int]) -> None:
        """On the device where backward reads it, and from there on. It leaves only if backward does read it."""
        readers = [v for m, v in reads.items() if begin <= m < len(self.moments)]
        self.row([(self.away[t], -1), *((v, 1) for v in dict.fromkeys(readers))], low=0)
        before, since = self.away[t], begin
        for m in range(begin, len(self.moments)):
            if self.moments[m].runs != self.one and m not in reads:
                continue
            self.is_gone(t, before, since, m)
            now = self.variable(1, whole=True)
            self.row([(before, 1), (now, -1)], low=0)
            if m in reads:
                self.row([(now, 1), (reads[m], 1)], high=1)
            before, since = now, m
            self.gone[t][m] = now
        self.upper[before] = 0.0
        self.is_gone(t, before, since, len(self.moments))

    def is_gone(self, t: int, variable: int, begin: int, end: int) -> None:
        self.gone[t].update(dict.fromkeys(range(begin, end), variable))

    def bus(self, begin: int, made: dict[int, int], reads: dict[int, dict[int, int]]) -> None:
        """What is copied between any two moments takes no longer than the time between them."""
        seconds = [[(x.runs, self.seconds(x.op))] for x in self.moments]
        takes = {t: self.machine.copy_seconds(self.step.tensors[t].bytes, "host") / self.second for t in self.away}
        for a in sorted(set(made.values())):
            passed = list[tuple[int, float]]()
            for b in range(a, begin):
                passed += [(self.waits[b], -1.0), *(_minus(seconds[b]) if b > a else ())]
                there = {t: self.gone[t].get(b + 1) if b + 1 < begin else self.away[t] for t in made if made[t] >= a}
                after = [(v, takes[t]) for t, v in there.items() if v is not None]
                if after:
                    self.row([*after, *passed], high=0)
        fixed = [m for m in range(begin, len(self.moments)) if self.moments[m].runs == self.one]
        needed = {t: min((m for m in fixed if m in reads.get(t, {})), default=math.inf) for t in self.away}
        for a in (begin - 1, *fixed):
            passed = [(self.waits[a], -1.0)]
            for b in range(a + 1, len(self.moments)):
                if self.moments[b].runs == self.one and b in needed.values():
                    gone = {t: self.away[t] if a < begin else self.gone[t][a] for t in self.away if needed[t] <= b}
                    self.row([*((v, takes[t]) for t, v in gone.items()), *passed], high=0)
                passed += [(self.waits[b], -1.0), *_minus(seconds[b])]

    def lives(self, t: int, reads: dict[int, int], makes: dict[int, int]) -> None:
        """Less what is off the device."""
        super().lives(t, reads, makes)
        for m, variable in self.gone.get(t, {}).items():
            self.occupies(variable, -self.step.tensors[t].bytes / self.unit, m, m + 1)

    def placed(self, found: Found) -> dict[int, Offload]:
        """The copies of a solution, at its own points."""
        runs = [found.values[moment.runs] > 0.5 for moment in self.moments]
        begin = next((m for m, moment in enumerate(self.moments) if moment.slot >= 0), len(self.moments))
        out = {}
        for t in (t for t, v in self.away.items() if found.values[v] > 0.5):
            gone = [m for m, v in self.gone[t].items() if found.values[v] > 0.5]
            release = max(m for m in range(min([*gone, begin])) if runs[m])
            reload = next(m for m in range(max([*gone, begin - 1]) + 1, len(runs)) if runs[m])
            op = self.step.producer[t][0]
            out[t] = Offload("host", op, self.moments[release].op, self.moments[reload].op)
        return out
