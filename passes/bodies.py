"""Nodes of a region -> the text of their loop body (runtime/tiled.py), and what the loop reads.

In: nodes that keep rows apart, in order, with their layouts; those of them, and the sums over their rows, that are
returned. Out: a Body. Views of rows become views of a slice's rows. A slice of the tokens (the shift of language
models) and what undoes it in backward become nothing: the loop runs over the rows that are left. The others are zeros
in backward, which is checked of all that is returned with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from memplan.passes.calls import name, tensors
from memplan.passes.layouts import ONE, Axis, Dim, Layout, has_rows, plain, shape_of
from memplan.passes.row_locality import CONTRACTIONS, Region

AXES = ("sequences", "tokens")
VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias")
# A row of zeros stays one.
LINEAR = (*VIEWS, "expand", "t", "permute", "transpose", "unsqueeze", "squeeze", "neg", "clone", "detach", "alias",
          "_to_copy", "convert_element_type", "div", "slice", "sum")  # fmt: skip


class NotTiled(Exception):
    """Why a region stays as it is."""


@dataclass(frozen=True)
class Body:
    """`sizes`: of the row axes, and of those that dims name, each as an int or as (node, dimension) that has it."""

    inputs: tuple[fx.Node, ...]
    sizes: tuple[int | tuple[fx.Node, int], ...]
    text: Mapping[str, Any]

    @staticmethod
    def of(nodes: Sequence[fx.Node], returned: Sequence[fx.Node], region: Region) -> Body:
        """The body of these nodes. Raises NotTiled."""
        return _Writer(nodes, region).body(returned)


class _Writer:
    def __init__(self, nodes: Sequence[fx.Node], region: Region) -> None:
        self.nodes, self.region = nodes, region
        self.inputs: dict[tuple[fx.Node, str], int] = {}  # with its dims: a node may be read in two ways
        self.dims: list[list[list[Any]]] = []
        self.ops: list[list[Any]] = []
        self.values: dict[fx.Node, Any] = {}  # {"value": ("op" | "input", number)}
        self.one = False
        self.window = self._window()
        self.zeros = self._zeros()
        sequences = next(a.size for n in nodes for a in _axes(region.keeps[n]) if a.name == AXES[0])
        self.sizes: list[Any] = [sequences, self.window.size]  # expressions

    def body(self, returned: Sequence[fx.Node]) -> Body:
        for node in self.nodes:
            self.values[node] = self._node(node)
        outputs = [self._output(node) for node in returned]
        first = len(self.inputs)

        def numbered(value: Any) -> Any:
            if isinstance(value, tuple) and value and value[0] in ("op", "input"):
                return value[1] + (first if value[0] == "op" else 0)
            if isinstance(value, dict):
                return {k: numbered(v) for k, v in value.items()}
            return [numbered(v) for v in value] if isinstance(value, (list, tuple)) else value

        text = {"inputs": self.dims, "ops": self.ops, "outputs": outputs, "one": self.one}
        inputs = tuple(node for node, _ in self.inputs)
        return Body(inputs, tuple(self._given(size, inputs) for size in self.sizes), numbered(text))

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _window(self) -> Axis:
        """The tokens that all nodes have."""
        found = {a for n in self.nodes for a in _axes(self.region.keeps[n]) if a.name == AXES[1]}
        for axis in found:
            if all(_inside(axis, other) for other in found):
                return axis
        raise NotTiled("its parts have different tokens")

    def _zeros(self) -> set[fx.Node]:
        """Nodes whose rows beyond the window are zeros."""
        found = set[fx.Node]()
        for node in self.nodes:
            op = name(node.target)
            operands = node.all_input_nodes if op == "mul" else []
            if op in LINEAR or "_backward" in op:  # linear in the first operand: of a backward, the gradient
                operands = node.all_input_nodes[:1]
            if op in ("mm", "bmm"):
                operands = node.all_input_nodes
            if self._widens(node) or any(n in found for n in operands):
                found.add(node)
        return found

    def _widens(self, node: fx.Node) -> bool:
        """Whether it puts the window's rows among zeros."""
        if name(node.target) == "slice_scatter":
            base: Any = node.args[0]
            return (
                name(base.target) in ("full", "zeros")
                and (len(base.args) < 2 or base.args[1] == 0)
                and self._moves(node)
            )
        return name(node.target) == "slice_backward" and self._moves(node)

    def _moves(self, node: fx.Node) -> bool:
        """Whether a slice, or what undoes it, is along the tokens."""
        at = 1 if name(node.target) == "slice" else 2
        layout = self.region.keeps[node]
        dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
        return has_rows(layout[dim % len(layout)])

    def _complete(self, node: fx.Node) -> bool:
        """Whether the window's rows are all there is of it, but for zeros."""
        window = [a for a in _axes(self.region.keeps[node]) if a.name == AXES[1]]
        return node in self.zeros or window == [self.window]

    # ---- what is written -------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> Any:
        op, layout = name(node.target), self.region.keeps[node]
        if op in ("slice", "slice_backward", "slice_scatter") and self._moves(node):
            if op != "slice" and not self._widens(node):
                raise NotTiled(f"{node.name} puts rows among others that are not zeros")
            source: Any = node.args[1 if op == "slice_scatter" else 0]
            return self._operand(source, node)
        args = list(node.args)
        if op in (*VIEWS, "expand", "slice_backward", "select_backward"):
            args[1] = {"size": layout}
        if op == "full":
            args[0] = {"size": layout}
        self._write(node, args)
        return {"value": ("op", len(self.ops) - 1)}

    def _write(self, node: fx.Node, args: Sequence[Any]) -> None:
        written = [self._argument(a, node) for a in args]
        self.ops.append([_target(node), written, {k: self._argument(v, node) for k, v in node.kwargs.items()}])

    def _argument(self, value: Any, user: fx.Node) -> Any:
        if isinstance(value, fx.Node):
            if not tensors(value.meta.get("val")):
                raise NotTiled(f"{user.name} reads a size that depends on rows")
            return self._operand(value, user)
        if isinstance(value, dict):
            return [{"size": [self._extent(f) for f in dim]} for dim in value["size"]]
        if isinstance(value, (list, tuple)):
            return [self._argument(v, user) for v in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, (torch.layout, torch.memory_format)):
            return None
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise NotTiled(f"{user.name} has an argument {value!r:.40} that no text can say")
        return value

    def _extent(self, factor: Any) -> Any:
        """A factor of a view's size, for one slice."""
        return [AXES.index(factor.name)] if isinstance(factor, Axis) else _int(factor)

    def _operand(self, node: fx.Node, user: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        layout = self.region.keeps.get(node)
        dims = self._dims(self._aligned(node, user) if layout is None else layout)
        key = node, repr(dims)
        if key not in self.inputs:
            self.inputs[key] = len(self.dims)
            self.dims.append(dims)
        return {"value": ("input", self.inputs[key])}

    def _aligned(self, node: fx.Node, user: fx.Node) -> Layout:
        """Where rows are in an operand from outside of the region: where the other operands have them."""
        shape, op = shape_of(tensors(node.meta["val"])[0]), name(user.target)
        if op in CONTRACTIONS:
            terms, result = CONTRACTIONS[op].split("->")
            given, kept = terms.split(","), self.region.keeps.get(user, ())
            rows: dict[str, Dim] = {label: dim for label, dim in zip(result, kept, strict=False) if has_rows(dim)}
            for operand, labels in zip(user.args, given, strict=False):
                known = self.region.keeps.get(operand) if isinstance(operand, fx.Node) else None
                rows |= {label: dim for label, dim in zip(labels, known or (), strict=False) if has_rows(dim)}
            mine = next(labels for operand, labels in zip(user.args, given, strict=False) if operand is node)
            found = tuple(rows.get(label, plain(size)) for label, size in zip(mine, shape, strict=False))
            return found if mine else self._right(shape, self.region.keeps[user])
        if op == "select_backward" or (op == "select_scatter" and node is user.args[1]):
            whole = self.region.keeps[user]
            gone: Any = user.args[2]
            return tuple(dim for d, dim in enumerate(whole) if d != gone % len(whole))
        if op in ("embedding", "native_layer_norm"):
            return tuple(map(plain, shape))
        if user in self.region.keeps and len(shape) <= len(self.region.keeps[user]):
            return self._right(shape, self.region.keeps[user])
        return tuple(map(plain, shape))

    @staticmethod
    def _right(shape: Sequence[Any], layout: Layout) -> Layout:
        return tuple(
            dim if size != ONE and has_rows(dim) else plain(size)
            for size, dim in zip(shape, layout[len(layout) - len(shape) :], strict=True)
        )

    def _dims(self, layout: Layout) -> list[list[Any]]:
        for dim in layout:
            order = [AXES.index(f.name) if isinstance(f, Axis) else len(AXES) for f in dim]
            if has_rows(dim) and order != sorted(order):
                raise NotTiled("the rows of a slice do not follow each other")
            tokens = [f for f in dim if isinstance(f, Axis) and f.name == AXES[1]]
            self.one |= len(dim) > 1 and tokens not in ([], [self.window])
        return [[self._factor(f) for f in dim] for dim in layout]

    def _factor(self, factor: Any) -> Any:
        if not isinstance(factor, Axis):
            return _int(factor)
        start = self.window.start - factor.start if factor.name == AXES[1] else sympy.Integer(0)
        return [AXES.index(factor.name), _int(start), self._size(factor.size)]

    def _size(self, size: Any) -> int:
        if size not in self.sizes:
            self.sizes.append(size)
        return self.sizes.index(size)

    def _given(self, size: Any, inputs: Sequence[fx.Node]) -> int | tuple[fx.Node, int]:
        if size.is_Integer:
            return int(size)
        for node in inputs:
            shape = shape_of(tensors(node.meta["val"])[0])
            if size in shape:
                return node, shape.index(size)
        raise NotTiled(f"no input has the size {size}")

    def _output(self, node: fx.Node) -> dict[str, Any]:
        value = tensors(node.meta["val"])[0]
        out: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch.")}
        layout = self.region.keeps.get(node)
        if layout is not None:
            if not self._complete(node):
                raise NotTiled(f"{node.name} has rows that the loop does not run over")
            return out | {"kind": "rows", "value": self.values[node]["value"], "dims": self._dims(layout)}
        operands = [n for n in node.all_input_nodes if n in self.region.keeps]
        if not any(self._complete(n) for n in operands):
            raise NotTiled(f"{node.name} sums over rows that the loop does not run over")
        dims = self._dims(tuple(map(plain, shape_of(value))))
        if name(node.target) == "mm":
            a, b = (self._operand(n, node)["value"] for n in node.args if isinstance(n, fx.Node))
            return out | {"kind": "product", "value": [a, b], "dims": dims}
        if _partial(node, self.region):
            raise NotTiled(f"{node.name} sums over some of the rows only")
        self._write(node, node.args)
        return out | {"kind": "sum", "value": ("op", len(self.ops) - 1), "dims": dims}


def _partial(node: fx.Node, region: Region) -> bool:
    """Whether rows are left in what a sum returns."""
    source: Any = node.args[0]
    layout = region.keeps[source]
    given: Any = node.args[1] if len(node.args) > 1 and node.args[1] else range(len(layout))
    dims = {d % len(layout) for d in given}
    return any(has_rows(dim) for d, dim in enumerate(layout) if d not in dims)


def _axes(layout: Layout) -> list[Axis]:
    return [factor for dim in layout for factor in dim if isinstance(factor, Axis)]


def _inside(axis: Axis, other: Axis) -> bool:
    before, after = axis.start - other.start, (other.start + other.size) - (axis.start + axis.size)
    return bool(before.is_Integer and before >= 0 and after.is_Integer and after >= 0)


def _int(size: Any) -> int:
    if not size.is_Integer:
        raise NotTiled(f"a size {size} that is not of rows is not known")
    return int(size)


def _target(node: fx.Node) -> str:
    if name(node.target) == "getitem":
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NotTiled(f"{node.name} calls {node.target}, which no text can name")
    if name(node.target) in ("view", "_unsafe_view", "_reshape_alias"):
        return "aten.reshape.default"  # the part of a tensor is not contiguous where the whole is
    return str(node.target)
