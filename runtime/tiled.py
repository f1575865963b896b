"""memplan::tiled: a part of a graph, run slice by slice over its rows.

In: the tensors that the part reads, and its body as text: what it runs for one slice, and where the rows are in the
dimensions of what it reads and returns. Out: what it returns. Of what is in between only one slice exists at a time.
From outside the op is functional: accumulators are made, and written to, inside. The text says all, so it can be
hashed, pickled, and run by another process.

A slice is some rows of one sequence, or some whole sequences. A body is

    inputs    for each tensor its dims
    ops       [target, args, kwargs]: values are {"value": k}, inputs first and then the ops' results; a size is
              {"size": dim}; what JSON has no word for is {"dtype": ...} or {"device": ...}, which is that of the inputs
    outputs   {"kind", "value", "dims", "dtype"}
    one       whether a slice may not have several sequences
    inner     what compiles it: "inductor" or "eager"

A dim is a list of factors, outermost first: a size, or a row axis [axis, start, size]: 0 for sequences and 1 for rows
of each, where its rows start, and which of `sizes` it has. An output's `kind`: "rows" are put in their place, among
zeros; a "sum" over rows is added up; a "product" over rows is that of two values, added up. Sums are in float32 at
least.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from memplan.runtime.compiled_body import Body, CompiledBody, Counts
from memplan.runtime.tally import Tally

Slice = tuple[tuple[int, int], tuple[int, int]]  # for each axis: where it starts, and how many


@torch.library.custom_op("memplan::tiled", mutates_args=())
def tiled(inputs: Sequence[torch.Tensor], sizes: Sequence[int], body: str, rows: int) -> list[torch.Tensor]:
    """Run `body` on slices of at most `rows` rows. `sizes`: sequences, rows of each, and what the dims name."""
    read = _read(body)
    parts = list(slices(sizes[0], sizes[1], rows, one=read["one"]))
    totals = _made(read, inputs, sizes, zeros=not parts)
    for k, part in enumerate(parts):
        run_slice(read, inputs, sizes, part, totals, runner(body), first=k == 0)
    return [t.to(_dtype(out["dtype"])) for t, out in zip(totals, read["outputs"], strict=True)]


@tiled.register_fake
def _(inputs: Sequence[torch.Tensor], sizes: Sequence[int], body: str, rows: int) -> list[torch.Tensor]:
    read = _read(body)
    made = _made(read, inputs, sizes, zeros=False)
    return [t.to(_dtype(out["dtype"])) for t, out in zip(made, read["outputs"], strict=True)]


OP: Any = torch.ops.memplan.tiled.default


def prepare(inputs: Sequence[torch.Tensor], sizes: Sequence[int], body: str, rows: int) -> None:
    """Generate the code that running it will need."""
    read, compute = _read(body), runner(body)
    if not isinstance(compute, CompiledBody):
        return
    for part in slices(sizes[0], sizes[1], rows, one=read["one"]):
        given = [_taken(t, dims, sizes, part) for t, dims in zip(inputs, read["inputs"], strict=True)]
        compute.code((part[0][1], part[1][1]), given)


@dataclass(frozen=True)
class OneSlice:
    """What the largest slice does: its calls, with their results, the bytes at its peak, its rows, and how many slices
    there are.
    """

    calls: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], Any], ...]
    peak: int
    rows: int
    count: int


def one_slice(inputs: Sequence[torch.Tensor], sizes: Sequence[int], body: str, rows: int) -> OneSlice:
    """What running the largest slice of fake inputs does. Sizes are ints."""
    read = _read(body)
    parts = list(slices(sizes[0], sizes[1], rows, one=read["one"]))
    if not parts:
        return OneSlice((), 0, 0, 0)
    with _disable_current_modes():
        hollow = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in inputs]
        totals = _made(read, hollow, sizes, zeros=False)
    largest = max(parts, key=lambda part: part[0][1] * part[1][1])
    with _disable_current_modes(), Tally([*hollow, *totals], keep=True) as tally:
        run_slice(read, hollow, sizes, largest, totals, functools.partial(_computed, read), first=False)
    accumulators = sum(t.nbytes for t, o in zip(totals, read["outputs"], strict=True) if t.dtype != _dtype(o["dtype"]))
    return OneSlice(tuple(tally.calls), tally.peak + accumulators, largest[0][1] * largest[1][1], len(parts))


def slices(sequences: int, length: int, rows: int, *, one: bool = False) -> Iterator[Slice]:
    """Slices that cover all rows. They are as equal as they can be, so that none is left with a single row, which would
    take another kernel.
    """
    if not sequences or not length:
        return
    together = 1 if one or rows < 2 * length else rows // length
    groups = math.ceil(sequences / together)
    pieces = 1 if together > 1 else math.ceil(length / rows)
    for g in range(groups):
        first, end = sequences * g // groups, sequences * (g + 1) // groups
        for p in range(pieces):
            start, stop = length * p // pieces, length * (p + 1) // pieces
            yield (first, end - first), (start, stop - start)


def _made(
    body: dict[str, Any], inputs: Sequence[torch.Tensor], sizes: Sequence[int], *, zeros: bool
) -> list[torch.Tensor]:
    """What outputs are collected in; zeros where slices do not write."""
    found = []
    for out in body["outputs"]:
        make: Any = torch.zeros if zeros or not all(map(_whole, out["dims"])) else torch.empty
        shape = [_extent(dim, sizes) for dim in out["dims"]]
        dtype = _dtype(out["dtype"])
        if out["kind"] != "rows" and dtype.itemsize < 4:
            dtype = torch.float32
        found.append(make(shape, dtype=dtype, device=inputs[0].device))
    return found


def _extent(dim: Sequence[Any], sizes: Sequence[int]) -> int:
    return math.prod(f if isinstance(f, int) else sizes[f[2]] for f in dim)


def run_slice(
    body: dict[str, Any],
    inputs: Sequence[torch.Tensor],
    sizes: Sequence[int],
    part: Slice,
    totals: Sequence[torch.Tensor],
    compute: Body,
    *,
    first: bool,
) -> None:
    """Compute the outputs of one slice, and put them in their places, or add them up; of the first there is no sum."""
    given = [_taken(t, dims, sizes, part) for t, dims in zip(inputs, body["inputs"], strict=True)]
    values = compute((part[0][1], part[1][1]), given)
    del given
    for out, total in zip(body["outputs"], totals, strict=True):
        if out["kind"] == "rows":
            _taken(total, out["dims"], sizes, part).copy_(values.pop(0))
        elif out["kind"] == "sum":
            _add(total, values.pop(0), first)
        else:
            a, b = values.pop(0), values.pop(0)
            if a.dtype == total.dtype:
                total.addmm_(a, b, beta=0 if first else 1)
            else:
                _add(total, a @ b, first)


def _add(total: torch.Tensor, value: torch.Tensor, first: bool) -> None:
    if first:
        total.copy_(value)
    else:
        total.add_(value)


def _computed(body: dict[str, Any], counts: Counts, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The values of the outputs, of a product two, for slices of the inputs."""
    device = given[0].device
    values: list[Any] = list(given)
    for (target, args, kwargs), done in zip(body["ops"], body["done"], strict=True):
        now, named = ([_decoded(v, values, counts, device) for v in some] for some in (args, kwargs.values()))
        values.append(_op(target)(*now, **dict(zip(kwargs, named, strict=True))))
        for k in done:
            values[k] = None
    return [values[k] for k in body["returned"]]


