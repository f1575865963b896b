"""One graph, many sizes: a plan for every size that comes, made only when no earlier one holds.

In: a Dynamo graph whose sizes are symbols, and the inner compiler. Out: a callable that looks at its sizes before it
runs. A plan is a choice of what to recompute, and its peak grows with every size: so it holds for all sizes up to
those at which its peak was last computed, exactly, and found inside the budget. Sizes beyond are computed at entry;
where they are over the budget there is a second plan for twice these sizes, and then the smallest there is.
What must hold: nothing runs at a size at which its peak is not known to fit; DoesNotFit comes before the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from memplan.errors import DoesNotFit
from memplan.ir import Plan
from memplan.passes.calls import Sizes
from memplan.passes.compat import dimension
from memplan.passes.partition import Partitioner, Resized, SizesGiven

log = logging.getLogger("torch.memplan")

MARGIN = (
    1.25  # sizes are looked at this much larger than they come, so that lengths that creep up are not all looked at
)
DIMENSIONS = ("batch", "tokens")  # what limits call an input's first and second dimension


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of a graph. `plan` is None where there is nothing to plan: no backward."""

    run: Callable[..., Any]
    plan: Plan | None = None
    resized: Resized | None = None

    def changed(self, change: Callable[[Plan], Plan]) -> Compiled:
        """The same with `change` made to its plan at every size."""
        plan, resized = self.plan, self.resized
        if plan is None or resized is None:
            return self
        return Compiled(self.run, change(plan), lambda sizes: change(resized(sizes)))


Compiler = Callable[[fx.GraphModule, Sequence[Any], Partitioner], Compiled]


def compile_by_size(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    compiler: Compiler,
    report: Callable[[Plan], None],
    limits: Mapping[str, int],
) -> Callable[..., Any]:
    """The callable for a graph; `limits` are the largest sizes to come, where they are known."""
    symbols = {i: str(n.node.expr) for i, n in enumerate(example_inputs) if isinstance(n, torch.SymInt)}
    if not symbols:
        compiled = compiler(graph, example_inputs, partitioner)
        if compiled.plan is not None:
            report(compiled.plan)
        return compiled.run
    named = {i: limits.get(_called(example_inputs[i]), 0) for i in symbols}
    most = tuple(named[i] or math.inf for i in symbols)
    by_size = _BySize(copied(graph), partitioner, compiler, report, symbols, most)
    hinted = tuple(by_size.traced_sizes())
    first = tuple(h if m is math.inf else max(h, int(m)) for h, m in zip(hinted, most, strict=True))
    by_size.add(example_inputs, first)
    return by_size


def _called(size: torch.SymInt) -> str:
    """What limits call the dimension that a size symbol stands for; empty: nothing."""
    where = dimension(size)
    return DIMENSIONS[where] if where in range(len(DIMENSIONS)) else ""


@dataclass
class _Variant:
    """A compiled plan, the sizes up to which it is known to fit, and those from which it is known not to."""

    compiled: Compiled
    fits_up_to: list[tuple[int, ...]]
    over_from: list[tuple[int, ...]] = field(default_factory=list)

    def holds(self, sizes: tuple[int, ...]) -> bool:
        """Whether it is known to fit."""
        return self.compiled.plan is None or any(_within(sizes, most) for most in self.fits_up_to)

    def fits(self, sizes: tuple[int, ...], given: SizesGiven) -> bool:
        """Whether it fits, computed if need be."""
        if any(_within(least, sizes) for least in self.over_from):
            return False
        assert self.compiled.resized is not None  # there is a plan, or it would hold
        found = self.compiled.resized(given).fits
        (self.fits_up_to if found else self.over_from).append(sizes)
        return found


def _within(sizes: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return all(n <= m for n, m in zip(sizes, most, strict=True))


@dataclass
class _BySize:
    """The callable of compile_by_size. `symbols`: position among the arguments -> size symbol."""

    graph: fx.GraphModule
    partitioner: Partitioner
    compiler: Compiler
    report: Callable[[Plan], None]
    symbols: dict[int, str]
    limits: tuple[float, ...]
    variants: list[_Variant] = field(default_factory=list)

    def __post_init__(self) -> None:
        nodes = self.graph.graph.find_nodes(op="placeholder")
        self.fakes = [n.meta["example_value"] for n in nodes]  # to compile again when the first inputs are long gone

    def __call__(self, *args: Any) -> Any:
        sizes = tuple(args[i] for i in self.symbols)
        for variant in self.variants:
            if variant.holds(sizes):
                return variant.compiled.run(*args)
        return self._find(sizes).compiled.run(*args)

    def traced_sizes(self) -> list[int]:
        """The sizes of the call that the graph was traced from."""
        known = Sizes()
        return [known.of(self.fakes[i]) for i in self.symbols]

    def add(self, inputs: Sequence[Any], sizes: tuple[int, ...], **changes: Any) -> _Variant:
        """Compile a plan for these sizes. Raises DoesNotFit."""
        partitioner = replace(self.partitioner, sizes=self._given(sizes), **changes)
        variant = _Variant(self.compiler(self.graph, inputs, partitioner), [sizes])
        self.variants.append(variant)
        if variant.compiled.plan is not None:
            self.report(variant.compiled.plan)
        return variant

    def _given(self, sizes: tuple[int, ...]) -> SizesGiven:
        return tuple(zip(self.symbols.values(), sizes, strict=True))

    def _find(self, sizes: tuple[int, ...]) -> _Variant:
        """A variant that fits at sizes at which none is known to."""
        for variant in self.variants:
            if any(variant.fits(n, self._given(n)) for n in (self._larger(sizes, MARGIN), sizes)):
                return variant
        log.warning("sizes %s do not fit the plan made for smaller ones: planning again", dict(self._given(sizes)))
        mode = detect_fake_mode(self.fakes)
        assert mode is not None
        with tracing(TracingContext(mode)):
            if len(self.variants) == 1:
                try:
                    return self.add(self.fakes, self._larger(sizes, 2))
                except DoesNotFit:
                    return self.add(self.fakes, sizes)
            return self.add(self.fakes, sizes, smallest=True)

    def _larger(self, sizes: tuple[int, ...], factor: float) -> tuple[int, ...]:
        """Sizes times a factor, inside the limits, and never smaller than they are."""
        return tuple(max(n, int(min(n * factor, most))) for n, most in zip(sizes, self.limits, strict=True))


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph that a compiler may own, over the same parameters and fake values."""
    new = fx.Graph()
    new.output(new.graph_copy(graph.graph, {}))
    module = fx.GraphModule(graph, new)
    module.meta = dict(graph.meta)
    return module
