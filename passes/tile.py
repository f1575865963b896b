"""A region that keeps rows apart -> a loop over slices of its rows, so that what is in it never exists whole.

Before: a joint graph, and a node [sequences, tokens, width] from which a region grows (row_locality.py). After: its
widest part is two calls of memplan::tiled, one in forward and one in backward, which computes again what it needs of
forward. What is wide is in them; what is narrow, such as log-probs, they return.

    before    h | logits = h W | log_softmax | logprobs |...| dlogits | dh = dlogits W', dW = dlogits' h
    after     h | logprobs = tiled(h, W, labels)        |...| dh, dW = tiled(h, W, labels, dlogprobs)

What must hold: the same values, up to the order of sums over rows. Where it cannot be, the graph is as it was, and the
reason is returned.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from memplan.passes import cross_entropy
from memplan.passes.bodies import AXES, VIEWS, Body, NotTiled
from memplan.passes.calls import ancestors, descendants, name, tensors, view_base
from memplan.passes.capture import source_line
from memplan.passes.compat import drop_dead_code, symbol_value
from memplan.passes.layouts import Axis, Layout, has_rows, regroup, shape_of
from memplan.passes.phases import is_backward
from memplan.passes.row_locality import Region, grow
from memplan.passes.same_pass import between
from memplan.runtime import tiled

ForwardOf = Callable[[fx.GraphModule], set[fx.Node]]
NOTES = "memplan_tiles"  # in a module's meta: what was tiled, and what not
WIDER = 1.5  # a node is wide if it has this many times the bytes of the seed


@dataclass(frozen=True)
class Loop:
    """What one call of memplan::tiled runs, in the graph's order, and which of it is returned."""

    nodes: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]  # keep rows, or reduce
    tangent: fx.Node | None = None  # a scalar that is 1 inside, and multiplies what depends on it outside


def forward_of_joint(num_fwd_outputs: int) -> ForwardOf:
    """Of a joint graph: what its first results depend on."""

    def forward(joint: fx.GraphModule) -> set[fx.Node]:
        outputs: Any = joint.graph.output_node().args[0]
        return ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))

    return forward


def tile_all(
    joint: fx.GraphModule, forward_of: ForwardOf, rows: int, *, inner: str = "eager", widest: bool = False
) -> tuple[str, ...]:
    """Tile all regions, or only the one with the widest results; `inner` compiles the slices. `forward_of` says which
    nodes of the graph are forward. Returns what was done, and what was not and why.
    """
    cross_entropy.take_apart(joint)
    _free_seeds(joint.graph)
    notes = []
    seeds = [seed.name for seed in candidates(joint, forward_of)]
    for wanted in seeds[:1] if widest else seeds:
        seed = next((n for n in joint.graph.nodes if n.name == wanted), None)
        if seed is None:  # it went with another region
            continue
        source = next((line for line in map(source_line, seed.users) if line), wanted)
        try:
            way = tile(joint, seed, forward_of, rows, inner)
        except NotTiled as e:
            notes.append(f"not tiled, {source}: {e}")
        else:
            notes.append(f"tiled by {rows} rows, {way}: {source}")
    if not notes:
        notes.append("not tiled: no product of [sequences, tokens, width] makes its rows wider")
    return tuple(f"{note} (x{n})" if n > 1 else note for note, n in Counter(notes).items())


