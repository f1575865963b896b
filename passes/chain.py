"""A step as a chain of blocks, and what each block can do on its own.

In: a Step, a Machine, the number of blocks of blocks.py that are taken as one. Out: a Chain: for each block its
Options, which are independent of what the other blocks do, and the stations at which blocks run, in order.
An option is what a minimum cut of the whole step saves of the block, for one of many prices per byte (min_cut.py), with
the boundaries between blocks never made again; its bytes and seconds are read off the schedule and lifetimes of that
whole step, so that what is inside the block is exact. What a block needs of the boundary before it only because it
runs again is the block's own, not that of the block before.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.ir import Machine, Step
from memplan.passes.blocks import boundaries
from memplan.passes.policies.min_cut import corners
from memplan.passes.schedule import needs_tangents, schedule
from memplan.passes.totals import Ints, totals

PRICES = 200  # closer than this share of save-all's bytes, prices are not told apart


@dataclass(frozen=True)
class Option:
    """What a block can do. `saved` cross, `size` bytes, of which `movable` may leave the device; `seconds` of its ops
    run again. `forward`, `backward`: the most that is there while the block runs, beyond what other blocks hold then.
    """

    saved: frozenset[int]
    size: int
    movable: int
    seconds: float
    forward: int
    backward: int

    def is_no_worse_than(self, other: Option) -> bool:
        """In every respect that matters to a plan."""
        return all(a <= b for a, b in zip(self._costs(), other._costs(), strict=True))

    def _costs(self) -> tuple[float, ...]:
        return self.seconds, self.size, self.size - self.movable, self.forward, self.backward


class Station(NamedTuple):
    """A block runs here, forward or backward. `seconds`: of the ops that run here in every plan; `fetching`: of copies
    of parameters to the device. `last`: a graph ends here.
    """

    block: int
    ahead: bool
    last: bool
    seconds: float
    fetching: float


@dataclass(frozen=True)
class Chain:
    blocks: tuple[tuple[Option, ...], ...]
    stations: tuple[Station, ...]


def chain(step: Step, machine: Machine, every: int, small: int) -> Chain:
    """The step's chain, of every `every`-th boundary. Storages of fewer than `small` bytes are not movable."""
    layout = _Layout(step, every)
    sets = list(dict.fromkeys(corners(step, machine, layout.crossing, PRICES)))
    always = frozenset.intersection(*sets)
    found: list[dict[frozenset[int], Option]] = [{} for _ in layout.ends]
    spent: list[NDArray[np.float64]] = []
    for saved in sets:
        seen = _Seen(layout, machine, saved, always)
        spent.append(seen.spent)
        for k, option in enumerate(seen.options(small)):
            known = found[k].get(option.saved, option)
            worst = replace(
                option,
                forward=max(option.forward, known.forward),
                backward=max(option.backward, known.backward),
            )
            found[k][option.saved] = worst
    least = np.min(spent, axis=0)  # ops that move ahead to forward make it longer: what no plan has too little of
    stations = tuple(
        Station(*place, last, *map(float, least[s]))
        for s, (place, last) in enumerate(zip(layout.stations, layout.last, strict=True))
    )
    return Chain(tuple(tuple(_useful(list(options.values()))) for options in found), stations)


def _useful(options: Sequence[Option]) -> Iterator[Option]:
    """Those that no other makes pointless, fastest first."""
    kept = list[Option]()
    for option in sorted(options, key=lambda o: (*o._costs(), sorted(o.saved))):
        if not any(other.is_no_worse_than(option) for other in kept):
            kept.append(option)
            yield option


class _Layout:
    """Which block every op and moment belongs to. `ends`: for each block, one beyond its last op of forward.
    `crossing`: the storages that cross boundaries. `stations`: (block, whether forward), in order of execution.
    """

    def __init__(self, step: Step, every: int) -> None:
        self.step = step
        chosen = boundaries(step)[every - 1 :: every]
        self.crossing = frozenset[int]().union(*(b.storages for b in chosen))
        self.late, self.saveable = np.zeros(len(step.ops), dtype=bool), step.saveable
        self.late[step.once(needs_tangents)] = True
        spans = [(g, span) for g, span in zip(step.graphs, step.spans, strict=True) if g.phase == "forward"]
        self.ends = sorted({b.op for b in chosen} | {span.stop for _, span in spans})
        self.blocks_of = {  # unit -> its blocks
            g.unit: range(bisect.bisect_left(self.ends, span.start + 1), bisect.bisect_left(self.ends, span.stop) + 1)
            for g, span in spans
        }
        self.made = {t: self.of(i) for i, op in enumerate(step.forward.ops) for t in op.outputs}
        self.stations = [
            (k, g.phase == "forward")
            for g in step.graphs
            for k in (self._own(g.unit) if g.phase == "forward" else reversed(self._own(g.unit)))
        ]
        self.last = [place in {(b[0], False), (b[-1], True)} for place in self.stations for b in [self._with(place[0])]]
        self.at = {station: s for s, station in enumerate(self.stations)}
        self.ahead, self.back = (
            np.array([self.at.get((k, forward), -1) for k in range(len(self.ends))]) for forward in (True, False)
        )
        # At each station, the other blocks that hold something.
        self.in_flight = np.array(
            [[self._ahead_of(k, s) for k in range(len(self.ends))] for s in range(len(self.stations))], dtype=np.int64
        )
        self.behind = {g.unit: self._behind(g.unit) for g in step.graphs if g.phase == "backward"}

    def _with(self, block: int) -> range:
        return next(blocks for blocks in self.blocks_of.values() if block in blocks)

    def _own(self, unit: int) -> range:
        return self.blocks_of.get(unit, range(0))

    def _ahead_of(self, block: int, station: int) -> bool:
        behind = self.at.get((block, False), -1)
        return self.at[block, True] < station < behind

    def of(self, op: int) -> int:
        """The block of an op of forward."""
        return bisect.bisect_right(self.ends, op)

    def forward(self, order: Ints) -> Ints:
        """The block at each run of a forward graph: ops of backward that run there belong to where they do."""
        made = order < len(self.step.forward.ops)
        latest = np.maximum.accumulate(np.where(made, np.arange(len(order)), -1))
        return np.where(latest < 0, 0, np.searchsorted(self.ends, order[latest], side="right"))

    def _behind(self, unit: int) -> Ints:
        """The block that each op works for in the unit's backward: the last that it reads from."""
        blocks, first = self._own(unit), len(self.step.forward.ops)
        read = [
            [self.of(i)] if i < first else [self.made[t] for t in op.inputs if t in self.made and t in self.saveable]
            for i, op in enumerate(self.step.ops)
        ]
        return np.array([max((k for k in touched if k in blocks), default=blocks.start) for touched in read])


