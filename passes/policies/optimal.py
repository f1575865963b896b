"""The best plan of a chain of blocks: an option for each, and how much of it leaves the device, in one integer program.

In: a step and a budget. Out: decisions. chain.py says what each block can do; the program picks one option for each
block and the bytes of it that are copied to the host, so that no station of the chain is over the budget and nobody
waits for the bus, for the least time of what runs again and of copies. What is picked is placed and simulated exactly;
where that is over the budget or leaves room, the program is solved again for so much less or more.
Chains of every block boundary, of every second, fourth, ... are tried while that helps. What greedy finds is a
candidate too, so the plan is never worse than any built-in policy's.

    picked[k, option] = 1                                        one option for each block k
    sum of size * picked + waiting + ahead + inside <= budget    at each station
    copied out, copied back                                      at most what the bus takes at each station

`waiting` has left its block and not the device yet, `ahead` is back before its block runs, `inside` is the option's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from memplan.ir import Budget, Decisions, Machine, Offload, Step
from memplan.passes.bound import bound
from memplan.passes.chain import Chain, Option, Station, chain
from memplan.passes.copies import placed
from memplan.passes.linear import Program, Terms
from memplan.passes.policies.greedy import Greedy, Point, choose, in_order, moved, path
from memplan.passes.policies.offload import SMALL, HandBack, OffloadLayerInputs, decided
from memplan.passes.schedule import saved_by, schedule
from memplan.passes.simulate import copying, peak

EVERY = (1, 2, 4, 8, 16)  # boundaries taken as one
ROUNDS = 6  # programs solved for one chain
GAP, NODES = 0.01, 40  # of the solver's search: of the overhead
NEAR = 0.005  # of the step's time: as good as the best
CLOSE = 0.002  # of the budget: room that is not worth another round


@dataclass(frozen=True)
class Optimal:
    """`small`: bytes of what is not copied."""

    small: int = SMALL
    name: str = "optimal"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        best = min(self._candidates(step, budget, machine), key=lambda point: point.seconds)
        return decided(step.read_in_backward | best.saved, best.saved, best.offloads)

    def _candidates(self, step: Step, budget: Budget, machine: Machine) -> list[Point]:
        """Plans, fastest known last of each kind; what does not fit is there only if nothing does."""
        found = _of_chains(step, budget, machine, self.small)
        limit = min((point.seconds for point in found), default=math.inf)
        others = [p for p in path(step, machine, Greedy().points) if p.seconds < limit]
        if budget.host_bytes and not _is_near(limit, step, budget, machine):
            others += moved(step, others, budget, machine, self.small, budget.available - step.base_bytes)
        for rule in (OffloadLayerInputs(small=self.small), HandBack(small=self.small)) if budget.host_bytes else ():
            found.append(_measured(step, rule(step, budget, machine), budget, machine))
        if others or not found:
            point = choose(step, sorted(others, key=in_order), budget.available)
            found.append(_point(step, point.saved, point.offloads, budget, machine)[0])
        fitting = [point for point in found if point.seconds < math.inf]
        return fitting or [point]


def _is_near(seconds: float, step: Step, budget: Budget, machine: Machine) -> bool:
    """Whether no plan can be much faster."""
    base = sum(map(machine.seconds, step.ops))
    return base + seconds <= bound(step, budget, machine).seconds + NEAR * base


def _measured(step: Step, decisions: Decisions, budget: Budget, machine: Machine) -> Point:
    """What another policy decided, as a point."""
    offloads = {t: d for t, d in decisions.items() if isinstance(d, Offload)}
    return _point(step, saved_by(step, decisions), offloads, budget, machine)[0]


def _point(
    step: Step, saved: frozenset[int], offloads: Mapping[int, Offload], budget: Budget, machine: Machine
) -> tuple[Point, int]:
    """A plan, whose time is infinite if it does not fit, and its peak."""
    runs = schedule(step, saved)
    again = sum(machine.seconds(step.ops[run.op]) for own in runs for run in own if run.again)
    found = peak(step, saved, offloads)
    seconds = again + (copying(step, runs, offloads, machine) if offloads else 0.0)
    fits = found <= budget.available and not any(step.ops[r.op].fixed for own in runs for r in own if r.again)
    return Point(seconds if fits else math.inf, 0, saved, offloads), found


def _of_chains(step: Step, budget: Budget, machine: Machine, small: int) -> list[Point]:
    """The best plan of each chain, as long as longer blocks help."""
    found = list[Point]()
    for every in EVERY if budget.available > step.base_bytes else ():
        limit = found[-1].seconds if found else math.inf
        links = chain(step, machine, every, small)
        best = _fitted(step, links, budget, machine, small, limit)
        if best is not None and best.seconds < limit:
            found.append(best)
        elif found:
            break
        if len(links.blocks) == 1 or (found and _is_near(found[-1].seconds, step, budget, machine)):
            break
    return found


def _fitted(step: Step, links: Chain, budget: Budget, machine: Machine, small: int, limit: float) -> Point | None:
    """The fastest plan of a chain that was found to fit, exactly; None too if the chain has none below `limit`."""
    room = allowed = budget.available - step.base_bytes
    best: Point | None = None
    for _ in range(ROUNDS):
        picked = _solved(links, allowed, budget.host_bytes, machine, min(limit, best.seconds if best else math.inf))
        if picked is None:
            break
        saved = frozenset[int]().union(*(option.saved for option, _ in picked))
        wanted = {t: Offload() for option, size in picked for t in _movable(step, option, size, small)}
        offloads = placed(step, schedule(step, saved), wanted, machine)
        point, found = _point(step, saved, offloads, budget, machine)
        if point.seconds < math.inf and (best is None or point.seconds < best.seconds):
            best = point
        over = found - step.base_bytes - room
        if 0 <= -over <= CLOSE * room:
            break
        allowed -= over + (1 if over > 0 else -1)
    return best


def _movable(step: Step, option: Option, size: float, small: int) -> list[int]:
    """Storages of an option of about `size` bytes together, the largest first."""
    out = []
    for t in sorted(option.saved & step.offloadable, key=lambda t: (-step.tensors[t].bytes, t)):
        if small <= step.tensors[t].bytes <= size + 1:
            size -= step.tensors[t].bytes
            out.append(t)
    return out


def _solved(links: Chain, room: int, host: int, machine: Machine, limit: float) -> list[tuple[Option, float]] | None:
    """For each block its option, and the bytes of it that leave the device; None: none is below `limit`."""
    if room <= 0:
        return None
    program = _Master(links, room, host, machine)
    least = program.lp.relaxed()
    if least is None or least.cost * program.second >= limit:
        return None
    found = program.lp.solved(gap=GAP, nodes=NODES)
    if found is None:
        return None
    out = []
    for options, picked, away in zip(links.blocks, program.picked, program.away, strict=True):
        option = max(zip(picked, options, strict=True), key=lambda pair: found.values[pair[0]])[1]
        out.append((option, float(found.values[away]) * program.unit))
    return out


class _Master:
    """The program. Bytes count in `unit`, seconds in `second`, so that numbers are near 1."""

    def __init__(self, links: Chain, room: int, host: int, machine: Machine) -> None:
        self.lp, self.links = Program(), links
        self.unit = room / 16
        self.second = max(sum(s.seconds for s in links.stations), 1e-30) / 100
        self.rate = self.second / machine.copy_seconds(1, "host") / self.unit
        share = 2 * machine.contention * self.unit / machine.bandwidth / self.second
        limit = host / self.unit
        self.picked = [
            [self.lp.variable(1, cost=o.seconds / self.second, whole=True) for o in options] for options in links.blocks
        ]
        self.away = [self.lp.variable(cost=share) for _ in links.blocks]
        for k in range(len(links.blocks)):
            self.lp.row([(v, 1) for v in self.picked[k]], low=1, high=1)
            self.lp.row([(self.away[k], 1), *self._bytes(k, lambda o: -o.movable)], high=0)
        self.lp.row([(v, 1) for v in self.away], high=limit)
        self._stations(room)

    def _bytes(self, block: int, of: Callable[[Option], int]) -> list[tuple[int, float]]:
        """A number of bytes of the block's option."""
        return [(v, of(o) / self.unit) for v, o in zip(self.picked[block], self.links.blocks[block], strict=True)]

    def _stations(self, room: int) -> None:
        """Memory and the bus at each station, in order."""
        lp = self.lp
        # What blocks hold that have run and are not back yet; what has left its block, and what has to be back; what
        # has been copied out, and back.
        held, left, due, out, back = (lp.variable(0) for _ in range(5))
        for s in self.links.stations:
            k, gone, seconds = s.block, [(self.away[s.block], 1.0)], s.seconds / self.second
            kept = [*self._bytes(k, lambda o: o.size), *_minus(gone)]
            if not s.ahead:
                held, due = self._sum(held, _minus(kept)), self._sum(due, gone)
                lp.row([(back, 1), (due, -1)], low=0)  # what this block reads is there when it starts
            waiting = [(left, 1.0), (out, -1.0)]
            out, back = self._copied(s, out, left, gone, seconds), self._returned(s, back, out, seconds)
            inside = self._bytes(k, lambda o: o.forward) if s.ahead else self._bytes(k, lambda o: o.backward)
            lp.row([(held, 1), *waiting, (back, 1), (due, -1), *inside], high=room / self.unit)
            if s.ahead:
                held, left = self._sum(held, kept), self._sum(left, gone)
            if s.last:  # copies stay inside of a graph
                lp.row([(out, 1), (left, -1)] if s.ahead else [(back, 1), (due, -1)], low=0, high=0)

    def _copied(self, s: Station, before: int, left: int, gone: Terms, seconds: float) -> int:
        """What is off the device when the station ends."""
        now = self.lp.variable()
        self.lp.row([(now, 1), (before, -1)], low=0, high=self.rate * seconds if s.ahead else 0)
        self.lp.row([(now, 1), (left, -1), *_minus(gone if s.ahead else ())], high=0)
        return now

    def _returned(self, s: Station, before: int, out: int, seconds: float) -> int:
        """What is on the device again when the station ends: what runs again hides copies too."""
        now = self.lp.variable()
        again = [] if s.ahead else zip(self.picked[s.block], self.links.blocks[s.block], strict=True)
        hidden = [(v, -self.rate * o.seconds / self.second) for v, o in again]
        busy = 0.0 if s.ahead else max(0.0, seconds - s.fetching / self.second)
        self.lp.row([(now, 1), (before, -1)], low=0)
        self.lp.row([(now, 1), (before, -1), *hidden], high=self.rate * busy)
        self.lp.row([(out, 1), (now, -1)], low=0)
        return now

    def _sum(self, before: int, terms: Terms) -> int:
        """A new variable: one before and the terms."""
        now = self.lp.variable()
        self.lp.row([(before, 1), *terms, (now, -1)], low=0, high=0)
        return now


def _minus(terms: Terms) -> list[tuple[int, float]]:
    return [(v, -c) for v, c in terms]
