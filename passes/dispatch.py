"""One graph, many runs: a plan for the sizes and the memory that each run finds, made only when no earlier one holds.

In: a Dynamo graph and the inner compiler. Out: a callable that looks at its sizes, and at the gradients and optimizer
states that the process holds by now, before it runs. A plan is a choice of what to recompute, and its peak grows with
each of these: so it holds up to the largest for which its peak was computed, exactly, and found inside the budget.
What is beyond is computed at entry. Where that is over the budget another plan is made: for what is held now if that
has grown, else for twice the sizes, and then the smallest there is.
What must hold: nothing runs where its peak is not known to fit; DoesNotFit comes before the run.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing

from memplan.errors import DoesNotFit
from memplan.ir import Budget, Decision, Held, Machine, Plan, Step
from memplan.passes import marks
from memplan.passes.calls import Sizes, copied
from memplan.passes.compat import dimension
from memplan.passes.failed import Failure, located
from memplan.passes.partition import Partitioner, Resized, SizesGiven
from memplan.passes.whole_step import WholeStep
from memplan.runtime import room
from memplan.runtime.allocator import interrupt
from memplan.runtime.failing import Place
from memplan.runtime.held import Watch
from memplan.runtime.host_pool import reserve

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
        return Compiled(self.run, change(plan), lambda sizes, held: change(resized(sizes, held)))


@dataclass(frozen=True)
class Chosen:
    """A policy that repeats decisions made elsewhere."""

    name: str
    decisions: Mapping[int, Decision]

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Mapping[int, Decision]:
        return self.decisions


Compiler = Callable[[fx.GraphModule, Sequence[Any], Partitioner], Compiled]
Explain = Callable[[Exception, Callable[[], Failure]], None]


def adaptive(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    compiler: Compiler,
    report: Callable[[Plan], None],
    explain: Explain,
    limits: Mapping[str, int],
    step: WholeStep | None = None,
    optimizer: Any = None,
) -> Callable[..., Any]:
    """The callable for a graph. `explain` hears of errors in runs of it, and can ask where in the plan they were;
    `limits` are the largest sizes to come, where they are known; `step` knows of the other graphs that run with it;
    `optimizer` is declared ahead.
    """
    _leave_nothing(partitioner)
    symbols = {i: n for i, n in enumerate(example_inputs) if isinstance(n, torch.SymInt)}
    names = {i: str(n.node.expr) for i, n in symbols.items()}
    most = tuple(limits.get(_called(n), math.inf) for n in symbols.values())
    watch = Watch(optimizer, None if step is None else step.watch.around)
    made = Adaptive(copied(graph), partitioner, compiler, report, explain, names, most, step, watch=watch)
    traced = map(Sizes().of, symbols.values())
    first = tuple(n if m is math.inf else max(n, int(m)) for n, m in zip(traced, most, strict=True))
    made.add(example_inputs, first, made.held(example_inputs), smallest=step is not None and step.several)
    return made


def _leave_nothing(partitioner: Partitioner) -> None:
    """Have what came early leave: planning runs ops, and a compiler."""
    there = room.listener(partitioner.budget.listener)
    if there is not None and there.wants:
        there.begun("", ())


def _called(size: torch.SymInt) -> str:
    """What limits call the dimension that a size symbol stands for; empty: nothing."""
    where = dimension(size)
    return DIMENSIONS[where] if where in range(len(DIMENSIONS)) else ""


Point = tuple[int, ...]  # what a peak depends on: the sizes, in the order of their symbols, and the extent of Held


@dataclass(eq=False)
class Variant:
    """A compiled plan, the points up to which it is known to fit, and those from which it is known not to."""

    owner: Adaptive
    compiled: Compiled
    smallest: bool
    fits_up_to: list[Point]
    over_from: list[Point] = field(default_factory=list)
    plans: dict[tuple[int, ...], Plan] = field(default_factory=dict)  # by sizes
    leaves: dict[Point, tuple[int, ...]] = field(default_factory=dict)  # of the budget, from each mark on

    def at(self, sizes: tuple[int, ...]) -> Plan:
        """Its plan at these sizes, with nothing held."""
        if sizes not in self.plans:
            self.plans[sizes] = self.with_held(sizes, Held())
        return self.plans[sizes]

    def with_held(self, sizes: tuple[int, ...], held: Held) -> Plan:
        """Its plan at these sizes, with so much held."""
        assert self.compiled.resized is not None
        return self.compiled.resized(self.owner.given(sizes), held)

    def left(self, sizes: tuple[int, ...], held: Held) -> tuple[int, ...]:
        """What it leaves of the budget from each of its marks on, at these sizes, with so much held; or less: at larger
        ones, so that lengths that change are not all looked at.
        """
        at = (*sizes, *held.extent)
        found = next((left for most, left in self.leaves.items() if _within(at, most)), None)
        if found is None:
            planned = self.owner.planned_for[-1]
            n = planned if _within(sizes, planned) else sizes
            found = self.leaves[(*n, *held.extent)] = marks.left(self.with_held(n, held))
        return found

    def holds(self, at: Point) -> bool:
        """Whether it is known to fit."""
        return self.compiled.plan is None or any(_within(at, most) for most in self.fits_up_to)

    def fits(self, at: Point, sizes: SizesGiven, held: Held) -> bool:
        """Whether it fits, computed if need be."""
        if any(_within(least, at) for least in self.over_from):
            return False
        assert self.compiled.resized is not None  # there is a plan, or it would hold
        plan = self.compiled.resized(sizes, held)
        found = plan.fits
        log.debug("sizes %s: a plan that is there needs %d of %d bytes", dict(sizes), plan.peak, plan.budget.available)
        (self.fits_up_to if found else self.over_from).append(at)
        return found


def _within(at: Point, most: Point) -> bool:
    return all(n <= m for n, m in zip(at, most, strict=True))


@dataclass(eq=False)
class Adaptive:
    """The callable that `adaptive` makes. `symbols`: position among the arguments -> size symbol."""

    graph: fx.GraphModule
    partitioner: Partitioner
    compiler: Compiler
    report: Callable[[Plan], None]
    explain: Explain
    symbols: dict[int, str]
    limits: tuple[float, ...]
    step: WholeStep | None = None
    variants: list[Variant] = field(default_factory=list)
    planned_for: list[tuple[int, ...]] = field(default_factory=list)  # sizes
    by_decisions: dict[Any, Variant] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        nodes = self.graph.graph.find_nodes(op="placeholder")
        self.fakes = [
            n.meta.get("example_value") for n in nodes
        ]  # to compile again when the first inputs are long gone
        self.parameters = [i for i, f in enumerate(self.fakes) if isinstance(f, torch.nn.Parameter)]
        self.partitioner = replace(self.partitioner, parameters=frozenset(self.parameters))

    def __call__(self, *args: Any) -> Any:
        if self.step is not None and self.variants[0].compiled.plan is not None:
            return self.step.run(self, args)
        variant = self.choose(args)
        self.tell(variant, args)
        return variant.compiled.run(*args)

    def tell(self, variant: Variant, args: Sequence[Any], *, alone: bool = True) -> None:
        """Tell whom the device is shared with what a run of a variant leaves as it goes on. alone: in its step."""
        there = room.listener(self.partitioner.budget.listener)
        if there is None or not there.wants:
            return
        plan = variant.compiled.plan
        if plan is None:
            there.begun("", ())
        elif why := "others run in its step" if not alone else self._unknown(args):
            log.info("nothing can come onto the device early while a graph runs: %s", why)
            there.begun(marks.name_of(plan), ())
        else:
            there.begun(marks.name_of(plan), variant.left(self.sizes(args), self.held(args)))

    def _unknown(self, args: Sequence[Any]) -> str:
        """Why nobody knows what will be allocated after this graph's backward; empty: it is known."""
        if not self.watch.known:
            return "its optimizer is not known"
        if any(isinstance(a, torch.Tensor) and a.requires_grad and not a.is_leaf for a in args):
            return "its backward goes on outside of it"
        own = {id(args[i]) for i in self.parameters}
        if any(p.requires_grad and id(p) not in own for p in self.watch.updated()):
            return "its optimizer updates more than it reads"
        return ""

    def choose(self, args: Sequence[Any]) -> Variant:
        """A variant that fits, as far as this graph alone goes."""
        sizes, held = self.sizes(args), self.held(args)
        at = (*sizes, *held.extent)
        return next((variant for variant in self.variants if variant.holds(at)), None) or self._find(sizes, held)

    def sizes(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The values of the size symbols."""
        return tuple(args[i] for i in self.symbols)

    def held(self, args: Sequence[Any]) -> Held:
        """What the process holds for the parameters among the arguments."""
        return self.watch.held([args[i] for i in self.parameters], args)

    def add(self, inputs: Sequence[Any], sizes: tuple[int, ...], held: Held, *, smallest: bool = False) -> Variant:
        """Compile a plan for these sizes with so much held. Raises DoesNotFit."""
        several = self.step is not None and self.step.several
        partitioner = replace(self.partitioner, sizes=self.given(sizes), held=held, smallest=smallest, several=several)
        variant = self._compiled(inputs, partitioner, smallest, [(*sizes, *held.extent)])
        self.variants.append(variant)
        self.planned_for.append(sizes)
        if variant.compiled.plan is not None:
            reserve(variant.compiled.plan)
            self.report(variant.compiled.plan)
        return variant

    def smallest(self) -> Variant:
        """The variant of least peak."""
        found = next((v for v in self.variants if v.smallest), None)
        if found is None:
            with self._compiling():
                found = self.add(self.fakes, self.planned_for[-1], Held(), smallest=True)
        return found

    def decided(self, sizes: tuple[int, ...], decisions: Mapping[int, Decision], policy: str) -> Variant:
        """A variant with these decisions, whether or not it fits alone: one that is there, or a new one."""
        key = tuple(sorted(decisions.items(), key=lambda decided: decided[0]))
        if key not in self.by_decisions:
            partitioner = replace(
                self.partitioner,
                policy=Chosen(policy, decisions),
                sizes=self.given(sizes),
                held=Held(),
                fit=False,
                decided=True,
                several=True,
            )
            with self._compiling():
                variant = self._compiled(self.fakes, partitioner, False, [])
            if variant.compiled.plan is not None:
                reserve(variant.compiled.plan)
            self.by_decisions[key] = variant
        return self.by_decisions[key]

    def _compiled(
        self, inputs: Sequence[Any], partitioner: Partitioner, smallest: bool, fits_up_to: list[Point]
    ) -> Variant:
        made: list[Variant] = []

        def failed(error: Exception, place: Place) -> None:
            if made and made[0].compiled.plan is not None:
                self.explain(error, lambda: located(made[0], place))

        compiled = self.compiler(self.graph, inputs, replace(partitioner, failed=failed))
        made.append(Variant(self, compiled, smallest, fits_up_to))
        return made[0]

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        mode = detect_fake_mode(self.fakes)
        assert mode is not None
        _leave_nothing(self.partitioner)
        interrupt()  # what measures between graphs would take the gradients that are traced for a step's backward
        with tracing(TracingContext(mode)):
            yield

    def _find(self, sizes: tuple[int, ...], held: Held) -> Variant:
        """A variant that fits where none is known to."""
        for variant in self.variants:
            for n in (self.larger(sizes, MARGIN), sizes):
                if variant.fits((*n, *held.extent), self.given(n), held):
                    return variant
        log.warning("no plan fits sizes %s with %s held: planning again", dict(self.given(sizes)), dict(held.kinds))
        with self._compiling():
            known = _within(sizes, self.planned_for[-1])  # then it is what is held that has grown
            smallest = not known and len(set(self.planned_for)) > 1
            if not smallest:
                try:
                    return self.add(self.fakes, self.planned_for[-1] if known else self.larger(sizes, 2), held)
                except DoesNotFit:
                    pass  # for these sizes alone, then
            return self.add(self.fakes, sizes, held, smallest=smallest)

    def given(self, sizes: tuple[int, ...]) -> SizesGiven:
        return tuple(zip(self.symbols.values(), sizes, strict=True))

    def larger(self, sizes: tuple[int, ...], factor: float) -> tuple[int, ...]:
        """Sizes times a factor, inside the limits, and never smaller than they are."""
        return tuple(max(n, int(min(n * factor, most))) for n, most in zip(sizes, self.limits, strict=True))
