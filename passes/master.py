"""The planner's integer program: an option for each block of a chain, and how much of it leaves the device.

In: a Chain, bytes of room on the device and on the host, a Machine. Out: what is picked, for the least time of what
runs again and of copies, where nobody waits for the bus.

    picked[k, option] = 1                                        one option for each block k
    sum of size * picked + waiting + ahead + inside <= room      at each station
    copied out, copied back                                      at most what the bus takes at each station

`waiting` has left its block and not the device yet, `ahead` is back before its block runs, `inside` is the option's.
Its relaxation, where options may be fractions, says what no choice of these options can beat.
"""

from collections.abc import Callable

from memplan.ir import Machine
from memplan.passes.chain import Chain, Option, Station
from memplan.passes.linear import Program, Terms

Picked = list[tuple[Option, float]]  # for each block its option, and the bytes of it that leave the device


def pick(links: Chain, room: int, host: int, machine: Machine, limit: float) -> Picked | None:
    """The best choice for a chain; None: none takes less than `limit` seconds."""
    if room <= 0:
        return None
    program = _Master(links, room, host, machine)
    least = program.lp.relaxed()
    if least is None or least.cost * program.second >= limit:
        return None
    found = program.lp.dived()
    if found is None:
        return None
    out: Picked = []
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
