"""Tile: a region that keeps rows apart -> a loop over slices of its rows, so that what is in it never exists whole.

Before: a graph, and a node [sequences, tokens, width] from which a region grows (row_locality.py). After: its widest
part (loops.py) is two calls of memplan::tiled, one in forward and one in backward, or a single one (same_pass.py). What
is wide is in them; what is narrow, such as log-probs, they return.

    before    h | logits = h W | log_softmax | logprobs |...| dlogits | dh = dlogits W', dW = dlogits' h
    after     h | logprobs = tiled(h, W, labels)        |...| dh, dW = tiled(h, W, labels, dlogprobs)

What must hold: the same values, up to the order of sums over rows. Where it cannot be, the graph is as it was, and the
reason is returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from memplan.passes.absorb import Loop, elements, shape
from memplan.passes.bodies import AXES, Body, NotTiled
from memplan.passes.calls import ancestors, descendants, name, tensors, view_base
from memplan.passes.capture import layer, source_line
from memplan.passes.compat import drop_dead_code
from memplan.passes.fused_head import SAID, fuse
from memplan.passes.layouts import Axis, shape_of
from memplan.passes.loops import WIDER, find, joined, needed_before
from memplan.passes.phases import is_backward
from memplan.passes.row_locality import Region, grow
from memplan.passes.selected import NotFused, selected
from memplan.passes.take_apart import take_apart
from memplan.runtime import tiled
from memplan.units import human

ForwardOf = Callable[[fx.GraphModule], set[fx.Node]]


@dataclass(frozen=True)
class Candidate:
    """What a region may grow from: a node, by name; where its products are in the user's program; its rows, and the
    bytes of all that its products make.
    """

    seed: str
    place: str
    layer: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate: in slices of so many rows, 0: those of linear_logprob, and the way its backward gets
    what forward computed; or the reason why not. `unfused`: why it is not linear_logprob, where that was asked for.
    """

    of: Candidate
    rows: int
    way: str = ""
    reason: str = ""
    unfused: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"not tiled, {self.of.place}: {self.reason}"
        if not self.rows:
            return f"tiled by linear_logprob, {human(self.of.bytes)} -> none, {self.way}: {self.of.place}"
        part = self.of.bytes * min(self.rows, self.of.rows) // self.of.rows
        return f"tiled by {self.rows} rows, {human(self.of.bytes)} -> {human(part)}, {self.way}: {self.of.place}"


RowsOf = Callable[[Candidate], int | None]  # how many rows a slice has; 0: they are too few; None: it stays as it is
WayOf = Callable[[Candidate], str]  # of linear_logprob, "auto": of its choice; empty: slices of the graph's own nodes


def forward_of_joint(num_fwd_outputs: int) -> ForwardOf:
    """Of a joint graph: what its first results depend on."""

    def forward(graph: fx.GraphModule) -> set[fx.Node]:
        outputs: Any = graph.graph.output_node().args[0]
        return ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))

    return forward


def tile_all(
    graph: fx.GraphModule,
    forward_of: ForwardOf,
    rows_of: RowsOf,
    *,
    inner: str = "eager",
    widest: bool = False,
    way_of: WayOf = lambda _: "",
) -> list[Outcome]:
    """Tile all regions that are to be, or only the one with the widest results; `inner` compiles the slices.
    `forward_of` says which nodes of the graph are forward. What is to be linear_logprob, and is not, runs in slices.
    """
    take_apart(graph)
    outcomes = []
    for k, found in enumerate(candidates(graph, forward_of)[: 1 if widest else None]):
        seed = next((n for n in _read_by_products(graph, forward_of(graph)) if n.name == found.seed), None)
        rows, way, unfused = rows_of(found), way_of(found), ""
        if seed is None:  # it went with another region
            continue
        if way:
            try:
                outcomes.append(Outcome(found, 0, way=fuse_head(graph, seed, forward_of, way)))
                continue
            except (NotFused, NotTiled) as e:
                looks_like_it = k == 0 or (isinstance(e, NotFused) and e.head)
                unfused = str(e) if looks_like_it or rows is None else ""
        if rows is not None:
            outcomes.append(_in_rows(graph, seed, forward_of, found, rows, inner, unfused))
        elif unfused:
            outcomes.append(Outcome(found, 0, reason=f"it is not linear_logprob: {unfused}", unfused=unfused))
    graph.graph.lint()
    graph.recompile()
    return outcomes


def _in_rows(
    graph: fx.GraphModule, seed: fx.Node, forward_of: ForwardOf, of: Candidate, rows: int, inner: str, unfused: str
) -> Outcome:
    if not rows:
        return Outcome(of, rows, reason=f"its {of.rows} rows are too few for slices", unfused=unfused)
    try:
        return Outcome(of, rows, _tile(graph, seed, forward_of, rows, inner), unfused=unfused)
    except NotTiled as e:
        return Outcome(of, rows, reason=str(e), unfused=unfused)


def candidates(graph: fx.GraphModule, forward_of: ForwardOf) -> list[Candidate]:
    """What products read whose results are wider. That of the widest comes first, of equals those of which backward
    reads something wide: what another model's head hands to it, as a reference does, is then one of its inputs.
    """
    found, forward = list[tuple[bool, Candidate]](), forward_of(graph)
    for seed, made in _read_by_products(graph, forward).items():
        place = next(filter(None, map(source_line, made)), seed.name)
        size = sum(elements(n) * tensors(n.meta["val"])[0].element_size() for n in made)
        rows_there = elements(made[0]) / max(1, int(shape(made[0])[-1]))
        alone = not any(_read_wide(n, forward) for n in made)
        found.append((alone, Candidate(seed.name, place, layer(made[0]), int(rows_there), int(size))))
    return [c for _, c in sorted(found, key=lambda f: (-f[1].bytes, f[0]))]


