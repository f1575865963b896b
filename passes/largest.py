"""The largest batch that fits: a step traced once with a dimension of its batch open, and planned at many sizes.

In: a step, a batch, a dimension, a Partitioner. Out: the largest size that fits, its plan, and that of the next size.
What must hold: both are the plans that memplan.plan makes at these sizes, so that the first fits and the second does
not. The open trace only says where to look: it is quick, but its workspaces and tiles may differ in some bytes.
A peak need not grow with every size, so a size beyond the next may fit again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from memplan.errors import DoesNotFit, MemplanError, did_you_mean
from memplan.ir import Plan, Step
from memplan.passes.calls import Sizes
from memplan.passes.compat import symbol_value
from memplan.passes.dispatch import DIMENSIONS
from memplan.passes.partition import Partitioner
from memplan.passes.pipeline import make_plan
from memplan.passes.trace import StepOf, fake, trace, traced
from memplan.units import human

REACH = 4096  # sizes looked through for one that the step takes


@dataclass(frozen=True)
class Largest:
    """`plan` fits, at `size`; `beyond` is the plan of the next size, which does not, None where the step as it was
    traced takes no larger one.
    """

    dimension: str
    size: int
    plan: Plan
    next: int
    beyond: Plan | None

    def __str__(self) -> str:
        budget = self.plan.budget
        more = "the step as it was traced takes no larger one"
        if self.beyond is not None and self.beyond.peak > budget.available:
            more = f"{self.next:,} needs {human(budget.needed_for(self.beyond.peak) - budget.bytes)} more"
        elif self.beyond is not None:  # then it is the host's
            more = f"{self.next:,} needs {human(self.beyond.timeline.host_peak)} in the host's memory"
        planned = human(budget.needed_for(self.plan.peak))
        fit = "fits" if self.dimension == "batch" else "fit"
        return f"largest {self.dimension} that {fit} {human(budget.bytes)}: {self.size:,} (planned {planned}; {more})"

    def to_json(self) -> str:
        """Sizes, and the budgets in bytes that the plans need; of the next size null where there is none."""
        budget, beyond = self.plan.budget, self.beyond
        found = {
            "dimension": self.dimension,
            "largest": self.size,
            "budget": budget.bytes,
            "planned": budget.needed_for(self.plan.peak),
            "next": self.next if beyond else None,
            "next_needs": budget.needed_for(beyond.peak) if beyond else None,
        }
        return json.dumps(found)


def largest(
    step: Callable[..., Any],
    batch: Sequence[Any],
    dimension: str,
    partitioner: Partitioner,
    optimizer: Any = None,
    tried: Callable[[int], None] = lambda size: None,
) -> Largest:
    """The largest size of the batch's `dimension` that fits. `tried` is told of each size before it is planned.

    Raises DoesNotFit where the smallest does not fit, MemplanError where the step holds for one size alone.
    """
    opened = _Batch(batch, dimension)
    try:
        sizes, start = traced(
            step, batch, partitioner, optimizer, opened.mode, opened.fakes, functools.partial(_about, opened, tried),
            opened.symbols,
        )  # fmt: skip
    except MemplanError:
        raise
    except Exception as e:
        trace(step, batch, replace(partitioner, measure=False), optimizer)  # which raises if the step is what is wrong
        why = (str(e).splitlines() or [""])[0]
        raise MemplanError(
            f"the step cannot be traced with {dimension} left open: {type(e).__name__}: {why}; plan single sizes"
        ) from e

    @functools.cache
    def plan_at(value: int) -> Plan:
        made = trace(step, opened.at(sizes.given(value), real=partitioner.measure), partitioner, optimizer)
        return _plan(made, partitioner)

    last = border(sizes.each(lambda value: plan_at(value).fits), start)
    fitting, above = sizes.at_most(last), last + 1
    if fitting is None:
        smallest = trace(step, opened.at(sizes.given(above), real=partitioner.measure), partitioner, optimizer)
        try:
            _plan(smallest, partitioner, fit=True)
        except DoesNotFit as e:
            raise DoesNotFit(
                f"no {dimension} fit, not even {sizes.of(above)}: {e}",
                budget=e.budget,
                needed=e.needed,
                smallest=e.smallest,
            ) from None
        raise AssertionError("the same plan fits now")
    beyond = plan_at(above) if sizes.takes(above) else None
    return Largest(dimension, sizes.of(fitting), plan_at(fitting), sizes.of(above), beyond)


def border(fits: Callable[[int], bool], start: int, stride: int = 1) -> int:
    """A value that fits, next to one that does not: looked for from `start` in steps that double, then by halves."""
    low = high = start
    if fits(start):
        while fits(high := low + stride):
            low, stride = high, 2 * stride
    else:
        while not fits(low := high - stride):
            high, stride = low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _about(opened: _Batch, tried: Callable[[int], None], by: Partitioner, step_of: StepOf) -> tuple[_Sizes, int]:
    """Where the largest size is, by plans of the open trace. Measuring runs ops, and none that are far too large."""
    sizes = _Sizes(opened, tried)

    @functools.cache
    def fits(value: int, measure: bool) -> bool:
        return _plan(step_of(replace(by, sizes=sizes.given(value), measure=measure)), by).fits

    start = border(sizes.each(lambda value: fits(value, False)), sizes.start, max(sizes.start // 2, 1))
    if by.measure:
        start = border(sizes.each(lambda value: fits(value, True)), start)
    return sizes, start


def _plan(step: Step, by: Partitioner, *, fit: bool = False) -> Plan:
    return make_plan(step, by.policy, by.budget, by.machine, inner=by.inner, fit=fit)


class _Batch:
    """A batch whose tensors are fake and have a size symbol in the open dimension, one for each size that is there."""

    def __init__(self, batch: Sequence[Any], dimension: str) -> None:
        if dimension not in DIMENSIONS:
            raise MemplanError(
                f"no dimension {dimension!r}: there are {' and '.join(DIMENSIONS)}, the first and the second dimension "
                f"of the batch's tensors{did_you_mean(str(dimension), DIMENSIONS)}"
            )
        self.dimension, axis = dimension, DIMENSIONS.index(dimension)
        self.leaves, self.spec = pytree.tree_flatten(tuple(batch))
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.environment)
        self.fakes = [self._opened(i, t, axis) for i, t in enumerate(tensors)]
        found: list[Any] = [
            f.shape[axis] for f in self.fakes if f.dim() > axis and isinstance(f.shape[axis], torch.SymInt)
        ]
        if not found:
            raise MemplanError(
                f"no tensor of the batch has {dimension}, a dimension {axis} of at least 2: give the batch as tensors "
                "in tuples, lists and dicts, and of 2 or more, so that it can be told from a size that never changes"
            )
        self.size: Any = found[0]  # of the first tensor that has it
        self.symbols = [*{n.node.expr: n for n in found}.values()]

    def _opened(self, i: int, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        opens = [k == axis and n > 1 for k, n in enumerate(tensor.shape)]
        dynamic = [DimDynamic.DYNAMIC if yes else DimDynamic.STATIC for yes in opens]
        shape, stride, _ = self.environment.create_symbolic_sizes_strides_storage_offset(
            tensor, ConstantSource(f"batch[{i}]"), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)
        )
        return fake(self.mode, tensor, (shape, stride))

    def at(self, given: tuple[tuple[str, int], ...], *, real: bool) -> tuple[Any, ...]:
        """The batch at other sizes; `real`: not on meta, which says that nothing is to be run."""
        of = Sizes(given).of
        made = iter(
            torch.empty_strided(
                tuple(map(of, f.shape)), tuple(map(of, f.stride())), dtype=f.dtype, requires_grad=f.requires_grad,
                device="cpu" if real else "meta",
            )
            for f in self.fakes
        )  # fmt: skip
        leaves = [next(made) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return tuple(pytree.tree_unflatten(leaves, self.spec))


class _Sizes:
    """What sizes a step takes, as far as its trace goes. All follow from the value of one symbol."""

    def __init__(self, opened: _Batch, tried: Callable[[int], None]) -> None:
        self.tried = tried
        self.size, environment = opened.size, opened.environment
        symbols: set[sympy.Symbol] = self.size.node.expr.free_symbols
        if not symbols:
            raise MemplanError(_fixed(opened))
        self.symbol = max(symbols, key=lambda s: (symbol_value(self.size, s), str(s)))
        self.start = symbol_value(self.size, self.symbol)
        self.range = environment.var_to_range[self.symbol]
        guards = {environment.replace(guard.expr) for guard in environment.guards}
        self.guards = [guard for guard in guards if guard.free_symbols == {self.symbol}]

    def given(self, value: int) -> tuple[tuple[str, int], ...]:
        """The symbol's value, for a Partitioner."""
        return ((str(self.symbol), value),)

    def of(self, value: int) -> int:
        """The size of the dimension."""
        return Sizes(self.given(value)).of(self.size)

    def takes(self, value: int) -> bool:
        """Whether the traced step holds there too."""
        inside = self.range.lower <= value <= self.range.upper
        return bool(inside and all(guard.xreplace({self.symbol: sympy.Integer(value)}) for guard in self.guards))

    def at_most(self, value: int) -> int | None:
        """The largest value up to this one that the step takes."""
        return next((n for n in range(value, max(value - REACH, 0), -1) if self.takes(n)), None)

    def each(self, fits: Callable[[int], bool]) -> Callable[[int], bool]:
        """`fits` for any value, by the largest up to it that the step takes. Where there is none, what is too small
        fits, and what is too large does not.
        """

        def known(value: int) -> bool:
            taken = self.at_most(value)
            if taken is None:
                return value < self.start
            self.tried(self.of(taken))
            return fits(taken)

        return known


def _fixed(opened: _Batch) -> str:
    """Why the open dimension has one size alone, in torch's words."""
    at = int(opened.size.node.expr)
    reasons = [f"{guard.expr} {guard.sloc}" for guard in opened.environment.guards if isinstance(guard.expr, sympy.Eq)]
    why = f" ({reasons[0]})" if reasons else ""
    return (
        f"the step takes {opened.dimension} of {at} alone{why}: only a dimension that the model leaves open has a "
        "largest size; let that line hold for any size, or plan single sizes"
    )
