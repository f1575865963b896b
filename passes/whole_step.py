"""The graphs of one torch.compile call: planned together where several of them run in one step.

In: the runs of planned graphs, as they come. Out: for each run the compiled variant to use. Which graphs make a step
is seen, not known: runs belong to one step until its backward starts, or until nothing is left of their results.
The first step runs each graph's smallest plan, and what it was called with and returned is noted. At the next step the
graphs are planned as one (joint.py), compiled anew where their share differs, and swapped in.
What must hold: no graph runs where the step up to it, with the backward of what has run, is not known to fit. A step
that departs from the plan (another graph, larger sizes, more held) goes on with smallest plans, each looked at before
it runs, and is planned again at the next.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memplan.errors import DoesNotFit
from memplan.ir import Block, Budget, Plan
from memplan.passes import joint
from memplan.passes.joint import Part
from memplan.passes.pipeline import does_not_fit, evaluate, make_plan
from memplan.runtime.held import Held, held, optimizers_of

if TYPE_CHECKING:
    from memplan.passes.dispatch import Adaptive, Variant

log = logging.getLogger("torch.memplan")

ROUNDS, MARGIN = 3, 0.99  # as for generated code: how often a plan that came out too large is made again, and smaller
PLANS = 4  # plans for one sequence of graphs; then the smallest ones stay


@dataclass(eq=False)
class Run:
    """One run of a graph in a step. Storages are known by the address of their record, which a weak reference pins."""

    graph: Adaptive
    variant: Variant
    sizes: tuple[int, ...]
    arguments: tuple[int, ...]
    results: tuple[int, ...] = ()
    pins: list[StorageWeakRef] = field(default_factory=list)
    waits: weakref.ref[Any] | None = None  # dead when nothing can call its backward any more

    def part(self, plan: Plan | None = None) -> Part:
        return Part(plan or self.variant.at(self.sizes), self.arguments, self.results)


@dataclass(frozen=True)
class Joint:
    """A plan for a sequence of runs: the variant of each, the sizes up to which it holds, and the bytes held."""

    variants: tuple[Variant, ...]
    sizes: tuple[tuple[int, ...], ...]
    held: int


@dataclass
class WholeStep:
    """The state of one torch.compile call. `several`: its graphs are known not to be alone in the step."""

    several: bool = False
    runs: list[Run] = field(default_factory=list)
    joint: Joint | None = None  # the plan of the step under way, while it is followed
    plans: dict[tuple[int, ...], list[Joint]] = field(default_factory=dict)  # graphs, in order -> plans, latest last
    backward_ran: bool = False
    parameters: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    optimizers: list[weakref.ref[torch.optim.Optimizer]] = field(default_factory=list)
    looks: int = 3  # steps at whose start optimizers are looked for, until they are found

    def run(self, graph: Adaptive, args: Sequence[Any]) -> Any:
        """Run a graph with the variant that the step allows."""
        if self._over():
            self._begin()
        sizes = graph.sizes(args)
        pins = [_reference(a) for a in args]
        arguments = tuple(0 if p is None else p.cdata for p in pins)
        now = Run(graph, self._choose(graph, args, sizes, arguments), sizes, arguments, pins=[p for p in pins if p])
        result = now.variant.compiled.run(*args)
        self._note(now, result)
        return result

    # ---- what a step is ---------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        if not self.backward_ran:  # what was dropped, or kept without its graph, leaves nothing behind
            self.runs = [run for run in self.runs if run.waits is not None and run.waits() is not None]
        return self.backward_ran or not self.runs

    def _note(self, run: Run, result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        references = [_reference(r) for r in results]
        run.results = tuple(0 if r is None else r.cdata for r in references)
        node = next((r.grad_fn for r in results if isinstance(r, torch.Tensor) and r.grad_fn is not None), None)
        if node is None:  # its backward is inside, or it ran without gradients: it leaves nothing for later
            return

        def backward_starts(_: Any) -> None:
            self.backward_ran = self.backward_ran or run in self.runs

        node.register_prehook(backward_starts)
        run.waits = weakref.ref(backward_starts)  # the node alone holds it
        self.runs.append(run)

    def _begin(self) -> None:
        """A new step begins: plan the last one if it was of several graphs and departed from its plan."""
        last, self.runs, self.backward_ran = self.runs, [], False
        followed = self.joint
        self.several = self.several or len(last) > 1
        if len(last) < 2:
            self.joint = None
            return
        key = tuple(id(run.graph) for run in last)
        made = self.plans.setdefault(key, [])
        if not made or (followed is None and len(made) < PLANS):
            made.append(self._plan(last, again=bool(made)))
            if len(made) == PLANS:
                log.warning("%d plans were made for these %d graphs: the last one stays", PLANS, len(last))
        self.joint = made[-1]

    # ---- the variant of one run -------------------------------------------------------------------------------------

    def _choose(
        self, graph: Adaptive, args: Sequence[Any], sizes: tuple[int, ...], arguments: tuple[int, ...]
    ) -> Variant:
        position, plan = len(self.runs), self.joint
        first = graph.variants[0].compiled.plan
        closed = first is not None and first.step.closed
        if not self.runs and (closed or not (plan or self.several)):
            return graph.choose(args)
        total = self._held([args[i] for i in graph.parameters])
        if plan is not None and position < len(plan.variants):
            variant = plan.variants[position]
            within = all(n <= most for n, most in zip(sizes, plan.sizes[position], strict=False))
            if variant.owner is graph and within and sum(b for _, b in total) <= plan.held:
                return variant
        self.joint, self.several = None, True
        variant = graph.smallest()
        parts = [run.part() for run in self.runs]
        if closed:
            found = self._beside(variant.at(sizes), parts, total, graph)
        else:
            found = self._composed([*parts, Part(variant.at(sizes), arguments, ())], total, graph)
        if not found.fits:
            raise does_not_fit(found, found)
        return variant

    def _held(self, parameters: Sequence[torch.Tensor] = ()) -> Held:
        """What the process holds for these parameters, and for those of all runs before."""
        known = {id(p): p for p in (ref() for ref in self.parameters) if p is not None}
        new = [p for p in parameters if id(p) not in known]
        if new:
            self.parameters += [weakref.ref(p) for p in new]
            known |= {id(p): p for p in new}
            self.optimizers = optimizers_of(list(known.values()))
        elif not self.runs and not self.optimizers and self.looks:
            self.looks -= 1
            self.optimizers = optimizers_of(list(known.values()))
        return held(known.values(), [o for o in (ref() for ref in self.optimizers) if o is not None])

    def _composed(self, parts: Sequence[Part], total: Held, graph: Adaptive) -> Plan:
        """The parts as one plan, with no decisions of its own: for its peak, and to say what does not fit."""
        merged = joint.merge(parts, total)
        timeline = joint.compose(parts, total, merged.step.name)
        plan = parts[-1].plan
        return replace(
            plan, step=merged.step, decisions=(), runs=(), timeline=timeline, budget=graph.partitioner.budget
        )

    def _beside(self, plan: Plan, parts: Sequence[Part], total: Held, graph: Adaptive) -> Plan:
        """A plan that leaves nothing behind, while others wait for their backward."""
        kept = self._composed(parts, total, graph).timeline
        turn = sum(m.phase == "forward" for m in kept.moments)
        waiting = Block("kept by other graphs", kept.totals[turn] - kept.base_bytes, "activation", 0, 0)
        own = plan.timeline
        timeline = replace(own, blocks=(*own.blocks, replace(waiting, end=len(own.moments))))
        return replace(plan, timeline=timeline, budget=graph.partitioner.budget)

    # ---- the plan of all ---------------------------------------------------------------------------------------------

    def _plan(self, last: Sequence[Run], *, again: bool) -> Joint:
        """Plan the runs of a step as one. Raises DoesNotFit."""
        total = self._held()
        for factor in (2, 1) if again else (1,):  # sizes or bytes held have grown: leave room for more
            sizes = tuple(run.graph.larger(run.sizes, factor) for run in last)
            try:
                variants = self._fitted(last, sizes, total)
                return Joint(variants, sizes, sum(b for _, b in total))
            except DoesNotFit:
                if factor == 1:
                    raise
        raise AssertionError("unreachable")

    def _fitted(self, last: Sequence[Run], sizes: Sequence[tuple[int, ...]], total: Held) -> tuple[Variant, ...]:
        partitioner = last[0].graph.partitioner
        budget, inner = partitioner.budget, partitioner.inner
        least = [run.part(run.graph.smallest().at(n)) for run, n in zip(last, sizes, strict=True)]
        merged = joint.merge(least, total)
        wanted, smallest = budget.available, self._composed(least, total, last[0].graph)
        for _ in range(ROUNDS):
            plan = make_plan(
                merged.step, partitioner.policy, Budget(wanted), partitioner.machine, inner=inner, fit=False
            )
            given = joint.shares(plan, merged, least)
            if inner == "eager":  # what is generated is known beforehand
                made = [
                    evaluate(p.plan.step, g, budget, plan.machine, inner, plan.policy)
                    for p, g in zip(least, given, strict=True)
                ]
                found = joint.compose(
                    [replace(p, plan=m) for p, m in zip(least, made, strict=True)], total, merged.step.name
                )
            if inner != "eager" or found.peak <= budget.available:
                variants = [run.graph.decided(n, g, plan.policy) for run, n, g in zip(last, sizes, given, strict=True)]
                parts = [run.part(v.at(n)) for run, v, n in zip(last, variants, sizes, strict=True)]
                found = joint.compose(parts, total, merged.step.name)
            if found.peak <= budget.available:
                new = len({id(v) for v in variants} - {id(run.variant) for run in last})
                self._report(replace(plan, timeline=found, budget=budget), last, new)
                return tuple(variants)
            if plan.peak > wanted:  # the policy has nothing smaller
                break
            base = merged.step.base_bytes
            wanted = base + int((plan.peak - base) * (budget.available - base) / (found.peak - base) * MARGIN)
        if not smallest.fits:
            raise does_not_fit(smallest, smallest)
        self._report(smallest, last, 0)
        return tuple(run.graph.smallest() for run in last)

    def _report(self, plan: Plan, last: Sequence[Run], compiled: int) -> None:
        torch._dynamo.utils.counters["memplan"]["recompiles"] += compiled
        note = f"{len(last)} graphs were planned as one step, and {compiled} of them compiled again for it"
        last[0].graph.report(replace(plan, notes=(*plan.notes, note)))


def _reference(value: Any) -> StorageWeakRef | None:
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None  # sparse tensors and wrapper subclasses have none