@functools.lru_cache(maxsize=256)
def runner(body: str) -> Body:
    """What computes a slice of a body: the compiler that its text names, or its ops one by one."""
    read = _read(body)
    alone = functools.partial(_computed, read)

    def shapes(counts: Counts, given: Sequence[torch.Tensor]) -> list[list[Any]]:
        return [
            [_count(dim, counts) if _has_rows(dim) else n for dim, n in zip(dims, t.shape, strict=True)]
            for dims, t in zip(read["inputs"], given, strict=True)
        ]

    return CompiledBody(alone, shapes) if read["inner"] == "inductor" else alone


def _has_rows(dim: Sequence[Any]) -> bool:
    return any(not isinstance(factor, int) for factor in dim)


def _whole(dim: Sequence[Any]) -> bool:
    """Whether the loop's rows are all there are in a dimension."""
    return all(isinstance(f, int) or (f[1] == 0 and f[2] == f[0]) for f in dim)


def _count(dim: Sequence[Any], counts: Counts) -> Any:
    return math.prod(f if isinstance(f, int) else counts[f[0]] for f in dim)


def _taken(tensor: torch.Tensor, dims: Sequence[Sequence[Any]], sizes: Sequence[int], part: Slice) -> torch.Tensor:
    """The part of a tensor that belongs to a slice: a view."""
    for d, dim in enumerate(dims):
        if _has_rows(dim):
            start, count = 0, 1
            for factor in dim:
                if isinstance(factor, int):
                    start, count = start * factor, count * factor
                else:
                    axis, first, size = factor
                    start, count = start * sizes[size] + first + part[axis][0], count * part[axis][1]
            tensor = tensor.narrow(d, start, count)
    return tensor


def _decoded(value: Any, values: Sequence[Any], counts: Counts, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decoded(v, values, counts, device) for v in value]
    if not isinstance(value, dict):
        return value
    if "value" in value:
        return values[value["value"]]
    if "size" in value:
        return _count(value["size"], counts)
    if "dtype" in value:
        return _dtype(value["dtype"])
    return device  # all is on that of the inputs


@functools.lru_cache(maxsize=64)
def _read(body: str) -> dict[str, Any]:
    """The body, with `done`: for each op the values that nothing needs after it."""
    read: dict[str, Any] = json.loads(body)
    first = len(read["inputs"])
    last: dict[int, int] = {}
    for k, (_, args, kwargs) in enumerate(read["ops"]):
        last |= dict.fromkeys(_references([*args, *kwargs.values()]), k)
        last.setdefault(first + k, k)
    read["returned"] = [
        k for out in read["outputs"] for k in (out["value"] if isinstance(out["value"], list) else [out["value"]])
    ]
    for k in read["returned"]:
        last.pop(k, None)
    read["done"] = [[v for v, at in last.items() if at == k] for k in range(len(read["ops"]))]
    return read


def _references(value: Any) -> Iterator[int]:
    if isinstance(value, dict) and "value" in value:
        yield value["value"]
    elif isinstance(value, list):
        for v in value:
            yield from _references(v)


@functools.cache
def _op(target: str) -> Any:
    if target == "getitem":
        return lambda values, index: values[index]
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