def _read_wide(product: fx.Node, forward: set[fx.Node]) -> bool:
    """Whether backward reads the product, or what forward makes of it that is no narrower."""
    stack, seen = [product], {product}
    while stack:
        for user in stack.pop().users:
            if user not in forward:
                return True
            if user not in seen and shape(user) and elements(user) >= elements(product):
                seen.add(user)
                stack.append(user)
    return False


def _read_by_products(graph: fx.GraphModule, forward: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Nodes [sequences, tokens, width], and the products that read them and whose results are wider."""
    products: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node in forward and name(node.target) in ("mm", "addmm"):
            rows: Any = node.args[-2]
            while (view_base(rows) is not None or name(rows.target) == "_unsafe_view") and len(shape(rows)) != 3:
                rows = rows.args[0]
            if len(shape(rows) or ()) == 3 and elements(node) >= WIDER * elements(rows):
                products.setdefault(rows, []).append(node)
    return products


def tile(graph: fx.GraphModule, seed: fx.Node, forward_of: ForwardOf, rows: int, inner: str = "eager") -> str:
    """Tile the region of `seed`, [sequences, tokens, width], in slices of `rows` rows at most. Returns the way: how its
    backward gets what forward computed. Raises NotTiled, with the graph as it was.
    """
    way = _tile(graph, seed, forward_of, rows, inner)
    graph.graph.lint()
    graph.recompile()
    return way


def _tile(graph: fx.GraphModule, seed: fx.Node, forward_of: ForwardOf, rows: int, inner: str) -> str:
    """The same; the graph's code is as it was."""
    region, loops = _found(seed, forward_of(graph))
    try:
        single = [joined(loops, region)]
        bodies, way = _bodies(single, region), "gradient in the same pass"
        loops = single
    except NotTiled as e:
        bodies, way = _bodies(loops, region), f"computed again in backward ({e})"
    now: dict[fx.Node, fx.Node] = {}  # what was returned by a loop -> what stands for it
    for loop, body in zip(loops, bodies, strict=True):
        _replace(graph.graph, loop, body, (rows, inner), now)
    _tidy(graph)
    return way


def fuse_head(graph: fx.GraphModule, seed: fx.Node, forward_of: ForwardOf, way: str) -> str:
    """Put linear_logprob in the place of the region of `seed`. Returns what is said of the way. Raises NotTiled or
    NotFused, with the graph as it was.
    """
    forward = forward_of(graph)
    region, loops = _found(seed, forward)
    found = selected(seed, region, loops, forward)
    said = SAID[fuse(graph.graph, seed, region, found, way)]
    _tidy(graph)
    assert found.product.name not in {n.name for n in graph.graph.nodes}
    return said


def _found(seed: fx.Node, forward: set[fx.Node]) -> tuple[Region, list[Loop]]:
    """The region of a node, and its loops. Raises NotTiled."""
    sizes = shape_of(seed.meta["val"])
    return find(seed, grow(seed, ((Axis(AXES[0], sizes[0]),), (Axis(AXES[1], sizes[1]),), (sizes[2],))), forward)


def _tidy(graph: fx.GraphModule) -> None:
    _sort(graph.graph)
    drop_dead_code(graph.graph)


def _bodies(loops: Sequence[Loop], region: Region) -> list[Body]:
    for loop in loops:
        if (early := needed_before(loop)) is not None:
            why = region.ends[early].reason if early in region.ends else "it is read out of the rows' order"
            raise NotTiled(f"rows mix at {source_line(early) or early.name}: {why}, and rows need the result")
    return [Body.of(loop.nodes, loop.returned, region) for loop in loops]


def _replace(graph: fx.Graph, loop: Loop, body: Body, how: tuple[int, str], now: dict[fx.Node, fx.Node]) -> None:
    rows, inner = how
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
                new.meta = dict(node.meta) | {"val": _value(new)}
            node.replace_all_uses_with(new)
            now[node] = new


def _units(graph: fx.Graph, tangent: fx.Node, wanted: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copies of what leads from the tangent to `wanted`, with 1 for the tangent; they belong to forward."""
    like = tangent.meta["val"]
    one = graph.call_function(torch.ops.aten.full.default, ([], 1), {"dtype": like.dtype, "device": like.device})
    one.meta["val"] = _value(one)
    units = {tangent: one}
    for node in sorted(descendants([tangent]) & ancestors(wanted) - {tangent}):
        units[node] = graph.node_copy(node, lambda n: units.get(n, n))
        units[node].meta["val"] = _value(units[node])  # what it is a view of, it is a view of the copy
    return units


def _value(node: fx.Node) -> Any:
    """What its target makes of fake values."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return target(*args, **kwargs)


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    new = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    new.meta["val"] = node.meta["val"].shape[dim]
    return new


def _sort(graph: fx.Graph) -> None:
    """Put each node behind what it reads, and else leave the order as it is: those that were put last move ahead of
    their users.
    """
    done, last = set[fx.Node](), None
    for node in list(graph.nodes):
        stack = [node]
        while stack:
            missing = [n for n in stack[-1].all_input_nodes if n not in done]
            if missing:
                stack.extend(missing)
            elif (n := stack.pop()) not in done:
                if last is not None and last.next is not n:
                    last.append(n)
                last = n
                done.add(n)