def _free_seeds(graph: fx.Graph) -> None:
    """ones_like(loss), which starts a backward inside of a graph, does not depend on the loss."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.ones_like.default):
        value = node.meta["val"]
        if value.dim() == 0:
            node.target, node.args = torch.ops.aten.full.default, ([], 1)
            node.kwargs = {"dtype": value.dtype, "device": value.device}


def candidates(joint: fx.GraphModule, forward_of: ForwardOf) -> list[fx.Node]:
    """What a region may grow from, [sequences, tokens, width]: what products read whose results are wider. The one with
    the widest result comes first.
    """
    forward = forward_of(joint)
    found: dict[fx.Node, float] = {}
    for node in joint.graph.nodes:
        if node in forward and name(node.target) in ("mm", "addmm"):
            rows: Any = node.args[-2]
            while view_base(rows) is not None or name(rows.target) == "_unsafe_view":
                if len(_shape(rows)) == 3:
                    break
                rows = rows.args[0]
            if len(_shape(rows) or ()) == 3 and _elements(node) >= WIDER * _elements(rows):
                found[rows] = found.get(rows, 0.0) + _elements(node)
    return sorted(found, key=lambda n: -found[n])


def tile(joint: fx.GraphModule, seed: fx.Node, forward_of: ForwardOf, rows: int, inner: str = "eager") -> str:
    """Tile the region of `seed`, [sequences, tokens, width], in slices of `rows` rows at most. Returns the way: how its
    backward gets what forward computed. Raises NotTiled, with the graph as it was.
    """
    shape = shape_of(seed.meta["val"])
    region = grow(seed, ((Axis(AXES[0], shape[0]),), (Axis(AXES[1], shape[1]),), (shape[2],)))
    region, loops = find(joint, seed, region, forward_of)
    try:
        joined = [_joined(loops, region)]
        bodies, way = _bodies(joined, region), "gradient in the same pass"
        loops = joined
    except NotTiled as e:
        bodies, way = _bodies(loops, region), f"computed again in backward ({e})"
    now: dict[fx.Node, fx.Node] = {}  # what was returned by a loop -> what stands for it
    for loop, body in zip(loops, bodies, strict=True):
        _replace(joint, loop, body, (rows, inner), now)
    joint.graph = _sort(joint.graph)
    drop_dead_code(joint.graph)
    joint.graph.lint()
    joint.recompile()
    return way


def _joined(loops: Sequence[Loop], region: Region) -> Loop:
    """One loop in forward for both. Raises NotTiled."""
    if len(loops) < 2:
        raise NotTiled("nothing of it is needed there")
    ahead, behind = loops
    inner, tangent = between(ahead.nodes, behind.nodes, behind.returned, region)
    nodes = sorted({*ahead.nodes, *inner, *behind.nodes})
    return Loop(tuple(nodes), (*ahead.returned, *(n for n in behind.returned if n not in ahead.returned)), tangent)


def _bodies(loops: Sequence[Loop], region: Region) -> list[Body]:
    if any(_reaches(loop) for loop in loops):
        raise NotTiled("what the loop returns is read by something that the loop reads")
    return [Body.of(loop.nodes, loop.returned, region) for loop in loops]


def find(joint: fx.GraphModule, seed: fx.Node, region: Region, forward_of: ForwardOf) -> tuple[Region, list[Loop]]:
    """The loop of forward and that of backward, and the region with what they absorb. Raises NotTiled."""
    forward = forward_of(joint)
    limit = WIDER * _elements(seed)
    wide = {n for n in _near(seed, region, limit) if _elements(n) >= limit}
    ahead = _between(wide & forward, region)
    if not ahead:
        raise NotTiled("nothing in forward is wider than the rows it comes from")
    found = [_loop(ahead, region, lambda user: user in forward)]
    behind = _between(wide - forward, region) - forward
    again = ahead & ancestors([*behind, *(u for n in ahead for u in n.users if u not in forward)])
    if behind or again:
        found.append(_loop(behind | again, region, lambda user: user not in forward))
    region, found = _absorbing(region, found, limit)
    return region, found


def _near(seed: fx.Node, region: Region, limit: float) -> set[fx.Node]:
    """What follows from the seed without passing through something of its own size, other than views of it: beyond that
    another region begins.
    """
    near = {seed}
    for node in region.keeps:
        if any(n in near for n in node.all_input_nodes):
            same = _elements(seed) / WIDER < _elements(node) < limit
            if not same or view_base(node) is not None or name(node.target) in ("_unsafe_view", "clone", "_to_copy"):
                near.add(node)
    return near


def _absorbing(region: Region, loops: Sequence[Loop], limit: float) -> tuple[Region, list[Loop]]:
    """Take into the loops what is wide and made from outside of the region for them alone: the labels, one-hot; in the
    backward of an MLP, what its last product hands back.
    """
    keeps, out = dict(region.keeps), list[Loop]()
    for loop in loops:
        nodes = set(loop.nodes)
        stack = list(loop.nodes)
        while stack:
            user = stack.pop()
            for node in user.all_input_nodes:
                if node in nodes or _elements(node) < limit or not nodes.issuperset(node.users):
                    continue
                layout = _asked(node, user, keeps[user])
                if layout is not None and region.keeps.get(node, layout) == layout:
                    keeps[node] = layout
                    nodes.add(node)
                    stack.append(node)
        out.append(Loop(tuple(sorted(nodes)), loop.returned))
    return Region(keeps, region.ends, region.turn), out


def _asked(node: fx.Node, user: fx.Node, layout: Layout) -> Layout | None:
    """The layout that an operand has for its user to have one; None: it cannot be told, or it would mix rows."""
    found: Layout | None = None
    if name(user.target) in VIEWS:
        found = regroup(layout, _shape(node))
    elif torch.Tag.pointwise in getattr(user.target, "tags", ()) and _shape(node) == _shape(user):
        found = layout
    if found is None or name(node.target) in (*VIEWS, "_to_copy", "clone", "detach", "alias"):
        return found
    if name(node.target) == "mm":
        return None if has_rows(found[1]) else found
    return found if torch.Tag.pointwise in getattr(node.target, "tags", ()) else None


def _shape(node: fx.Node) -> Any:
    found = tensors(node.meta.get("val"))
    return shape_of(found[0]) if found else None


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


def _elements(node: fx.Node) -> float:
    """Elements of the first result, at the sizes it was traced with."""
    found = tensors(node.meta.get("val"))
    return float(math.prod(map(_traced, found[0].shape))) if found else 0.0


def _traced(n: int | torch.SymInt) -> int:
    """The size that it was traced with; to ask torch would add a guard."""
    if not isinstance(n, torch.SymInt):
        return n
    return int(n.node.expr.xreplace({s: symbol_value(n, s) for s in n.node.expr.free_symbols}))


def _reaches(loop: Loop) -> bool:
    """Whether something that the loop reads depends on what it returns."""
    inside = set(loop.nodes)
    read = {n for node in (*loop.nodes, *loop.returned) for n in node.all_input_nodes} - inside
    return not ancestors(read).isdisjoint(loop.returned)


def _replace(joint: fx.GraphModule, loop: Loop, body: Body, how: tuple[int, str], now: dict[fx.Node, fx.Node]) -> None:
    graph, (rows, inner) = joint.graph, how
    mode = detect_fake_mode([n.meta.get("val") for n in body.inputs])
    assert mode is not None
    with graph.inserting_before(graph.output_node()), mode:
        units = _units(graph, loop.tangent, body.inputs) if loop.tangent is not None else {}
        scaled = descendants(units)
        inputs = [units.get(n) or now.get(n, n) for n in body.inputs]
        sizes = [
            size if isinstance(size, int) else _size(graph, now.get(size[0], size[0]), size[1]) for size in body.sizes
        ]
        call = graph.call_function(tiled.OP, (inputs, sizes, json.dumps({**body.text, "inner": inner}), rows))
        call.meta["val"] = tiled.OP(*fx.map_arg(call.args, lambda n: n.meta["val"]))
        where = loop.nodes[0].meta | {"autograd_backward": all(map(is_backward, loop.returned))}
        call.meta |= {k: where[k] for k in ("stack_trace", "nn_module_stack", "autograd_backward") if k in where}
        for k, node in enumerate(loop.returned):
            new = graph.call_function(getitem, (call, k))
            new.meta = dict(node.meta) | {"val": call.meta["val"][k]}
            if node in scaled:
                new = graph.call_function(torch.ops.aten.mul.Tensor, (new, loop.tangent))
                new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            now[node] = new


def _units(graph: fx.Graph, tangent: fx.Node, wanted: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies of what leads from the tangent to `wanted`, with 1 for the tangent; they belong to forward."""
    like = tangent.meta["val"]
    one = graph.call_function(torch.ops.aten.full.default, ([], 1), {"dtype": like.dtype, "device": like.device})
    one.meta["val"] = one.target([], 1, **one.kwargs)  # type: ignore[operator]
    units = {tangent: one}
    for node in sorted(descendants([tangent]) & ancestors(wanted) - {tangent}):
        units[node] = graph.node_copy(node, lambda n: units.get(n, n))
    return units


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    new = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    new.meta["val"] = node.meta["val"].shape[dim]
    return new


def _sort(graph: fx.Graph) -> fx.Graph:
    """Put each node behind what it reads, and else leave the order as it is: those that were put last move ahead of
    their users.
    """
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()

    def emit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            missing = [n for n in stack[-1].all_input_nodes if n not in made]
            if missing:
                stack.extend(missing)
            elif (n := stack.pop()) not in made:
                made[n] = new.node_copy(n, lambda x: made[x])

    for node in graph.nodes:
        emit(node)
    return new
