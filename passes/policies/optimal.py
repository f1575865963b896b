"""The best plan that is found: of chains of blocks, of every built-in policy, and of what a local search makes of them.

In: a step and a budget. Out: decisions. chain.py says what each block can do, master.py picks an option for each and
what of it leaves the device. What is picked is placed and simulated exactly; where that is over the budget, or leaves
room, it is picked again for so much less or more. Chains of every block boundary, of every second, fourth, ... are
tried while that helps; what other policies do is a candidate too, so the plan is never worse than theirs; and where
the bound (bound.py) leaves something to gain, single storages are decided otherwise as long as that helps.
The same step, budget and machine give the same plan: all limits are counts. Where nothing of this fits, the smallest
plan that is found is what comes out. Which one does not depend on the budget, so what fits one budget at all fits each
larger one, and a refusal that names the smallest budget names one that is enough.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from memplan.errors import Stopped
from memplan.ir import Budget, Decisions, Machine, Offload, Step
from memplan.passes.bound import bound
from memplan.passes.chain import Chain, Option, chain
from memplan.passes.copies import placed
from memplan.passes.master import pick
from memplan.passes.policies.chunked import Chunked
from memplan.passes.policies.greedy import Greedy, choose, in_order, moved, path
from memplan.passes.policies.offload import SMALL, HandBack, OffloadLayerInputs, decided, offloads_of
from memplan.passes.policies.polish import Candidate, Judge, polished
from memplan.passes.schedule import saved_by, schedule

EVERY = (1, 2, 4, 8, 16)  # boundaries taken as one
ROUNDS = 10  # times that options are picked for one chain
NEAR = 0.005  # of the step's time: as good as the best
CLOSE = 0.002  # of the budget: room that is not worth another round
LESS = 0.03  # of the least room so far, which is asked for less, and then for twice as much less


@dataclass(frozen=True)
class Optimal:
    """`small`: bytes of what is not copied."""

    small: int = SMALL
    name: str = "optimal"
    finds_least: ClassVar[bool] = True

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        if not step.saveable:
            return {}
        judge = Judge(step, budget, machine)
        best: Candidate | None = None
        try:
            for candidate in _candidates(judge, self.small) if judge.room > 0 else ():
                best = candidate if best is None else min(best, candidate)
            if best is None or best.over:
                best = step.once(_smallest, budget.leaving(0), machine, self.small)
        except Stopped:
            if best is None:
                raise
        return decided(step.read_in_backward | best.saved, best.saved, best.offloads)


def _smallest(step: Step, nothing: Budget, machine: Machine, small: int) -> Candidate:
    """The plan of least peak that is found: from greedy's, for less and less as long as there is one, and then what the
    local search makes of it. `nothing` is a budget that leaves no room, so that the whole peak is over it.
    """
    judge = Judge(step, nothing, machine)
    point = Greedy(small=small)(step, nothing, machine)
    best, less = judge.candidate(saved_by(step, point), offloads_of(point)), LESS
    for _ in range(ROUNDS):
        room = max(1, int((1 - less) * (best.peak - step.base_bytes)))
        asked = Judge(step, nothing.leaving(step.base_bytes + room), machine)
        found = min(judge.candidate(c.saved, c.offloads) for c in _made(asked, small, _enough(asked)))
        best, fits = min(best, found), found.over <= step.base_bytes + room
        if not fits and less == LESS:
            break
        less = 2 * less if fits else LESS
    return min(polished(judge, best, small), default=best)


def _candidates(judge: Judge, small: int) -> Iterator[Candidate]:
    """What is made, and what the local search makes of the best of it."""
    enough, found = _enough(judge), list[Candidate]()
    for candidate in _made(judge, small, enough):
        found.append(candidate)
        yield candidate
    best = min(found)
    if best.over or best.seconds > enough:
        yield from polished(judge, best, small)


def _enough(judge: Judge) -> float:
    """Seconds of what runs again and of copies that are as good as the best."""
    base = sum(map(judge.machine.seconds, judge.step.ops))
    return bound(judge.step, judge.budget, judge.machine).seconds - base + NEAR * base


def _made(judge: Judge, small: int, enough: float) -> Iterator[Candidate]:
    """Of chains and of other policies."""
    best: Candidate | None = None
    for candidate in _of_chains(judge, small, enough):
        best = candidate if best is None else min(best, candidate)
        yield candidate
    yield from _of_policies(judge, small, best, enough)


def _of_policies(judge: Judge, small: int, best: Candidate | None, enough: float) -> Iterator[Candidate]:
    """The best of greedy's path that is faster than `best`, or the smallest; and what rules of other tools make."""
    step, budget, machine = judge.step, judge.budget, judge.machine
    limit = best.seconds if best and not best.over else math.inf
    points = [p for p in step.once(path, machine, Greedy().points) if p.seconds < limit]
    if budget.host_bytes and limit > enough:
        points += moved(step, points, budget, machine, small, judge.room, limit)
    moving = (OffloadLayerInputs(small=small), HandBack(small=small)) if budget.host_bytes else ()
    for rule in (Chunked(small=small), *moving):
        decisions = rule(step, budget, machine)
        yield judge.candidate(saved_by(step, decisions), offloads_of(decisions))
    if points or best is None:
        point = choose(step, sorted(points, key=in_order), budget.available)
        yield judge.candidate(point.saved, point.offloads)


def _of_chains(judge: Judge, small: int, enough: float) -> Iterator[Candidate]:
    """The best plan of each chain, as long as longer blocks help."""
    found = list[Candidate]()
    for every in EVERY if judge.room > 0 else ():
        links = judge.step.once(chain, judge.machine, every, small)
        best = _fitted(judge, links, small, found[-1].seconds if found else math.inf)
        if best is not None:
            found.append(best)
            yield best
        if (best is None and found) or len(links.blocks) == 1 or (best is not None and best.seconds <= enough):
            break


def _fitted(judge: Judge, links: Chain, small: int, limit: float) -> Candidate | None:
    """The fastest plan of a chain that was found to fit, exactly; None if the chain has none below `limit`."""
    step, budget, machine = judge.step, judge.budget, judge.machine
    allowed, best = judge.room, None
    for _ in range(ROUNDS):
        picked = pick(links, allowed, budget.host_bytes, machine, best.seconds if best else limit)
        if picked is None:
            break
        saved = frozenset[int]().union(*(option.saved for option, _ in picked))
        wanted = {t: Offload() for option, size in picked for t in _movable(step, option, size, small)}
        found = judge.candidate(saved, placed(step, schedule(step, saved), wanted, machine))
        if not found.over and found.seconds < (best.seconds if best else limit):
            best = found
        spare = budget.available - found.peak
        if 0 <= spare <= CLOSE * judge.room:
            break
        allowed += spare - (1 if spare < 0 else -1)
    return best


def _movable(step: Step, option: Option, size: float, small: int) -> list[int]:
    """Storages of an option of about `size` bytes together, the largest first."""
    out = []
    for t in sorted(option.saved & step.offloadable, key=lambda t: (-step.tensors[t].bytes, t)):
        if small <= step.tensors[t].bytes <= size + 1:
            size -= step.tensors[t].bytes
            out.append(t)
    return out
