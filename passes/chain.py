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
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memplan.ir import Machine, Run, Step
from memplan.passes.blocks import boundaries
from memplan.passes.lifetimes import lifetimes
from memplan.passes.policies.min_cut import corners
from memplan.passes.schedule import needs_tangents, schedule

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
        self.late = set(needs_tangents(step))
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
        self.in_flight = [  # at each station, the other blocks that hold something
            [k for k in range(len(self.ends)) if self._ahead_of(k, s)] for s in range(len(self.stations))
        ]

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

    def forward(self, own: Sequence[Run]) -> list[int]:
        """The block at each run of a forward graph: ops of backward that run there belong to where they do."""
        found, block = list[int](), 0
        for run in own:
            block = self.of(run.op) if run.op < len(self.step.forward.ops) else block
            found.append(block)
        return found

    def backward(self, own: Sequence[Run], unit: int) -> list[int]:
        """The block that each run of a backward graph works for: the last that it reads from."""
        blocks = self._own(unit)
        return [max((k for k in self._touched(run) if k in blocks), default=blocks.start) for run in own]

    def _touched(self, run: Run) -> Iterator[int]:
        if run.op < len(self.step.forward.ops):
            yield self.of(run.op)
        else:
            yield from (
                self.made[t] for t in self.step.ops[run.op].inputs if t in self.made and t in self.step.saveable
            )


class _Seen:
    """What every block does when the storages `saved` cross."""

    def __init__(self, layout: _Layout, machine: Machine, saved: frozenset[int], always: frozenset[int]) -> None:
        step, self.layout, self.machine = layout.step, layout, machine
        runs = schedule(step, saved)
        self.owners: list[set[int]] = [set() for _ in layout.ends]  # of what is saved
        self.again = np.zeros(len(layout.ends))
        self.spent = np.zeros((len(layout.stations), 2))
        borrowed = (layout.crossing & saved) - always  # saved only where something runs again
        station = list[int]()
        for graph, own in zip(step.graphs, runs, strict=True):
            if graph.phase == "forward":
                station += self._forward(own, saved - borrowed)
            else:
                station += self._backward(own, graph.unit, borrowed)
        for t in borrowed.difference(*self.owners):
            self.owners[layout.made[t]].add(t)
        for run, s in zip(itertools.chain.from_iterable(runs), station, strict=True):
            if not run.again:
                self.spent[s] += _seconds(step, run, machine)
        self.size = [sum(step.tensors[t].bytes for t in owned) for owned in self.owners]
        self.most = self._most(_totals(step, runs, saved), station)

    def _forward(self, own: Sequence[Run], saved: frozenset[int]) -> list[int]:
        """The station of each run; what it makes and saves is its block's."""
        blocks = self.layout.forward(own)
        for run, k in zip(own, blocks, strict=True):
            self.owners[k].update(saved.intersection(self.layout.step.ops[run.op].outputs))
        return [self.layout.at[k, True] for k in blocks]

    def _backward(self, own: Sequence[Run], unit: int, borrowed: frozenset[int]) -> list[int]:
        """The station of each run; what it borrows to run again is its block's."""
        blocks = self.layout.backward(own, unit)
        for run, k in zip(own, blocks, strict=True):
            if run.op not in self.layout.late:
                self.owners[k] |= borrowed.intersection(self.layout.step.ops[run.op].inputs)
            if run.again:
                self.again[k] += _seconds(self.layout.step, run, self.machine)[0]
        # An op that reads from an early block before later blocks are done runs at their station: chains go one way.
        latest = list(itertools.accumulate(reversed(blocks), max))
        return [self.layout.at[k, False] for k in reversed(latest)]

    def _most(self, totals: Sequence[int], station: Sequence[int]) -> list[int]:
        """The most at each station beyond what other blocks hold."""
        others = [sum(self.size[k] for k in held) for held in self.layout.in_flight]
        most = [0] * len(others)
        for total, s in zip(totals, station, strict=True):
            most[s] = max(most[s], total - others[s])
        return most

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


def _seconds(step: Step, run: Run, machine: Machine) -> tuple[float, float]:
    """Of the op itself, and of the copy that it is."""
    op = step.ops[run.op]
    return (0.0, machine.seconds(op)) if op.fetches else (machine.seconds(op), 0.0)


def _totals(step: Step, runs: Sequence[Sequence[Run]], saved: Collection[int]) -> list[int]:
    """Bytes at every moment, beyond the step's base."""
    change = [0] * (sum(map(len, runs)) + 1)
    for life in lifetimes(step, runs, saved):
        change[life.start] += life.bytes
        change[life.end] -= life.bytes
    return list(itertools.accumulate(change[:-1]))