class _Seen:
    """What every block does when the storages `saved` cross."""

    def __init__(self, layout: _Layout, machine: Machine, saved: frozenset[int], always: frozenset[int]) -> None:
        step, self.layout = layout.step, layout
        self.seconds = step.once(_seconds, machine)
        runs = schedule(step, saved)
        self.owners: list[set[int]] = [set() for _ in layout.ends]  # of what is saved
        self.again = np.zeros(len(layout.ends))
        self.spent = np.zeros((len(layout.stations), 2))
        borrowed = (layout.crossing & saved) - always  # saved only where something runs again
        for t in (saved - borrowed) & layout.made.keys():
            self.owners[layout.made[t]].add(t)
        station = list[Ints]()
        for graph, own in zip(step.graphs, runs, strict=True):
            order = np.array([run.op for run in own], dtype=np.int64)
            again = np.array([run.again for run in own], dtype=bool)
            if graph.phase == "forward":
                station.append(self._forward(order, saved - borrowed))
            else:
                station.append(self._backward(order, again, graph.unit, borrowed))
            np.add.at(self.spent, station[-1][~again], self.seconds[order[~again]])
        for t in borrowed.difference(*self.owners):
            self.owners[layout.made[t]].add(t)
        self.size = [sum(step.tensors[t].bytes for t in owned) for owned in self.owners]
        self.most = self._most(totals(step, runs, saved), np.concatenate(station))

    def _forward(self, order: Ints, saved: frozenset[int]) -> Ints:
        """The station of each run; what an op of backward makes here and saves is its block's."""
        blocks = self.layout.forward(order)
        for m in np.flatnonzero(order >= len(self.layout.step.forward.ops)).tolist():
            self.owners[blocks[m]].update(saved.intersection(self.layout.step.ops[order[m]].outputs))
        return self.layout.ahead[blocks]

    def _backward(self, order: Ints, again: NDArray[np.bool_], unit: int, borrowed: frozenset[int]) -> Ints:
        """The station of each run; what it borrows to run again is its block's."""
        blocks = self.layout.behind[unit][order]
        for m in np.flatnonzero(~self.layout.late[order]).tolist() if borrowed else ():
            self.owners[blocks[m]] |= borrowed.intersection(self.layout.step.ops[order[m]].inputs)
        np.add.at(self.again, blocks[again], self.seconds[order[again], 0])
        # An op that reads from an early block before later blocks are done runs at their station: chains go one way.
        latest = np.maximum.accumulate(blocks[::-1])[::-1]
        return self.layout.back[latest]

    def _most(self, totals: Ints, station: Ints) -> list[int]:
        """The most at each station beyond what other blocks hold."""
        others = self.layout.in_flight @ np.array(self.size, dtype=np.int64)
        most = np.zeros(len(others), dtype=np.int64)
        np.maximum.at(most, station, totals - others[station])
        found: list[int] = most.tolist()
        return found

    def options(self, small: int) -> Iterator[Option]:
        """What each block does here."""
        step, at = self.layout.step, self.layout.at
        for k, owned in enumerate(self.owners):
            large = [t for t in owned & step.offloadable if step.tensors[t].bytes >= small]
            yield Option(
                frozenset(owned),
                self.size[k],
                sum(step.tensors[t].bytes for t in large),
                float(self.again[k]),
                self.most[at[k, True]],
                self.most[at[k, False]] if (k, False) in at else 0,
            )


def _seconds(step: Step, machine: Machine) -> NDArray[np.float64]:
    """Of each op itself, and of the copy that it is."""
    return np.array([(0.0, machine.seconds(op)) if op.fetches else (machine.seconds(op), 0.0) for op in step.ops])
