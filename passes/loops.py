"""A region that keeps rows apart -> the loops that run its widest part slice by slice.

In: the region of a node, and which nodes are forward. Out: a loop of what is wide in forward, and what lies between;
and one of what is wide in backward, which computes again what it needs of the first. Or one that does all of it.
What a loop returns is narrow, or a sum over rows. Beyond what has the region's own width another region begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import fx

from memplan.passes.absorb import Loop, absorbed, elements
from memplan.passes.bodies import NotTiled
from memplan.passes.calls import ancestors, name, view_base
from memplan.passes.row_locality import Region
from memplan.passes.same_pass import between

WIDER = 1.5  # a node is wide if it has this many times the elements of the seed


def find(seed: fx.Node, region: Region, forward: set[fx.Node]) -> tuple[Region, list[Loop]]:
    """The loop of forward and that of backward, and the region with what they absorb. Raises NotTiled."""
    limit = WIDER * elements(seed)
    wide = {n for n in _near(seed, region, limit) if elements(n) >= limit}
    ahead = _between(wide & forward, region)
    if not ahead:
        raise NotTiled("nothing in forward is wider than the rows it comes from")
    found = [_loop(ahead, region, lambda user: user in forward)]
    behind = _between(wide - forward, region) - forward
    again = ahead & ancestors([*behind, *(u for n in ahead for u in n.users if u not in forward)])
    if behind or again:
        found.append(_loop(behind | again, region, lambda user: user not in forward))
    return absorbed(region, found, limit)


def _near(seed: fx.Node, region: Region, limit: float) -> set[fx.Node]:
    """What follows from the seed without passing through something of its own size, other than views of it: beyond that
    another region begins.
    """
    near = {seed}
    for node in region.keeps:
        if any(n in near for n in node.all_input_nodes):
            same = elements(seed) / WIDER < elements(node) < limit
            if not same or view_base(node) is not None or name(node.target) in ("_unsafe_view", "clone", "_to_copy"):
                near.add(node)
    return near


def joined(loops: Sequence[Loop], region: Region) -> Loop:
    """One loop in forward for both. Raises NotTiled."""
    if len(loops) < 2:
        raise NotTiled("nothing of it is needed there")
    ahead, behind = loops
    inner, tangent = between(ahead.nodes, behind.nodes, behind.returned, region)
    nodes = sorted({*ahead.nodes, *inner, *behind.nodes})
    return Loop(tuple(nodes), (*ahead.returned, *(n for n in behind.returned if n not in ahead.returned)), tangent)


def _loop(core: set[fx.Node], region: Region, counts: Callable[[fx.Node], bool]) -> Loop:
    """The loop that runs `core`, and returns what users that count make of it."""
    returned: dict[fx.Node, None] = {}
    for node in core:
        for user in node.users:
            if user in core or (user.op != "output" and not counts(user)):
                continue
            if user.op == "output":
                raise NotTiled(f"{node.name} is returned whole; compute the loss where it is made, and return the loss")
            end = region.ends.get(user)
            if end is not None and (end.kind != "reduces" or name(user.target) not in ("mm", "sum")):
                raise NotTiled(f"{user.name} needs all rows: {end.reason}")
            if end is None and user not in region.keeps:
                raise NotTiled(f"{user.name} reads {node.name} whole")
            if not isinstance(user.meta.get("val"), torch.Tensor):
                raise NotTiled(f"{user.name} makes several tensors of {node.name}, and they are all needed")
            returned[user] = None
    nodes = sorted({*core, *(n for n in returned if n in region.keeps)})
    return Loop(tuple(nodes), tuple(sorted(returned)))


def _between(wide: Collection[fx.Node], region: Region) -> set[fx.Node]:
    """Wide nodes, and what leads from one to another inside the region."""
    before, after = ancestors(wide), set[fx.Node]()
    for node in region.keeps:
        if node in wide or any(n in after for n in node.all_input_nodes):
            after.add(node)
    return {n for n in after if n in before}


def needed_before(loop: Loop) -> fx.Node | None:
    """Something that the loop returns, and that what it reads depends on: rows need it before all of them are there."""
    inside = set(loop.nodes)
    read = {n for node in (*loop.nodes, *loop.returned) for n in node.all_input_nodes} - inside
    before = ancestors(read)
    return next((n for n in loop.returned if n in before), None)
