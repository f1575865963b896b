"""The graphs of one torch.compile call: planned together where several of them run in one step.

In: the runs of planned graphs, as they come. Out: for each run the compiled variant to use. Which graphs make a step
is seen, not known: runs belong to one step until its backward starts, or until nothing is left of their results.
The first step runs each graph's smallest plan, and what it was called with and returned is noted. At the next step the
graphs are planned as one (joint.py), compiled anew where their share differs, and swapped in.
What must hold: no graph runs where the step up to it, with the backward of what has run, is not known to fit. A step
that departs from the plan (another graph, larger sizes, more held) goes on with smallest plans, each looked at before
it runs, and is planned again at the next.
What Python allocates after a graph, and on the way back, is measured in the first two steps (runtime/window.py) and
whenever sizes grow; for other sizes it is scaled by their product.
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
from memplan.ir import Block, Gap, Held, Plan
from memplan.passes import joint
from memplan.passes.gaps import with_gap
from memplan.passes.joint import Part
from memplan.passes.outside import Outside
from memplan.passes.pipeline import does_not_fit, evaluate, make_plan
from memplan.runtime.held import Watch
from memplan.runtime.optimizers import Around
from memplan.runtime.window import Span, in_backward

if TYPE_CHECKING:
    from memplan.passes.dispatch import Adaptive, Variant

log = logging.getLogger("torch.memplan")

ROUNDS, MARGIN = 3, 0.99  # as for generated code: how often a plan that came out too large is made again, and smaller
SO_FAR = "this is what the first {} graphs of the step need: those after them are not known yet, and may need more"
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
    ahead: Span | None = None  # what runs after it
    behind: Span | None = None  # and before its backward

    def part(self, plan: Plan) -> Part:
        return Part(plan, self.arguments, self.results)


@dataclass(frozen=True)
class Joint:
    """A plan for a sequence of runs: the variant of each, the sizes up to which it holds, the bytes held, and the gaps
    that it leaves room for.
    """

    variants: tuple[Variant, ...]
    sizes: tuple[tuple[int, ...], ...]
    gaps: tuple[Gap | None, ...]
    held: tuple[int, int, int]


@dataclass
class WholeStep:
    """The state of one torch.compile call. `several`: its graphs are known not to be alone in the step."""

    several: bool = False
    runs: list[Run] = field(default_factory=list)
    joint: Joint | None = None  # the plan of the step under way, while it is followed
    plans: dict[tuple[int, ...], list[Joint]] = field(default_factory=dict)  # graphs, in order -> plans, latest last
    outside: Outside = field(default_factory=Outside)
    backward_ran: bool = False
    parameters: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    watch: Watch = field(default_factory=lambda: Watch(around=Around()))  # the graphs' own share what is around
    now: Run | None = None  # under way
    held: Held = field(default_factory=Held)  # when it was looked at last

    def run(self, graph: Adaptive, args: Sequence[Any]) -> Any:
        """Run a graph with the variant that the step allows."""
        if in_backward():  # torch's checkpointing runs it again: as it ran before
            sizes = graph.sizes(args)
            same = [run.variant for run in self.runs if run.graph is graph and run.sizes == sizes]
            again = same[-1] if same else graph.choose(args)
            graph.tell(again, args, alone=False)
            return again.compiled.run(*args)
        if self.runs and (span := self.runs[-1].ahead) is not None:
            span.close(self._new_storages(args))
        if self._over():
            self._begin()
        sizes = graph.sizes(args)
        pins = [_reference(a) for a in args]
        arguments = tuple(0 if p is None else p.cdata for p in pins)
        now = Run(graph, self._choose(graph, args, sizes, arguments), sizes, arguments, pins=[p for p in pins if p])
        looks = self.several and torch.is_grad_enabled() and self.outside.unseen((id(graph), len(self.runs)), sizes)
        if looks or any(run.ahead is not None for run in self.runs):  # for the way back, then
            self.outside.open()
        self.now = now
        graph.tell(now.variant, args, alone=not (self.runs or self.several))
        result = now.variant.compiled.run(*args)
        self.now = None
        self._note(now, result, looks)
        return result

    # ---- what a step is ---------------------------------------------------------------------------------------------

    def _over(self) -> bool:
        if not self.backward_ran:  # what was dropped, or kept without its graph, leaves nothing behind
            self.runs = [run for run in self.runs if run.waits is not None and run.waits() is not None]
        return self.backward_ran or not self.runs

    def _note(self, run: Run, result: Any, looks: bool) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        references = [_reference(r) for r in results]
        run.results = tuple(0 if r is None else r.cdata for r in references)
        node = next((r.grad_fn for r in results if isinstance(r, torch.Tensor) and r.grad_fn is not None), None)
        if node is None:  # its backward is inside, or it ran without gradients: it leaves nothing for later
            self._dropped()
            return

        def backward_starts(tangents: Sequence[Any]) -> None:
            self.backward_ran = self.backward_ran or run in self.runs
            for span in (run.ahead, run.behind):
                if span is not None:
                    span.close(_storages(tangents))

        before = self.runs[-1] if self.runs else None

        def backward_ends(*_: Any) -> None:
            session = self.outside.session
            if before is not None and before.ahead is not None and session is not None and session.open:
                before.behind = Span.opened(session)

        node.register_prehook(backward_starts)
        node.register_hook(backward_ends)
        run.waits = weakref.ref(backward_starts, lambda _: self._dropped())  # the node alone holds it
        if looks and any(isinstance(r, torch.Tensor) and r.dim() and r.requires_grad for r in results):
            run.ahead = Span.opened(self.outside.open(), _read_again(run.variant.compiled.plan, results))
        elif looks:  # it returns a loss
            self.outside.remember((id(run.graph), len(self.runs)), run.sizes, None, None)
        self.runs.append(run)

    # ---- what runs outside of graphs --------------------------------------------------------------------------------

    def _dropped(self) -> None:
        if all(run.waits is None or run.waits() is None for run in self.runs):
            self.outside.end()

    def _remember(self, runs: Sequence[Run]) -> None:
        """Keep what was seen to run after these."""
        self.outside.end()
        for position, run in enumerate(runs):
            if run.ahead is not None:
                self.outside.remember((id(run.graph), position), run.sizes, run.ahead, run.behind)

    def _gaps(self, runs: Sequence[Run], sizes: Sequence[tuple[int, ...]]) -> list[Gap | None]:
        """What runs after each of them at these sizes."""
        return [self.outside.gap((id(run.graph), k), n) for k, (run, n) in enumerate(zip(runs, sizes, strict=True))]

    def _new_storages(self, args: Sequence[Any]) -> dict[int, int]:
        """Those that no graph of the step has seen yet, by address."""
        known = {key for run in self.runs for key in (*run.arguments, *run.results)}
        return _storages([a for a in args if (p := _reference(a)) is not None and p.cdata not in known])

    def _parts(self, runs: Sequence[Run], plans: Sequence[Plan], sizes: Sequence[tuple[int, ...]]) -> list[Part]:
        """The runs with these plans, and with what runs after each of them."""
        gaps = self._gaps(runs, sizes)
        return [run.part(with_gap(plan, gap)) for run, plan, gap in zip(runs, plans, gaps, strict=True)]

    def _begin(self) -> None:
        """A new step begins: plan the last one if it was of several graphs and departed from its plan."""
        last, self.runs, self.backward_ran = self.runs, [], False
        if self.watch.around is not None:
            self.watch.around.forget()
        self._remember(last)
        followed = self.joint
        self.several = self.several or len(last) > 1
        if not last:  # nothing came of it: it says nothing about the plan
            return
        if not self.several:
            self.joint = None
            return
        key = tuple(id(run.graph) for run in last)
        made = self.plans.setdefault(key, [])
        if not made or ((followed is None or self._outgrown(last, made[-1])) and len(made) < PLANS):
            made.append(self._plan(last, again=bool(made)))
            if len(made) == PLANS:
                log.warning("%d plans were made for these %d graphs: the last one stays", PLANS, len(last))
        self.joint = made[-1]

    def _outgrown(self, last: Sequence[Run], plan: Joint) -> bool:
        """Whether more was seen to run outside of graphs than the plan leaves room for."""
        now = self._gaps(last, plan.sizes)
        return any(a is not None and (b is None or a.exceeds(b)) for a, b in zip(now, plan.gaps, strict=True))

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
            if variant.owner is graph and within and all(a <= b for a, b in zip(total.extent, plan.held, strict=True)):
                return variant
        self.joint, self.several = None, True
        self._remember(self.runs)
        variant = graph.smallest()
        parts = self._parts(self.runs, [run.variant.at(run.sizes) for run in self.runs], [r.sizes for r in self.runs])
        if closed:
            found = self._beside(variant.with_held(sizes, total), parts, total, graph)
        else:
            found = self._composed([*parts, Part(variant.at(sizes), arguments, ())], total, graph)
        if not found.fits:
            notes = (*found.step.notes, SO_FAR.format(len(parts) + 1))
            found = replace(found, step=replace(found.step, notes=notes))
            raise does_not_fit(found, found)
        return variant

    def _held(self, parameters: Sequence[torch.Tensor] = ()) -> Held:
        """What the process holds for these parameters, and for those of all runs before."""
        known = {id(p): p for p in (ref() for ref in self.parameters) if p is not None}
        new = [p for p in parameters if id(p) not in known]
        if new:
            self.parameters += [weakref.ref(p) for p in new]
            known |= {id(p): p for p in new}
        self.held = self.watch.held(list(known.values()))
        return self.held

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
                return Joint(variants, sizes, tuple(self._gaps(last, sizes)), total.extent)
            except DoesNotFit:
                if factor == 1:
                    raise
        raise AssertionError("unreachable")

    def _fitted(self, last: Sequence[Run], sizes: Sequence[tuple[int, ...]], total: Held) -> tuple[Variant, ...]:
        partitioner = last[0].graph.partitioner
        budget, inner = partitioner.budget, partitioner.inner
        smallest_plans = [run.graph.smallest().at(n) for run, n in zip(last, sizes, strict=True)]
        least = self._parts(last, smallest_plans, sizes)
        merged = joint.merge(least, total)
        wanted, smallest = budget.available, self._composed(least, total, last[0].graph)
        for _ in range(ROUNDS):
            plan = make_plan(
                merged.step, partitioner.policy, budget.leaving(wanted), partitioner.machine, inner=inner, fit=False
            )
            given = joint.shares(plan, merged, smallest_plans)
            if inner == "eager":  # what is generated is known beforehand
                made = [
                    evaluate(p.step, g, budget, plan.machine, inner, plan.policy)
                    for p, g in zip(smallest_plans, given, strict=True)
                ]
                found = joint.compose(self._parts(last, made, sizes), total, merged.step.name)
            if inner != "eager" or found.peak <= budget.available:
                variants = [run.graph.decided(n, g, plan.policy) for run, n, g in zip(last, sizes, given, strict=True)]
                made = [v.at(n) for v, n in zip(variants, sizes, strict=True)]
                found = joint.compose(self._parts(last, made, sizes), total, merged.step.name)
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
        if len(last) == 1:
            note = f"the graph was planned with what runs outside of it, and {'' if compiled else 'not '}compiled again"
        last[0].graph.report(replace(plan, notes=(*plan.notes, note)))


def _storages(values: Sequence[Any]) -> dict[int, int]:
    """Address -> bytes of the tensors' storages."""
    found = (v.untyped_storage() for v in values if isinstance(v, torch.Tensor) and _reference(v) is not None)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _read_again(plan: Plan | None, results: Sequence[Any]) -> dict[int, int]:
    """The storages of those results that ops read too: whether the caller drops them or not, a plan may keep them."""
    if plan is None:
        return {}
    read = {t for op in plan.step.ops for t in op.inputs}
    return _storages([r for r, t in zip(results, plan.step.ports.results, strict=False) if t in read])


def _reference(value: Any) -> StorageWeakRef | None:
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None  # sparse tensors and wrapper subclasses have none
