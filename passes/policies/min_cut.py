"""What to save and what to recompute for a price per byte: minimum cuts, one for every price that matters.

In: a step, a machine, storages that are never recomputed. Out: sets of storages to save, from everything that
backward reads to the fewest bytes. A storage that is needed in backward is saved, or the op that makes it runs
again and needs its own inputs. The cost is the seconds of what runs again plus price * saved bytes:

    source -> storage that backward reads -> op that makes it -> sink
              (inf)             (price * bytes)        (seconds; inf: must not run twice)
    op -> storages that it reads (inf)

Ops on the source's side run again; an edge that is cut is a storage saved or an op run again. Cuts for growing
prices are nested (Gallo, Grigoriadis, Tarjan 1989). Between two of them, what differs falls apart into pieces
(in a chain of layers, one per layer), which are given up one by one, those alive longest first.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

from memplan.ir import Machine, Step
from memplan.passes.schedule import needs_tangents

INF, LARGE = 2**30, 2**29  # scipy's capacities are int32; no cut of finite cost exceeds LARGE
DEAREST = 1000.0  # the highest price, in step times per save-all's bytes


class Cut(NamedTuple):
    """Ops that run again, what is saved then, and what that costs."""

    again: frozenset[int]
    saved: frozenset[int]
    seconds: float
    bytes: int


def cuts(step: Step, machine: Machine, fixed: frozenset[int], points: int) -> Iterator[frozenset[int]]:
    """Sets to save, each at least 1/points of save-all's bytes smaller than the one before, except for the last."""
    network = _Network(step, machine, fixed)
    least = network.cut(frozenset())
    grain = max(1.0, least.bytes / points)
    previous = least.bytes + grain
    for cut in _between(network, least, network.at(DEAREST * network.seconds / max(1, least.bytes)), grain):
        if cut.bytes <= previous - grain:
            previous = cut.bytes
            yield cut.saved
    yield cut.saved


def corners(step: Step, machine: Machine, fixed: frozenset[int], points: int) -> list[frozenset[int]]:
    """The sets to save that are cheapest at some price, closer than 1/points of save-all's bytes only at the ends."""
    network = _Network(step, machine, fixed)
    least, most = network.cut(frozenset()), network.at(DEAREST * network.seconds / max(1, network.bytes))
    grain = max(1.0, least.bytes / points)

    def between(low: Cut, high: Cut) -> Iterator[Cut]:
        if low.bytes - high.bytes > grain and high.seconds > low.seconds:
            middle = network.at((high.seconds - low.seconds) / (low.bytes - high.bytes))
            if low.again < middle.again < high.again:
                yield from between(low, middle)
                yield middle
                yield from between(middle, high)

    return [cut.saved for cut in (least, *between(least, most), most)]


def _between(network: "_Network", low: Cut, high: Cut, grain: float) -> Iterator[Cut]:
    """The cuts from `low` to `high`, in order of price (Eisner, Severance 1976)."""
    if low.bytes - high.bytes > grain and high.seconds > low.seconds:
        price = (high.seconds - low.seconds) / (low.bytes - high.bytes)
        middle = network.at(price)
        if middle.again not in (low.again, high.again) and low.again < middle.again < high.again:
            yield from _between(network, low, middle, grain)
            yield from _between(network, middle, high, grain)
            return
    yield low
    pieces, again = network.pieces(low, high), low.again
    # As many pieces at a time as free about one grain.
    together = max(1, math.ceil(len(pieces) * grain / max(grain, low.bytes - high.bytes)))
    for k in range(0, len(pieces), together):
        again = again.union(*pieces[k : k + together])
        yield network.cut(again)


