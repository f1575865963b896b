"""What a part of a graph makes of given values: it is run in float64, for a few rows of random numbers.

In: nodes that keep rows apart, with their region, and values for what they read from outside: [R, ...], R rows of one
sequence. Out: values [R, ...] of those that are asked for. Two parts that agree on random numbers are equal, if their
ops are analytic: what must hold is that `tame` says so of none that is not. The only places where a tame op branches
are labels, infinities, and the sign of a number that is one of a row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
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


def tame(node: fx.Node, wide: Collection[fx.Node]) -> bool:
    """Whether random numbers show all that the op does. `wide`: nodes that have more than one number for each row."""
    op, scalars = name(node.target), [a for a in node.args if isinstance(a, (int, float))]
    if getattr(node.target, "namespace", "") not in ("aten", "prims"):
        return False
    if op in ("clamp", "clamp_min", "ge", "eq", "ne") and scalars:
        return all(abs(s) >= MOST for s in scalars)
    if op in ("eq", "ne"):  # of tokens with labels; of numbers, it is never so by chance
        return True
    if op == "ge":
        known = [constant(n) for n in node.all_input_nodes]
        return wide.isdisjoint(node.all_input_nodes) and all(c is None or bool((c == 0).all()) for c in known)
    return op in ANALYTIC


def constant(node: fx.Node) -> Tensor | None:
    """The value of what depends on nothing: one number, or as many as there are."""
    op = name(node.target)
    if op in FILLS:
        value: Any = node.args[op == "full"] if op in ("full", "scalar_tensor") else float(op == "ones")
        return None if isinstance(value, fx.Node) else _double(torch.tensor(value, dtype=node.meta["val"].dtype))
    if op in COUNTS and all(isinstance(a, int) for a in node.args):
        options = {"start": 0, "step": 1} | dict(node.kwargs) if op == "iota" else {"start": 0, "step": 1}
        return options["start"] + torch.arange(*node.args) * options["step"]  # type: ignore[arg-type]
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    known = {n: constant(n) for n in node.all_input_nodes}
    if any(value is None for value in known.values()):
        return None
    if op in ("view", "unsqueeze", "squeeze", "expand", "clone", "detach", "alias"):
        return known[node.all_input_nodes[0]]
    target: Any = node.target
    return _double(target(*fx.map_arg(node.args, known.get), **node.kwargs)) if _pointwise(target) else None


def _pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


def _double(value: Tensor) -> Tensor:
    return value.double() if value.dtype.is_floating_point else value


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
        value = given[node] if node in given else constant(node)
        assert value is not None, node
        inputs.append(_shaped(value, shape, of_rows=node in given))
    try:
        return [v.reshape(ROWS, -1) for v in tiled.runner(json.dumps(text))(counts, inputs)]
    except (RuntimeError, ValueError, IndexError) as e:
        raise NotTiled(f"it does not run on a few rows: {str(e).splitlines()[0]}") from e


def _shaped(value: Tensor, shape: Sequence[int], *, of_rows: bool) -> Tensor:
    """A value as its readers want it: one for all, or for all columns, or for all rows; or as it is."""
    if value.numel() == 1 or value.numel() == math.prod(shape):
        return value.expand(shape) if value.numel() == 1 else value.reshape(shape)
    return value.reshape(ROWS, 1).expand(ROWS, math.prod(shape) // ROWS).reshape(shape) if of_rows else value.expand(shape)


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

