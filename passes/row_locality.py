"""What each node does to rows: keeps them apart, sums over them, needs them all, or mixes them.

In: an FX graph with fake values, and a node with a layout that says which of its dimensions are rows. Out: a Region:
the nodes downstream of it that keep rows apart, with their layouts; and its ends, the nodes that read the region and do
anything else, each with the reason. What is not downstream is outside: it is there whole, and any part can be taken.

    keeps    row i of the result depends on row i of what the region gives it, and on no other
    reduces  it sums, or averages, over rows
    whole    it needs all rows at once: a maximum over rows
    mixes    rows depend on each other, or nothing is known

`turn`: 0 for what depends on no end; 1 for what depends on one, and so cannot run before all rows of turn 0 have; ...
What must hold: what is said to keep or to reduce does, for all values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from memplan.passes.calls import name, tensors
from memplan.passes.layouts import (
    Axis,
    Dim,
    Layout,
    axes,
    broadcast,
    extent,
    has_rows,
    plain,
    regroup,
    shape_of,
    size_of,
)


@dataclass(frozen=True)
class End:
    """Why a node is not in the region."""

    kind: Literal["reduces", "whole", "mixes"]
    reason: str


@dataclass(frozen=True)
class Region:
    """`keeps`: node -> layout of its result, of the first if it has several. `turn` is of both."""

    keeps: Mapping[fx.Node, Layout]
    ends: Mapping[fx.Node, End]
    turn: Mapping[fx.Node, int]

    def __str__(self) -> str:
        lines = [f"{len(self.keeps)} nodes keep rows apart"]
        lines += [f"  {n.name} {end.kind}: {end.reason}" for n, end in self.ends.items()]
        return "\n".join(lines)


def grow(seed: fx.Node, layout: Layout) -> Region:
    """The region of the rows of `seed`. Its graph must be functional and in topological order."""
    keeps: dict[fx.Node, Layout] = {seed: layout}
    ends: dict[fx.Node, End] = {}
    turn: dict[fx.Node, int] = {seed: 0}
    for node in seed.graph.nodes:
        known = [n for n in node.all_input_nodes if n in turn]
        if node is seed or not known or node.op != "call_function" or not tensors(node.meta.get("val")):
            continue
        turn[node] = max(turn[n] + (n in ends) for n in known)
        if any(n in keeps for n in known):
            found = _transfer(node, keeps)
            if isinstance(found, End):
                ends[node] = found
            else:
                keeps[node] = found
    return Region(keeps, ends, turn)


def _transfer(node: fx.Node, keeps: Mapping[fx.Node, Layout]) -> Layout | End:
    tags = getattr(node.target, "tags", ())
    rule = _RULES.get(name(node.target))
    if rule is None and torch.Tag.pointwise in tags:
        rule = _random if torch.Tag.nondeterministic_seeded in tags else _pointwise
    if rule is None:
        return End("mixes", f"nothing is known of {node.target}")
    use = _Use(node, keeps)
    found = rule(use)
    if isinstance(found, End):
        return found
    if found is None or not axes(found) or tuple(map(extent, found)) != use.shape:
        return End("mixes", f"rows of the operands of {name(node.target)} do not meet, or are not all there")
    return found


class _Use:
    """A node, as rules look at it."""

    def __init__(self, node: fx.Node, keeps: Mapping[fx.Node, Layout]) -> None:
        self.node, self.keeps = node, keeps
        self.shape = shape_of(tensors(node.meta["val"])[0])

    def argument(self, index: int, label: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(label, default)

    def layout(self, index: int) -> Layout | None:
        """The layout of an argument in the region; None: it is outside."""
        argument = self.argument(index, "")
        return self.keeps.get(argument) if isinstance(argument, fx.Node) else None

    def inside(self) -> list[Layout]:
        """The layouts of all arguments in the region."""
        return [self.keeps[n] for n in self.node.all_input_nodes if n in self.keeps]

    def rank(self, index: int) -> int:
        argument: Any = self.argument(index, "")
        return int(argument.meta["val"].dim())


Rule = Callable[[_Use], "Layout | End | None"]  # None: the operands' rows do not meet


def _pointwise(use: _Use) -> Layout | End | None:
    return broadcast(use.inside(), use.shape)


def _along(at: int, label: str) -> Rule:
    """An op that works along one dimension, an argument, and is elementwise in the others."""

    def rule(use: _Use) -> Layout | End | None:
        (first, *more), dim = use.inside(), use.argument(at, label, -1)
        if any(len(layout) != len(first) for layout in more) or len(first) != len(use.shape):
            return None
        dim %= len(first)
        if any(has_rows(layout[dim]) for layout in (first, *more)):
            return End("mixes", f"it works along the rows (dimension {dim})")
        others = [tuple(() if d == dim else part for d, part in enumerate(layout)) for layout in (first, *more)]
        found = broadcast(others, use.shape)
        return found

    return rule


def _contraction(terms: str) -> Rule:
    """A product of sums, by the labels of its operands' dimensions: "ik,kj->ij"."""
    given, result = terms.split("->")
    operands = given.split(",")
    first = 1 if len(operands[0]) == 0 else 0  # addmm: what is added comes first

    def rule(use: _Use) -> Layout | End | None:
        dims: dict[str, Dim] = {}
        if first and use.layout(0) is not None:
            return None
        for index, labels in enumerate(operands[first:], first):
            for label, dim in zip(labels, use.layout(index) or (), strict=False):
                if has_rows(dim) and dims.setdefault(label, dim) != dim:
                    return None
        if len(axes(dims.values())) != len(set(axes(dims.values()))):
            return None
        if all((layout := use.layout(i)) is None or not axes(layout) for i in range(first, len(operands))):
            return None
        if summed := set(dims) - set(result):
            rows = ", ".join(axes(dims[label] for label in summed))
            return None if first else End("reduces", f"it multiplies over rows ({rows})")
        return tuple(dims.get(label, plain(size)) for label, size in zip(result, use.shape, strict=True))

    return rule


