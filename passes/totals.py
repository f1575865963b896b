"""Bytes at every moment of an order of execution, without names: what lifetimes.py says, in arrays.

In: a Step, the Runs of its graphs, the storages that cross, the copies of those that are off the device in between.
Out: bytes at each moment, beyond the step's base. Planners ask for this thousands of times.
What must hold: it is the sum of the lives of lifetimes.py. A storage is read from its last life that has begun, one
that stays from its first. Where a compiler fuses, the lives themselves are added up.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.ir import Run, Step
from memplan.passes.copies import Copy
from memplan.passes.lifetimes import lifetimes

Ints = NDArray[np.int64]


def totals(step: Step, runs: Sequence[Sequence[Run]], saved: Collection[int], copies: Sequence[Copy] = ()) -> Ints:
    """Bytes at each moment."""
    if step.fused:
        return _added_up(step, runs, saved, copies)
    table = step.once(_table)
    order = np.array([run.op for own in runs for run in own], dtype=np.int64)
    lives = _Lives(step, table, order, runs)
    lives.read(saved)
    change = np.zeros(len(order) + 1, dtype=np.int64)
    size = table.bytes[lives.storage]
    np.add.at(change, lives.start, size)
    np.subtract.at(change, lives.end, size)
    again = {m for m, run in enumerate(itertools.chain.from_iterable(runs)) if run.again}
    for copy in copies:
        for life in {int(lives.first[copy.storage]), int(lives.last[copy.storage])}:
            if int(lives.made_at[life]) not in again:
                change[copy.release + 1] -= size[life]
                change[copy.reload] += size[life]
    total: Ints = np.cumsum(change)[:-1] + table.workspace[order]
    ran: dict[int, int] = {}
    for m in np.flatnonzero(table.rng[order]).tolist():  # a state is carried to the second run, and put back after it
        op = int(order[m])
        if m in again:
            total[ran[op] : m + 1] += table.rng[op]
            total[m] += table.rng[op]
        ran.setdefault(op, m)
    return total


def _added_up(step: Step, runs: Sequence[Sequence[Run]], saved: Collection[int], copies: Sequence[Copy]) -> Ints:
    change = np.zeros(sum(map(len, runs)) + 1, dtype=np.int64)
    for life in lifetimes(step, runs, saved, copies):
        change[life.start] += life.bytes
        change[life.end] -= life.bytes
    return np.cumsum(change)[:-1]


@dataclass(frozen=True)
class _Table:
    """A step's ops and storages in arrays: what op i reads is inputs[begins[i] : begins[i + 1]], and so on."""

    begins: Ints
    inputs: Ints
    makes: Ints
    outputs: Ints
    bytes: Ints
    workspace: Ints
    rng: Ints
    fetches: NDArray[np.bool_]


def _table(step: Step) -> _Table:
    def joined(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
        ends = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return ends, np.array([t for storages in lists for t in storages], dtype=np.int64)

    return _Table(
        *joined([op.inputs for op in step.ops]),
        *joined([op.outputs for op in step.ops]),
        np.array([t.bytes for t in step.tensors], dtype=np.int64),
        np.array([op.workspace_bytes for op in step.ops], dtype=np.int64),
        np.array([op.rng_bytes for op in step.ops], dtype=np.int64),
        np.array([op.fetches for op in step.ops], dtype=bool),
    )


def _of_runs(order: Ints, begins: Ints, values: Ints) -> tuple[Ints, Ints]:
    """(moments, values): those of each op in order."""
    counts = begins[order + 1] - begins[order]
    moments = np.repeat(np.arange(len(order)), counts)
    inside = np.arange(len(moments)) - np.repeat(np.cumsum(counts) - counts, counts)
    return moments, values[np.repeat(begins[order], counts) + inside]


class _Lives:
    """The lives, in the order in which they begin: `storage`, `start`, `end`, and the moment `made_at`, -1 for what the
    caller gives. `first`, `last`: of each storage; a storage has no more than two.
    """

    def __init__(self, step: Step, table: _Table, order: Ints, runs: Sequence[Sequence[Run]]) -> None:
        self.step, self.table, self.order = step, table, order
        moments, storages = _of_runs(order, table.makes, table.outputs)
        bounds = np.cumsum([0, *map(len, runs)]).tolist()
        self.given = list[tuple[int, int, int]]()  # (storage, from, to): what the caller holds while a graph runs
        known, resident = set[int](), set(step.resident)
        made = dict(zip(reversed(storages.tolist()), reversed(moments.tolist()), strict=True))  # the first time
        for graph, start, end in zip(step.graphs, bounds, bounds[1:], strict=False):
            self.given += [(t, start, end) for t in graph.inputs if t not in resident]
        new = []
        for t, start, _ in self.given:  # those that nobody has made by then begin there
            if t not in known and made.get(t, start) >= start:
                new.append((t, start))
            known.add(t)
        self.made_at = np.concatenate([np.full(len(new), -1, dtype=np.int64), moments])
        self.storage = np.concatenate([np.array([t for t, _ in new], dtype=np.int64), storages])
        begins = np.concatenate([np.array([m for _, m in new], dtype=np.int64), moments])
        self.start, self.end = begins.copy(), self.made_at + 1
        self.end[: len(new)] = begins[: len(new)]
        if table.fetches.any():
            self._fetch(bounds)
        self.key = 4 * begins + np.where(self.made_at < 0, 0, 2)  # of equal moments: given, read (1), made
        by_time = np.argsort(self.key, kind="stable")
        self.first, self.last = (np.full(len(table.bytes), -1, dtype=np.int64) for _ in range(2))
        self.first[self.storage[by_time[::-1]]] = by_time[::-1]
        self.last[self.storage[by_time]] = by_time

    def _fetch(self, bounds: Sequence[int]) -> None:
        """What is fetched is there from the end of the fetch before it in its graph on."""
        since = np.zeros(len(self.order), dtype=np.int64)
        for start, end in itertools.pairwise(bounds):
            fetching = np.flatnonzero(self.table.fetches[self.order[start:end]]) + start
            since[fetching] = np.concatenate([[start], fetching[:-1] + 1])[: len(fetching)]
        there = (self.made_at >= 0) & self.table.fetches[self.order[self.made_at]]
        self.start[there] = since[self.made_at[there]]

    def read(self, saved: Collection[int]) -> None:
        """Let each life last until its storage is read for the last time."""
        stays = np.zeros(len(self.table.bytes), dtype=bool)
        stays[list(self.step.given)] = True
        stays[list(saved)] = True
        self.last = np.where(stays, self.first, self.last)
        moments, storages = _of_runs(self.order, self.table.begins, self.table.inputs)
        life = np.where(4 * moments + 1 > self.key[self.last[storages]], self.last[storages], self.first[storages])
        there = (self.first[storages] >= 0) & (4 * moments + 1 > self.key[life])
        np.maximum.at(self.end, life[there], moments[there] + 1)
        for t, _, end in self.given:
            life = self.last[t] if self.key[self.last[t]] < 4 * end else self.first[t]
            self.end[life] = max(self.end[life], end)
        for lives, graph in ((self.first, self.step.forward), (self.last, self.step.backward)):
            for t in graph.outputs:
                if lives[t] >= 0:
                    self.end[lives[t]] = len(self.order)
