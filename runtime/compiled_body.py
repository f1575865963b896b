"""The body of memplan::tiled, compiled by Inductor, which fuses what is pointwise.

In: a function of one slice, and the tensors of one slice. Out: what the function returns, from generated code. How many
rows there are is a symbol in the code, whatever it is a multiple of; strides are numbers until they are seen to vary.
Code is reused where its numbers are the same and torch's guards on its symbols hold, and only there. Inductor's cache
keeps it for the next process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import BoxedBool
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

Counts = tuple[Any, Any]  # of a slice: sequences, and rows of each; ints or symbols
Body = Callable[[Counts, Sequence[torch.Tensor]], list[torch.Tensor]]
Shapes = Callable[[Counts, Sequence[torch.Tensor]], list[list[Any]]]  # of slices with such counts


@dataclass(frozen=True)
class Code:
    """Generated code. Of the numbers that a slice is described by, some are fixed, and the others it takes."""

    run: Callable[[list[Any]], Sequence[torch.Tensor]]
    fixed: Mapping[int, int]
    symbols: tuple[int, ...]
    guards: Callable[[Sequence[int]], bool]

    def holds(self, numbers: Sequence[int]) -> bool:
        return all(numbers[k] == n for k, n in self.fixed.items()) and self.guards([numbers[k] for k in self.symbols])


@dataclass(frozen=True)
class CompiledBody:
    """A slice is described by numbers: its counts, and then the strides of all tensors."""

    body: Body
    shapes: Shapes
    made: dict[Any, list[Code]] = field(default_factory=dict)
    known: dict[Any, Code] = field(default_factory=dict)  # of slices that came before
    lock: Any = field(default_factory=threading.Lock)

    def __call__(self, counts: Counts, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        code, numbers = self.code(counts, given)
        return list(code.run([*(numbers[k] for k in code.symbols), *given]))

    def code(self, counts: Counts, given: Sequence[torch.Tensor]) -> tuple[Code, tuple[int, ...]]:
        """Code for such a slice, generated if there is none, and the slice's numbers."""
        numbers = (*counts, *itertools.chain.from_iterable([t.stride() for t in given]))
        alike = numbers, *[(t.dtype, t.device) for t in given]
        if alike not in self.known:
            if len(self.known) >= 1024:  # so many lengths will not all come again
                self.known.clear()
            self.known[alike] = self._looked_up(numbers, given)
        return self.known[alike], numbers

    def _looked_up(self, numbers: tuple[int, ...], given: Sequence[torch.Tensor]) -> Code:
        ones = tuple((k, n) for k, n in enumerate(numbers) if n < 2)  # torch's symbols are never 0 or 1
        kind = ones, tuple((t.dtype, t.device) for t in given)
        with self.lock:
            codes = self.made.setdefault(kind, [])
            found = next((code for code in codes if code.holds(numbers)), None)
            if found is None:
                vary = {k for code in codes for k, n in code.fixed.items() if n != numbers[k]}
                vary |= {k for code in codes for k in code.symbols} | {0, 1}
                found = _compile(self, numbers, given, tuple(sorted(vary - {k for k, _ in ones})))
                codes.append(found)
        return found


def _compile(of: CompiledBody, numbers: Sequence[int], given: Sequence[torch.Tensor], symbols: tuple[int, ...]) -> Code:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    made = {k: _symbol(environment, numbers[k], k) for k in symbols}
    all_numbers: list[Any] = [made.get(k, n) for k, n in enumerate(numbers)]
    (*counts,), strides = all_numbers[:2], iter(all_numbers[2:])
    with _disable_current_modes(), mode, tracing(TracingContext(mode)), torch.no_grad():
        fakes = [
            torch.empty_strided(shape, [next(strides) for _ in shape], dtype=t.dtype, device=t.device)
            for t, shape in zip(given, of.shapes((counts[0], counts[1]), given), strict=True)
        ]

        def traced(*args: Any) -> list[torch.Tensor]:
            now = dict(zip(symbols, args, strict=False))
            return of.body((now.get(0, numbers[0]), now.get(1, numbers[1])), args[len(symbols) :])

        inputs = [*made.values(), *fakes]
        graph: fx.GraphModule = make_fx(traced, decomposition_table=select_decomp_table())(*inputs)
        run: Any = compile_fx_inner(graph, inputs, cudagraphs=BoxedBool(False), is_inference=True)
        text = environment.produce_guards_expression(list(made.values()))

    def guards(values: Sequence[int]) -> bool:
        return not text or bool(environment.evaluate_guards_expression(text, values))

    return Code(run, {k: n for k, n in enumerate(numbers) if k not in made}, symbols, guards)


def _symbol(environment: ShapeEnv, value: int, position: int) -> Any:
    source = ConstantSource(f"number_{position}")
    symbol = environment.create_symbol(value, source, DimDynamic.DYNAMIC)  # its own, whatever else has that value
    return environment.create_symintnode(symbol, hint=value, source=source)