class _Network:
    """The network of a step; only capacities depend on the price."""

    def __init__(self, step: Step, machine: Machine, fixed: frozenset[int]) -> None:
        self.step = step
        first = len(step.forward.ops)
        ops = sorted({step.producer[t][0] for t in step.saveable})
        # An op of backward runs anyway, once, unless its result is saved: then it runs in forward instead.
        self.cost = {i: machine.seconds(step.ops[i]) if i < first else 0.0 for i in ops}
        self.stuck = {i for i in ops if step.ops[i].fixed or not fixed.isdisjoint(step.ops[i].outputs)}
        self.reads = step.saveable & (
            {t for i in needs_tangents(step) for t in step.ops[i].inputs} | set(step.backward.outputs)
        )
        self.seconds = sum(self.cost.values())
        self.bytes = sum(step.tensors[t].bytes for t in self.reads)

        storages = sorted(step.saveable)
        self.place = {t: 2 + k for k, t in enumerate(storages)}  # 0: source, 1: sink
        at = {i: 2 + len(storages) + k for k, i in enumerate(ops)}
        self.op_at = {node: i for i, node in at.items()}
        edges = [(0, self.place[t], 0.0, 0) for t in sorted(self.reads)]
        edges += [(self.place[t], at[step.producer[t][0]], 0.0, step.tensors[t].bytes) for t in storages]
        edges += [(at[i], self.place[t], 0.0, 0) for i in ops for t in step.ops[i].inputs if t in self.place]
        free = len(edges)
        edges += [(at[i], 1, self.cost[i], 0) for i in ops]
        self.ends = np.array([(a, b) for a, b, _, _ in edges], dtype=int).reshape(-1, 2)  # 2-dimensional if empty too
        self.edge_seconds = np.array([s for _, _, s, _ in edges])
        self.edge_bytes = np.array([b for _, _, _, b in edges], dtype=float)
        self.endless = np.zeros(len(edges), dtype=bool)
        self.endless[: len(self.reads)] = True
        self.endless[len(self.reads) + len(storages) : free] = True
        self.endless[free:] = [i in self.stuck for i in ops]
        self.nodes = 2 + len(storages) + len(ops)

    def at(self, price: float) -> Cut:
        """The cheapest cut at a price per byte; of equals, the one that runs the fewest ops again."""
        unit = LARGE / max(self.seconds, price * self.bytes, 1e-30)
        capacity = np.minimum(np.round((self.edge_seconds + price * self.edge_bytes) * unit), LARGE)
        capacity[self.endless] = INF
        graph = csr_matrix(
            (capacity.astype(np.int32), (self.ends[:, 0], self.ends[:, 1])), shape=(self.nodes, self.nodes)
        )
        left = graph - maximum_flow(graph, 0, 1).flow
        left.eliminate_zeros()
        reached = breadth_first_order(left, 0, return_predecessors=False)
        return self.cut(frozenset(self.op_at[n] for n in reached.tolist() if n in self.op_at))

    def cut(self, again: frozenset[int]) -> Cut:
        """The cut that runs `again`."""
        made = {t for i in again for t in self.step.ops[i].outputs}
        saved = (self.reads.union(*(self.step.ops[i].inputs for i in again)) & self.step.saveable) - made
        size = sum(self.step.tensors[t].bytes for t in saved)
        return Cut(again, saved, sum(self.cost[i] for i in again), size)

    def pieces(self, low: Cut, high: Cut) -> list[frozenset[int]]:
        """The ops in which the cuts differ, apart where neither needs anything new that the other does."""
        more = sorted(high.again - low.again)
        known = self.reads.union(*(self.step.ops[i].inputs for i in low.again))
        touched = [
            (k, t)
            for k, i in enumerate(more)
            for t in (*self.step.ops[i].inputs, *self.step.ops[i].outputs)
            if t in self.place and (t not in known or t in self.step.ops[i].outputs)
        ]
        if not touched:
            return []
        rows, columns = zip(*((k, len(more) + self.place[t]) for k, t in touched), strict=True)
        size = len(more) + self.nodes
        _, label = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), (size, size)), directed=False)
        found: dict[int, set[int]] = {}
        for k, i in enumerate(more):
            found.setdefault(int(label[k]), set()).add(i)
        return [frozenset(piece) for piece in found.values()]  # by first op: forward runs `more` in order
