"""Labels of rows, as a graph has them: some node of integers, and what it was made of.

Losses give labels that do not count another value, and forward and backward each do so on their own: two nodes are the
same labels if they are made of the same node, and agree for tokens and for all numbers that they compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from memplan.passes.bodies import VIEWS
from memplan.passes.calls import name
from memplan.passes.same_values import constant

_SHAPES = (*VIEWS, "unsqueeze", "squeeze", "clone", "alias", "detach")  # they leave values as they are
_VALUES = ("where", "eq", "ne", "ge", "lt", "clamp", "clamp_min", "_to_copy", "convert_element_type", "masked_fill")


@dataclass(frozen=True)
class Labels:
    """`node` holds them; it follows from `base` alone, value by value."""

    node: fx.Node
    base: fx.Node

    @staticmethod
    def of(node: fx.Node) -> Labels:
        """The labels that a node holds."""
        leaves = set(_leaves(node))
        return Labels(node, leaves.pop() if len(leaves) == 1 else node)

    def read_by(self, target: Any) -> bool:
        """Whether such an op reads them."""
        return any(user.target is target for user in self.node.users)

    def same(self, other: Labels) -> bool:
        """Whether both hold the same labels."""
        if self.node is other.node:
            return True
        if self.base is not other.base:
            return False
        numbers = sorted({*range(5), *_numbers(self.node), *_numbers(other.node)})
        tokens = torch.tensor([n + d for n in numbers for d in (-1, 0, 1)])
        return torch.equal(_value(self.node, self.base, tokens), _value(other.node, self.base, tokens))


def _leaves(node: fx.Node) -> list[fx.Node]:
    if constant(node) is not None:
        return []
    inside = node.op == "call_function" and name(node.target) in (*_SHAPES, *_VALUES)
    return [leaf for n in node.all_input_nodes for leaf in _leaves(n)] if inside else [node]


def _numbers(node: fx.Node) -> list[int]:
    inside = node.op == "call_function" and name(node.target) in (*_SHAPES, *_VALUES)
    own = [a for a in node.args if isinstance(a, int)] if name(node.target) in _VALUES else []
    return own + [k for n in node.all_input_nodes for k in _numbers(n)] if inside else []


def _value(node: fx.Node, base: fx.Node, tokens: Tensor) -> Tensor:
    if node is base:
        return tokens
    known = constant(node)
    if known is not None:
        return known
    args: Any = [_value(a, base, tokens) if isinstance(a, fx.Node) else a for a in node.args]
    if name(node.target) in _SHAPES:
        return args[0]  # type: ignore[no-any-return]
    target: Any = node.target
    return target(*args, **node.kwargs)  # type: ignore[no-any-return]