def _reduction(kind: Literal["reduces", "whole"], verb: str) -> Rule:
    def rule(use: _Use) -> Layout | End | None:
        given = use.argument(1, "dim")
        if isinstance(given, fx.Node):  # the larger of two tensors
            return _pointwise(use)
        (layout,) = use.inside()
        given = [given] if isinstance(given, int) else given
        dims = {d % len(layout) for d in given} if given else set(range(len(layout)))
        if any(has_rows(layout[d]) for d in dims):
            return End(kind, f"it {verb} rows ({', '.join(axes(layout[d] for d in sorted(dims)))})")
        kept = len(use.shape) == len(layout)
        return tuple(() if d in dims else dim for d, dim in enumerate(layout) if kept or d not in dims)

    return rule


def _view(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    return regroup(layout, use.shape) or End("mixes", "a view splits or joins rows")


def _permute(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    order = [int(d) for d in use.argument(1, "dims")]
    return tuple(layout[d] for d in order)


def _transpose(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    a, b = (use.argument(i, f"dim{i - 1}", i - 1) % len(layout) for i in (1, 2)) if len(layout) > 1 else (0, 0)
    order = list(range(len(layout)))
    order[a], order[b] = b, a
    return tuple(layout[d] for d in order)


def _unsqueeze(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    at = use.argument(1, "dim") % (len(layout) + 1)
    return (*layout[:at], (), *layout[at:])


def _squeeze(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    dims = use.argument(1, "dim")
    dims = range(len(layout)) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {d % len(layout) for d in dims if not layout[d]}
    return tuple(dim for d, dim in enumerate(layout) if d not in drop)


def _expand(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    return broadcast([layout], use.shape)


def _slice(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    return _window(use, layout, at=1, back=False)


def _slice_backward(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    return _window(use, layout, at=2, back=True)


def _slice_scatter(use: _Use) -> Layout | End | None:
    base, part = use.layout(0), use.layout(1)
    widened = _window(use, part, at=2, back=True) if part is not None else base
    return widened if base is None or widened == base else None


def _window(use: _Use, layout: Layout, *, at: int, back: bool) -> Layout | End | None:
    """A slice, or with `back` what undoes it: the rows that it left out are constant."""
    dim = use.argument(at, "dim", 0) % len(layout)
    start, step = use.argument(at + 1, "start", 0) or 0, use.argument(at + 3, "step", 1)
    if not has_rows(layout[dim]):
        return tuple(plain(use.shape[d]) if d == dim else part for d, part in enumerate(layout))
    axis = layout[dim][0]
    if step != 1 or len(layout[dim]) != 1 or not isinstance(axis, Axis) or isinstance(start, fx.Node):
        return End("mixes", "it takes rows out of order")
    whole = use.shape[dim] if back else axis.size
    first = size_of(start) if start >= 0 else whole + size_of(start)
    moved = Axis(axis.name, use.shape[dim], axis.start - first if back else axis.start + first)
    return tuple((moved,) if d == dim else part for d, part in enumerate(layout))


def _select(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    dim = use.argument(1, "dim", 0) % len(layout)
    return End("mixes", "it takes one row") if has_rows(layout[dim]) else (*layout[:dim], *layout[dim + 1 :])


def _select_back(use: _Use) -> Layout | End | None:
    """What undoes a select: a dimension comes back, with zeros, or a base, beside what was selected."""
    scatter = name(use.node.target) == "select_scatter"
    base, part = (use.layout(0), use.layout(1)) if scatter else (None, use.layout(0))
    dim = use.argument(2, "dim") % len(use.shape)
    if base is not None and has_rows(base[dim]):
        return End("mixes", "it puts one row among others")
    widened = (*part[:dim], plain(use.shape[dim]), *part[dim:]) if part is not None else base
    return widened if base is None or widened == base else None


def _cat(use: _Use) -> Layout | End | None:
    dim = use.argument(1, "dim", 0) % len(use.shape)
    inside = use.inside()
    if any(has_rows(layout[dim]) for layout in inside):
        return End("mixes", "it joins rows")
    return broadcast([tuple(() if d == dim else p for d, p in enumerate(layout)) for layout in inside], use.shape)


def _pieces(use: _Use) -> Layout | End | None:
    (layout,) = use.inside()
    dim = use.argument(2, "dim", 0) % len(layout)
    if has_rows(layout[dim]):
        return End("mixes", "it splits rows")
    return tuple(plain(use.shape[d]) if d == dim else part for d, part in enumerate(layout))


def _getitem(use: _Use) -> Layout | End | None:
    """A result of an op with several: row dimensions are where they are in the first, the others as they come."""
    source: Any = use.node.args[0]
    layout = use.keeps[source]
    if name(source.target) == "native_layer_norm_backward" and use.node.args[1]:
        return End("reduces", f"it sums over rows ({', '.join(axes(layout))})")
    if len(use.shape) < len(layout) and any(has_rows(dim) for dim in layout[1:]):
        return None
    return tuple(
        layout[d] if d < len(layout) and has_rows(layout[d]) else plain(size) for d, size in enumerate(use.shape)
    )


def _embedding(use: _Use) -> Layout | End | None:
    layout = use.layout(1)
    return None if layout is None or use.layout(0) is not None else (*layout, plain(use.shape[-1]))


def _layer_norm(shape_at: int) -> Rule:
    def rule(use: _Use) -> Layout | End | None:
        inside = use.inside()
        count = len(use.argument(shape_at, "normalized_shape"))
        if any(has_rows(dim) for layout in inside for dim in layout[len(layout) - count :]):
            return End("whole", "it normalises over rows")
        return broadcast(inside, use.shape)

    return rule


def _batched(use: _Use) -> Layout | End | None:
    """An op whose operands' first dimension is a batch: attention."""
    inside = use.inside()
    first = {layout[0] for layout in inside}
    labels = [a.name for a in use.node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" in labels and use.argument(labels.index("dropout_p"), "dropout_p", 0.0):
        return _random(use)
    if any(has_rows(dim) for layout in inside for dim in layout[1:]):
        return End("mixes", "attention is over rows")
    return (first.pop(), *map(plain, use.shape[1:])) if len(first) == 1 else None


def _sums_into(use: _Use) -> Layout | End | None:
    return End("reduces", f"it adds rows up by their indices ({', '.join(axes(use.inside()[0]))})")


def _random(use: _Use) -> Layout | End | None:
    return End("mixes", "it draws random numbers, and parts of the rows would draw others")


_ATTENTION = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
CONTRACTIONS = {"mm": "ik,kj->ij", "addmm": ",ik,kj->ij", "bmm": "bik,bkj->bij"}  # labels of dimensions, as einsum's
ALONG = {  # op -> which argument is its dimension
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "gather", "scatter", "scatter_add"), 1),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), 2),
}
_RULES: dict[str, Rule] = {
    **{op: _contraction(terms) for op, terms in CONTRACTIONS.items()},
    "sum": _reduction("reduces", "sums over"),
    "mean": _reduction("reduces", "averages over"),
    **{
        op: _reduction("whole", "needs all")
        for op in ("amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "prod", "logsumexp")
    },
    **{op: _reduction("whole", "needs all") for op in ("var", "var_mean", "std", "std_mean")},
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    "permute": _permute,
    **dict.fromkeys(("t", "transpose"), _transpose),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    "slice_backward": _slice_backward,
    "slice_scatter": _slice_scatter,
    "select": _select,
    **dict.fromkeys(("select_backward", "select_scatter"), _select_back),
    "cat": _cat,
    **dict.fromkeys(("split", "split_with_sizes"), _pieces),
    "getitem": _getitem,
    **{op: _along(at, "dim") for op, at in ALONG.items()},
    "topk": _along(2, "dim"),
    "sort": _along(1, "dim"),
    "embedding": _embedding,
    "embedding_dense_backward": _sums_into,
    "native_layer_norm": _layer_norm(1),
    "native_layer_norm_backward": _layer_norm(2),
    **{f"_scaled_dot_product_{kind}{way}": _batched for kind in _ATTENTION for way in ("", "_backward")},
    **dict.fromkeys(("native_dropout", "bernoulli", "rand_like", "randn_like", "inductor_random"), _random),
    **dict.fromkeys(
        ("clone", "detach", "alias", "_to_copy", "lift_fresh_copy", "full_like", "convert_element_type"), _pointwise
    ),
    **dict.fromkeys(("masked_fill", "zeros_like", "ones_like", "where"), _pointwise),
}
