"""Equal storages of equal layers, as one: the rows in which people read a plan.

In: a Plan. Out: its storages in groups of one decision, op, shape, source line and layer but for the layer's number;
most bytes first.
"""

import re
from collections import defaultdict

from memplan.ir import Plan

ROWS = 24  # groups that a table shows; the rest are counted in one line


def groups(plan: Plan) -> list[tuple[int, ...]]:
    """The storages that the plan decides about, group by group."""
    step = plan.step
    found: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for t, decision in plan.decisions:
        tensor = step.tensors[t]
        target = step.producer[t][1].target if t in step.producer else ""
        what = (type(decision), tensor.shape, tensor.dtype, target, any_layer(tensor.layer), tensor.source)
        found[what].append(t)
    return sorted(map(tuple, found.values()), key=lambda members: -sum(step.tensors[t].bytes for t in members))


def any_layer(path: str) -> str:
    """model.layers.3.mlp -> model.layers.*.mlp"""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)
