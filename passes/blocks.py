"""Where a step's forward is narrow: the boundaries between blocks, found without knowing any model.

In: a Step. Out: positions in forward order, and the storages that cross each.
The width at a position is the bytes made before it and read by forward after it. A boundary is a position
where the width has a prominent minimum (topographic prominence at least half of its height): in a chain of
layers the residual stream, in a U-Net the residual stream and the skips that pass over the position. Minima
inside a block, between a norm's or an MLP's products, are wider than the block's ends near by, and are left out.
"""

from typing import NamedTuple

import numpy as np
from scipy.signal import find_peaks

from memplan.ir import Graph, Step

PROMINENCE = 0.5  # of the width at the boundary
PASSING = 128  # ops over which a storage is alive that passes over blocks, and has no part in where they end
CHAIN = 4  # ops along which the width stays the same: a chain, of which every op is a block
NEAR, WIDER = 3, 1.25  # a boundary is at most WIDER times the narrowest of the NEAR boundaries on either side


class Boundary(NamedTuple):
    """`op` is the first op behind it, an index into the forward ops; `storages` cross it."""

    op: int
    storages: frozenset[int]


def frontiers(step: Step) -> list[frozenset[int]]:
    """The storages that cross each block boundary, in program order. Block k lies between frontiers k-1 and k."""
    return [boundary.storages for boundary in boundaries(step)]


def boundaries(step: Step) -> list[Boundary]:
    """The block boundaries of all forward graphs, in program order."""
    return [
        Boundary(span.start + b.op, b.storages)
        for graph, span in zip(step.graphs, step.spans, strict=True)
        if graph.phase == "forward"
        for b in _of_graph(step, graph)
    ]


def _of_graph(step: Step, graph: Graph) -> list[Boundary]:
    made, last = _extent(graph)
    count = len(graph.ops)
    width = np.zeros(count + 1)
    for t, start in made.items():
        if last[t] - start <= PASSING:
            width[start + 1 : last[t] + 1] += step.tensors[t].bytes
    # find_peaks looks for maxima; the ends count as high ground so that the first and last minimum qualify.
    high = 2.0 * width.max() + 1.0
    padded = np.concatenate([[-high], -width[1:count], [-high]])
    found, shape = find_peaks(padded, prominence=0.0, plateau_size=1)
    chosen = shape["prominences"] >= PROMINENCE * np.maximum(-padded[found], 1.0)
    deep = list[int]()
    for p, left, right in zip(found[chosen], shape["left_edges"][chosen], shape["right_edges"][chosen], strict=True):
        deep += range(left, right + 1) if right - left >= CHAIN else [int(p)]
    narrowest = [min(width[p] for p in deep[max(0, k - NEAR) : k + NEAR + 1]) for k in range(len(deep))]
    return [
        Boundary(p, frozenset(t for t in made if made[t] < p <= last[t] and t not in step.given))
        for p, least in zip(deep, narrowest, strict=True)
        if width[p] <= WIDER * least
    ]


def _extent(graph: Graph) -> tuple[dict[int, int], dict[int, int]]:
    """storage -> the op of the graph that makes it, and the one that reads it last."""
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, op in enumerate(graph.ops):
        made.update(dict.fromkeys(op.outputs, i))
        last.update(dict.fromkeys([*op.inputs, *op.outputs], i))
    return made, last
