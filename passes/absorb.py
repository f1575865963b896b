"""What a loop reads that is wide, and made from narrow things for it alone -> nodes of the loop.

Labels as one-hot rows; a reference model's logits; in the backward of an MLP, what its last product hands back. Most of
it does not follow from the rows of the region, so where its rows are is asked from its users: an elementwise op wants
the rows of its operands where its own are. It goes into a loop if all its users do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memplan.passes.bodies import VIEWS
from memplan.passes.calls import ancestors, name, tensors
from memplan.passes.compat import symbol_value
from memplan.passes.layouts import Layout, extent, has_rows, plain, regroup, shape_of
from memplan.passes.row_locality import ALONG, Region

SAME = (*VIEWS, "_to_copy", "clone", "detach", "alias", "full")  # whatever their rows are
REDUCTIONS = ("sum", "amax", "mean")


@dataclass(frozen=True)
class Loop:
    """What one call of memplan::tiled runs, in the graph's order, and which of it is returned."""

    nodes: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]  # keep rows, or reduce
    tangent: fx.Node | None = None  # a scalar that is 1 inside, and multiplies what depends on it outside


def absorbed(region: Region, loops: Sequence[Loop], limit: float) -> tuple[Region, list[Loop]]:
    """The region and the loops with what the loops absorb. `limit`: the elements from which something is wide."""
    inside = {n for loop in loops for n in loop.nodes}
    wanted = _wanted(inside, region)
    found = set(wanted)
    while outside := {n for n in found if not (inside | found).issuperset(n.users)}:
        found -= outside
    worth = set[fx.Node]()  # wide, or made of what is
    for node in next(iter(inside)).graph.nodes:
        if node in found and (elements(node) >= limit or not worth.isdisjoint(node.all_input_nodes)):
            worth.add(node)
    keeps = {**region.keeps, **{n: wanted[n] for n in worth}}
    out = [Loop(tuple(sorted({*loop.nodes, *(worth & ancestors(loop.nodes))})), loop.returned) for loop in loops]
    return Region(keeps, region.ends, region.turn), out


def _wanted(inside: set[fx.Node], region: Region) -> dict[fx.Node, Layout]:
    """What leads to the loops from outside of the region, with where its rows are for its users, all of which agree."""
    wanted, disputed = dict[fx.Node, Layout](), set[fx.Node]()
    stack = list(inside)
    while stack:
        user = stack.pop()
        for node in user.all_input_nodes:
            if node.op != "call_function" or node in inside or node in region.ends:
                continue
            layout = region.keeps.get(node) or _asked(node, user, wanted.get(user) or region.keeps[user])
            if layout is None or not any(map(has_rows, layout)):
                continue
            if node not in wanted:
                wanted[node] = layout
                stack.append(node)
            elif wanted[node] != layout:
                disputed.add(node)
    return {n: layout for n, layout in wanted.items() if n not in disputed}


def _asked(node: fx.Node, user: fx.Node, layout: Layout) -> Layout | None:
    """The layout that an operand has for its user to have one; None: it cannot be told, or it would mix rows."""
    found, sizes = None, shape(node)
    if sizes is None:
        return None
    if name(user.target) in VIEWS:
        found = regroup(layout, sizes)
    elif name(user.target) in REDUCTIONS:
        found = _unreduced(user, layout, sizes)
    elif _elementwise(user, layout) and len(sizes) == len(layout):
        found = tuple(dim if n == extent(dim) else plain(n) for n, dim in zip(sizes, layout, strict=True))
    if found is None or name(node.target) in SAME:
        return found
    if name(node.target) == "mm":
        return None if has_rows(found[1]) else found
    return found if _elementwise(node, found) or name(node.target) in REDUCTIONS else None


def _unreduced(user: fx.Node, layout: Layout, sizes: Sequence[Any]) -> Layout | None:
    """The layout of what is reduced, with the dimension kept, over something that is not rows."""
    if len(sizes) != len(layout):
        return None
    return tuple(plain(n) if not has_rows(dim) else dim for n, dim in zip(sizes, layout, strict=True))


def _elementwise(node: fx.Node, layout: Layout) -> bool:
    """Whether it is in the dimensions that have rows."""
    along = {**ALONG, "select_backward": 2, "select_scatter": 2}
    if name(node.target) in along:
        dim: Any = node.args[along[name(node.target)]]
        return not has_rows(layout[dim % len(layout)])
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def elements(node: fx.Node) -> float:
    """Elements of the first result, at the sizes it was traced with."""
    found = tensors(node.meta.get("val"))
    return float(math.prod(map(_traced, found[0].shape))) if found else 0.0


def _traced(n: int | torch.SymInt) -> int:
    """The size that it was traced with; to ask torch would add a guard."""
    if not isinstance(n, torch.SymInt):
        return n
    return int(n.node.expr.xreplace({s: symbol_value(n, s) for s in n.node.expr.free_symbols}))


def shape(node: fx.Node) -> Any:
    """The sizes of the first result, as expressions; None: it has none."""
    found = tensors(node.meta.get("val"))
    return shape_of(found[0]) if found else None
