"""What a part of a graph makes of given values: it is run in float64, for a few rows of random numbers.

In: nodes that keep rows apart, with their region, and values for what they read from outside: constants, and [R, 1] or
[R, V] for R rows of one sequence. Out: values [R, ...] of those that are asked for. Two parts that agree on random
numbers are equal if their ops are analytic, and what must hold is that `tame` says so of none that is not. The only
places where a tame op branches are labels, infinities, and the sign of a number that is one of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from memplan.passes.bodies import LINEAR, Body, NotTiled
from memplan.passes.calls import name
from memplan.passes.row_locality import Region
from memplan.runtime import tiled

ROWS = 6
MOST = 1e30  # bounds beyond are no bounds
FILLS = ("full", "scalar_tensor", "zeros", "ones")
COUNTS = ("arange", "iota")
ANALYTIC = frozenset([
    *LINEAR, "mul", "add", "sub", "rsub", "reciprocal", "exp", "expm1", "log", "log1p", "pow", "square", "tanh", "fma",
    "sigmoid", "log_sigmoid_forward", "logaddexp", "logsumexp", "amax", "_softmax", "_log_softmax", "gather", "scatter",
    "scatter_add", "where", "_softmax_backward_data", "_log_softmax_backward_data", "tanh_backward", "masked_fill",
    "slice_backward", "slice_scatter", "logical_and", "logical_not", "abs", "zeros_like", "full_like", "new_zeros",
    *FILLS,
])  # fmt: skip
_FLOATS = ("float16", "bfloat16", "float32")


def tame(node: fx.Node, wide: Set[fx.Node], known: Mapping[fx.Node, Tensor]) -> bool:
    """Whether random numbers show all that the op does. `wide`: nodes that have more than one number for each row;
    `known`: constants.
    """
    op, scalars = name(node.target), [a for a in node.args if isinstance(a, (int, float))]
    if getattr(node.target, "namespace", "") not in ("aten", "prims"):
        return False
    if op in ("clamp", "clamp_min", "ge", "eq", "ne") and scalars:
        return all(abs(s) >= MOST for s in scalars)
    if op in ("eq", "ne"):  # of tokens with labels; of numbers, it is never so by chance
        return True
    if op == "ge":
        given = [known[n] for n in node.all_input_nodes if n in known]
        return wide.isdisjoint(node.all_input_nodes) and all(bool((c == 0).all()) for c in given)
    return op in ANALYTIC


def constants(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """What depends on nothing: one number wherever it is, or the first integers."""
    found = dict[fx.Node, Tensor]()
    for node in graph.nodes:
        if node.op == "call_function" and (value := _constant(node, found)) is not None:
            found[node] = value.double() if value.dtype.is_floating_point else value
    return found


def _constant(node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor | None:
    op, inputs = name(node.target), node.all_input_nodes
    if op in FILLS:
        value: Any = node.args[op == "full"] if op in ("full", "scalar_tensor") else op == "ones"
        return None if isinstance(value, fx.Node) else torch.tensor(value, dtype=node.meta["val"].dtype)
    if op in COUNTS and all(isinstance(a, int) for a in node.args):
        first: Any = {"start": 0, "step": 1} | (dict(node.kwargs) if op == "iota" else {})
        integers: Any = node.args
        counted: Tensor = torch.arange(*integers) * first["step"] + first["start"]
        return counted
    if not inputs or not all(n in known for n in inputs):
        return None
    if op in ("view", "unsqueeze", "squeeze", "expand", "clone", "detach", "alias"):
        return known[inputs[0]]
    target: Any = node.target
    one_each = all(known[n].numel() == 1 for n in inputs) and torch.Tag.pointwise in getattr(target, "tags", ())
    return target(*fx.map_arg(node.args, known.get), **node.kwargs) if one_each else None


def computed(
    nodes: Sequence[fx.Node], wanted: Sequence[fx.Node], region: Region, given: Mapping[fx.Node, Tensor]
) -> list[Tensor]:
    """Values of `wanted`, [R, ...]. Raises NotTiled where they cannot be had of a few rows."""
    body = Body.of(nodes, wanted, region)
    text: dict[str, Any] = _in_float64(dict(body.text)) | {"inner": "eager"}
    counts = (1, ROWS)
    inputs = []
    for node, dims in zip(body.inputs, text["inputs"], strict=True):
        shape = [math.prod(f if isinstance(f, int) else counts[f[0]] for f in dim) for dim in dims]
        inputs.append(_shaped(given[node], shape))
    try:
        return [v.reshape(ROWS, -1) for v in tiled.runner(json.dumps(text))(counts, inputs)]
    except (RuntimeError, ValueError, IndexError) as e:
        raise NotTiled(f"it does not run on a few rows: {str(e).splitlines()[0]}") from e


def _shaped(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A value as its readers want it: one for all, or for all columns, or for all rows; or as it is."""
    if value.numel() == math.prod(shape):
        return value.reshape(shape)
    if value.shape == (ROWS, 1):
        return value.expand(ROWS, math.prod(shape) // ROWS).reshape(shape)
    return value.expand(shape)


def _in_float64(value: Any) -> Any:
    """The text of a body with float64 for narrower floats."""
    if isinstance(value, dict):
        if value.get("dtype") in _FLOATS and len(value) == 1:
            return {"dtype": "float64"}
        return {k: _in_float64(v) for k, v in value.items()}
    if isinstance(value, list):
        if value and value[0] in ("aten._softmax.default", "aten._log_softmax.default"):
            target, (of, dim, _), more = value
            return [target, [of, dim, False], more]
        return [_in_float64(v) for v in value]
    return value
