"""An FX node as a call at known sizes: what costs, workspaces and capture read.

In: nodes with fake values, whose sizes may be torch's symbols, and the symbols' values. Out: Calls whose tensors are
fake and whose sizes are ints.
What must hold: torch is never asked to compare or convert a symbolic size, because that adds a guard, and one such
guard ties the compiled graph to one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses import FakeTensorMode

from memplan.passes.compat import symbol_value


class Call(NamedTuple):
    """One call of an op, with fake tensors among its arguments, and the fake result."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Sizes:
    """`given`: values of size symbols; a symbol that is not there has the value that the graph was traced with."""

    given: tuple[tuple[str, int], ...] = ()
    mode: FakeTensorMode = field(default_factory=FakeTensorMode, compare=False, repr=False)
    known: dict[Any, int] = field(default_factory=dict, init=False, compare=False, repr=False)  # expression -> value

    def of(self, n: Any) -> int:
        """The value of a size."""
        if not isinstance(n, torch.SymInt):
            return int(n)
        expression = n.node.expr
        if expression not in self.known:
            given = dict(self.given)
            values = {s: given.get(str(s)) or symbol_value(n, s) for s in expression.free_symbols}
            self.known[expression] = int(expression.xreplace(values))
        return self.known[expression]

    def concrete(self, value: Any) -> Any:
        """The value with ints for sizes; a tensor without symbols is returned as it is."""
        return pytree.tree_map_only((torch.Tensor, torch.SymInt), self._concrete, value)

    def _concrete(self, value: torch.Tensor | torch.SymInt) -> Any:
        if isinstance(value, torch.SymInt):
            return self.of(value)
        if value.layout is not torch.strided:
            return value
        size, offset = value.untyped_storage().nbytes(), value.storage_offset()
        if not any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride(), size, offset)):
            return value
        shape, stride = tuple(map(self.of, value.shape)), tuple(map(self.of, value.stride()))
        with self.mode:
            base = torch.empty(self.of(size) // value.dtype.itemsize, dtype=value.dtype, device=value.device)
            return base.as_strided(shape, stride, self.of(offset))

    def call(self, node: fx.Node) -> Call:
        """The call that a node makes."""
        given = pytree.tree_map_only(fx.Node, lambda n: n.meta.get("val"), (node.args, dict(node.kwargs)))
        args, kwargs = self.concrete(given)
        return Call(node.target, args, kwargs, self.concrete(node.meta.get("val")))


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among an op's fake results or arguments."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def name(target: Any) -> str:
    """The op's name without namespace and overload: "mm"."""
    return getattr(getattr(target, "overloadpacket", target), "__name__", str(target))


def view_base(node: fx.Node) -> fx.Node | None:
    """The argument whose storage the result shares, by the op's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    results = [r.alias_info for r in schema.returns]
    first = schema.arguments[0].alias_info if schema.arguments else None
    if first is not None and not first.is_write and any(r is not None for r in results):
        return node.args[0]
    return None


def has_effects(node: fx.Node) -> bool:
    """No result of its own, and still not to be left out: an assertion, a copy into an input, a collective."""
    return node.is_impure() or bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they depend on."""
    return _reached(nodes, lambda n: n.all_input_nodes)


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that depend on them."""
    return _reached(nodes, lambda n: n.users)


def _reached(nodes: Iterable[fx.Node], follow: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    seen, stack = set[fx.Node](), list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(follow(node))
    return seen


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that a compiler may own, over the same parameters and fake values."""
    new = fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    module = fx.GraphModule(graph, new)
    module.meta = dict(graph.meta)
    return module
