"""Local search: decide single storages, then pairs of them, otherwise, as long as the plan gets better.

In: a Judge, which simulates plans exactly, and a Candidate. Out: better ones: what is over the budget comes
first, then time. It carries steps without blocks, and what falls between the options of those with blocks.
The search ends after as many ops have been simulated as `WORK` says, whatever the clock says.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from memplan.ir import Budget, Machine, Offload, Step
from memplan.passes.copies import placed
from memplan.passes.schedule import read_in, schedule
from memplan.passes.simulate import copying, peak

WORK = 150_000  # ops that are simulated at most
REACH = 4  # of a step with more than so many storages for each change that can be tried, none is


@dataclass(frozen=True, order=True)
class Candidate:
    """A plan: `saved` cross, `offloads` of them off the device. `over`: bytes that it is over the budget, or ops that
    run twice and must not; `seconds` of what runs again and of copies; ordered from the best.
    """

    over: float
    seconds: float
    peak: int
    saved: frozenset[int] = field(compare=False)
    offloads: Mapping[int, Offload] = field(compare=False)


@dataclass(frozen=True)
class Judge:
    """Simulates plans of a step, exactly."""

    step: Step
    budget: Budget
    machine: Machine

    @property
    def room(self) -> int:
        """Bytes that the budget leaves for what is decided."""
        return self.budget.available - self.step.base_bytes

    def candidate(self, saved: frozenset[int], offloads: Mapping[int, Offload]) -> Candidate:
        """The plan in which they cross, less what backward never reads."""
        step, machine = self.step, self.machine
        runs = schedule(step, saved)
        read = read_in(step, runs)
        if not saved <= read:  # then other ops run in forward, and points of copies may name some that do not
            saved = saved & read
            runs = schedule(step, saved)
            offloads = placed(step, runs, {t: Offload(d.tier) for t, d in offloads.items() if t in saved}, machine)
        again = [run.op for own in runs for run in own if run.again]
        seconds = sum(map(step.seconds(machine).__getitem__, again)) + (
            copying(step, runs, offloads, machine) if offloads else 0
        )
        found = peak(step, saved, offloads, runs)
        away = sum(step.tensors[t].bytes for t, d in offloads.items() if d.tier == "host")
        over = max(0, found - self.budget.available) + max(0, away - self.budget.host_bytes)
        if any(step.ops[i].fixed for i in again):
            over += 2**62
        return Candidate(over, seconds, found, saved, offloads)

    def placed(self, saved: frozenset[int], away: frozenset[int]) -> Candidate:
        """The same, with the copies placed so that nobody waits, or, where that does not fit, with less memory."""
        runs, best = schedule(self.step, saved), None
        for in_flight in (None, 1, 0) if away else (None,):
            offloads = placed(self.step, runs, dict.fromkeys(away, Offload()), self.machine, in_flight)
            found = self.candidate(saved, offloads)
            best = found if best is None else min(best, found)
            if not found.over:
                break
        assert best is not None
        return best


def polished(judge: Judge, best: Candidate, small: int) -> Iterator[Candidate]:
    """What changing single storages, and pairs, leads to, each better than the one before."""
    tries = WORK // max(1, len(judge.step.ops))
    improved = REACH * tries >= len(judge.step.saveable)
    while improved:
        improved = False
        for saved, away in _neighbours(judge.step, best, small, offload=judge.budget.host_bytes > 0):
            if tries <= 0:
                return
            tries -= 1
            found = judge.placed(saved, away)
            if found < best:
                best, improved = found, True
                yield best
                break


def _neighbours(
    step: Step, of: Candidate, small: int, *, offload: bool
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Sets that cross, and those of them that are off the device, one change away, then two; large storages first."""
    away = frozenset(of.offloads)
    movable = [t for t in step.offloadable if offload and step.tensors[t].bytes >= small]
    together = [tuple(t for t in op.outputs if t in step.saveable) for op in step.ops]  # made by one op
    changes = [("crosses", (t,)) for t in step.saveable] + [("crosses", made) for made in together if len(made) > 1]
    changes += [("leaves", (t,)) for t in movable]
    changes.sort(key=lambda change: (-max(step.tensors[t].bytes for t in change[1]), change))
    for pair in (*((c,) for c in changes), *itertools.combinations(changes, 2)):
        saved, off = set(of.saved), set(away)
        for what, storages in pair:
            if what == "crosses":
                saved ^= set(storages)
            else:
                off ^= set(storages)
                saved |= set(storages)
        yield frozenset(saved), frozenset(off & saved)
