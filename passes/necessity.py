"""What every plan of a step needs, whatever it decides: ops, reads, and bytes that are there at each moment.

In: a Step. Out: the ops that always run, in order, whose positions are the moments of what follows; of each storage
that can cross from forward to backward, its Use; and bytes at each moment that no decision avoids.
What must hold: nothing is claimed that some plan does without. What runs again is left out, and of a step whose
compiler fuses only what an op of its own kernel reads and writes is certain to be in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.ir import Step
from memplan.passes.schedule import closure, needs_tangents


@dataclass(frozen=True)
class Necessity:
    """`order`: the ops that run in every plan, whose positions are moments. `either`: ops of backward that need no
    tangent, and run in one of the directions. `wanted`: storages that backward reads or returns in every plan.
    `held`: bytes at each moment. `nothing`: storages that may be gone although they are kept.
    """

    order: tuple[int, ...]
    either: tuple[int, ...]
    uses: Mapping[int, Use]
    wanted: frozenset[int]
    held: NDArray[np.float64]
    nothing: frozenset[int]


def necessity(step: Step) -> Necessity:
    """What no plan does without."""
    order = _order(step)
    uses = _uses(step, order)
    read = {t for i in needs_tangents(step) for t in step.ops[i].inputs} | set(step.backward.outputs)
    ahead = {t for op in step.forward.ops for t in op.outputs}
    either = closure(step, read & step.saveable, ahead | step.given)
    nothing = frozenset(_for_nothing(step, order))
    wanted = frozenset(read & uses.keys())
    return Necessity(tuple(order), tuple(either), uses, wanted, _held(step, order, uses), nothing)


def _order(step: Step) -> list[int]:
    """The ops that every plan runs, in order: all of forward, and what needs a tangent."""
    late = set(needs_tangents(step))
    return [
        i for g, span in zip(step.graphs, step.spans, strict=True) for i in span if g.phase == "forward" or i in late
    ]


@dataclass(frozen=True)
class Use:
    """Of a storage that can cross, as moments: where it is made, where forward needs it last, whether forward returns
    it, where backward reads it for certain, and when backward begins.
    """

    made: int
    left: int
    returned: bool
    reads: tuple[int, ...]
    back: int
    end: int

    @property
    def needed(self) -> int:
        """When a copy has to be there again."""
        return min(self.reads, default=self.end)

    @property
    def last(self) -> int:
        """Up to when it is there if it is kept: what only reads it again may do so when backward begins."""
        return max(self.reads, default=self.back)


def _uses(step: Step, order: Sequence[int]) -> dict[int, Use]:
    first, count = len(step.forward.ops), len(order)
    made, left, reads = dict[int, int](), dict[int, int](), dict[int, list[int]]()
    for m, i in enumerate(order):
        op = step.ops[i]
        if i < first:
            made.update((t, m) for t in op.outputs if t in step.saveable)
            left.update((t, m) for t in (*op.outputs, *op.inputs) if t in made and _certain(step, i))
            left.update((t, max(left.get(t, 0), m)) for t in op.outputs if t in made)
        else:
            for t in op.inputs:
                if t in step.saveable and _certain(step, i):
                    reads.setdefault(t, []).append(m)
    starts, begins = [m for m, i in enumerate(order) if i >= first], _begins(step, order)
    returned = set(step.forward.outputs)
    for t in step.backward.outputs:
        reads.setdefault(t, []).append(count)
    out = {}
    for t in sorted(step.saveable):
        # What backward makes without a tangent is made in forward if it crosses, at a moment that is not known.
        at = made.get(t, 0)
        back = next((m for m in starts if m > at), count) if t in made else begins[step.producer[t][0]]
        out[t] = Use(at, left.get(t, back - 1), t in returned, tuple(reads.get(t, ())), back, count)
    return out


def _begins(step: Step, order: Sequence[int]) -> dict[int, int]:
    """Op -> the moment at which its graph begins."""
    out, ran, moment = dict[int, int](), set(order), 0
    for span in step.spans:
        out.update(dict.fromkeys(span, moment))
        moment += len(ran.intersection(span))
    return out


def _certain(step: Step, op: int) -> bool:
    """Whether what it reads is in memory when it runs: a fused op may read it later, or read what it was made from."""
    return not step.fused or step.ops[op].fusion == "extern"


def _for_nothing(step: Step, order: Sequence[int]) -> set[int]:
    """Storages that backward may read to no end: no generated code does, so that they may be gone by then."""
    if not step.fused:
        return set()
    wanted, useless = {*step.backward.outputs, *step.between}, set[int]()
    for i in reversed(order):
        op = step.ops[i]
        if i < len(step.forward.ops):
            continue
        if op.fusion == "extern" or not wanted.isdisjoint(op.outputs):
            wanted.update(op.inputs)
        else:
            useless.update(op.inputs)
    for op in reversed(step.ops):
        if not useless.isdisjoint(op.outputs):
            useless.update(op.inputs)
    return useless


def _held(step: Step, order: Sequence[int], uses: Mapping[int, Use]) -> NDArray[np.float64]:
    """Bytes that are there at each moment whatever is decided: what an op works on, and what runs on with it."""
    change, here = np.zeros(len(order) + 1), np.zeros(len(order))
    start, end = dict[int, int](), dict[int, int]()
    for m, i in enumerate(order):
        op = step.ops[i]
        here[m] += op.workspace_bytes
        if not step.fused or op.fusion == "extern":
            start.update((t, start.get(t, m)) for t in op.outputs)
            end.update((t, m) for t in (*op.outputs, *op.inputs))
    for t, use in uses.items():
        for m in use.reads if not use.returned else ():
            if m < len(order):
                here[m] += step.tensors[t].bytes
    results = {*step.forward.outputs, *step.backward.outputs}
    for t in start.keys() - set(step.resident):
        until = end[t] + 1
        if t in uses:
            until = len(order) if uses[t].returned else uses[t].left + 1
        elif t in results:
            until = len(order)
        change[start[t]] += step.tensors[t].bytes
        change[until] -= step.tensors[t].bytes
    return np.cumsum(change)[:-1] + here
