"""Which blocks of two timelines are the same: the n-th of a key in a phase in both, and in the same order in both.

    a: x1 y1 z1 x2        pairs: x1 x1, y1 y1, x2 x2; z1 has no partner, and where two pairs cross,
    b: x1 y1 x2           those are left out that leave the most pairs

In: two timelines and a key of blocks, such as their bytes. Out: pairs, in order. Time: n log n.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator

from memplan.ir import Block, Timeline


def aligned(x: Timeline, y: Timeline, key: Callable[[Block], Hashable]) -> list[tuple[Block, Block]]:
    """The largest set of pairs that do not cross."""

    def within(timeline: Timeline) -> dict[tuple[Hashable, int], tuple[int, Block]]:
        blocks = sorted(timeline.blocks, key=lambda block: block.start)
        keyed = numbered(blocks, lambda block: (timeline.moments[block.start].phase, key(block)))
        return {k: (i, block) for i, (k, block) in enumerate(keyed)}

    theirs = within(y)
    pairs = [(block, *theirs[k]) for k, (_, block) in within(x).items() if k in theirs]
    return [(pairs[i][0], pairs[i][2]) for i in _increasing([at for _, at, _ in pairs])]


def numbered(blocks: Iterable[Block], key: Callable[[Block], Hashable]) -> Iterator[tuple[tuple[Hashable, int], Block]]:
    """Each block with its key and how many of that key came before it."""
    seen: Counter[Hashable] = Counter()
    for block in blocks:
        k = key(block)
        yield (k, seen[k]), block
        seen[k] += 1


def _increasing(values: list[int]) -> list[int]:
    """Indices of a longest increasing subsequence of distinct values (Schensted 1961)."""
    ends: list[int] = []  # the smallest value that ends an increasing subsequence of each length
    where: list[int] = []  # its index
    before: list[int] = []  # for each index, that of the value before it
    for i, value in enumerate(values):
        length = bisect.bisect_left(ends, value)
        before.append(where[length - 1] if length else -1)
        ends[length : length + 1], where[length : length + 1] = [value], [i]
    out, i = [], where[-1] if where else -1
    while i >= 0:
        out.append(i)
        i = before[i]
    return out[::-1]
