"""Labels of rows, as a graph has them: some node of integers, and what it was made of.

Losses give labels that do not count another value, and forward and backward each do so on their own: two nodes are the
same labels if they are made of the same node, and agree for tokens and for all numbers that they compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memplan.passes.bodies import VIEWS
from memplan.passes.calls import name

Known = Mapping[fx.Node, Tensor]
_SHAPES = (*VIEWS, "expand", "unsqueeze", "squeeze", "clone", "alias", "detach")  # they leave values as they are
_VALUES = ("where", "eq", "ne", "ge", "lt", "clamp", "clamp_min", "_to_copy", "convert_element_type", "masked_fill")


@dataclass(frozen=True)
class Labels:
    """`node` holds them; it follows from `base` alone, value by value."""

    node: fx.Node
    base: fx.Node

    @staticmethod
    def of(node: fx.Node, known: Known) -> Labels:
        """The labels that a node holds; `known`: constants of the graph."""
        leaves = {n for n in _made_of(node, known) if not _inside(n)}
        return Labels(node, leaves.pop() if len(leaves) == 1 else node)

    def read_by(self, target: Any) -> bool:
        """Whether such an op reads them."""
        return any(user.target is target for user in self.node.users)

    def same(self, other: Labels, known: Known) -> bool:
        """Whether both hold the same labels."""
        if self.node is other.node:
            return True
        if self.base is not other.base:
            return False
        numbers = {*range(5), *_numbers(self.node, known), *_numbers(other.node, known)}
        tokens = torch.tensor([n + d for n in sorted(numbers) for d in (-1, 0, 1)])
        mine, others = (value_of(labels.node, {**known, self.base: tokens}) for labels in (self, other))
        return torch.equal(mine, others)


def _inside(node: fx.Node) -> bool:
    return node.op == "call_function" and name(node.target) in (*_SHAPES, *_VALUES)


def _made_of(node: fx.Node, known: Known) -> set[fx.Node]:
    """The node, and what it follows from, value by value, to where that ends."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        n = stack.pop()
        if n not in seen and n not in known:
            seen.add(n)
            stack += n.all_input_nodes if _inside(n) else []
    return seen


def _numbers(node: fx.Node, known: Known) -> list[int]:
    compared = [n for n in _made_of(node, known) if name(n.target) in _VALUES]
    return [a for n in compared for a in n.args if isinstance(a, int)]


def value_of(node: fx.Node, known: Known) -> Tensor:
    """The value of a node that follows from what is known, value by value, whatever its shape."""
    if node in known:
        return known[node]
    args: Any = [value_of(a, known) if isinstance(a, fx.Node) else a for a in node.args]
    if name(node.target) in _SHAPES:
        return args[0]  # type: ignore[no-any-return]
    target: Any = node.target
    return target(*args, **node.kwargs)  # type: ignore[no-any-return]
