"""The partitioner: AOTAutograd's joint graph in, planned forward and backward graphs out.

One Partitioner serves one compile. It carries what that compile needs (policy, budget, machine, inner) and
gives the Plan to `on_plan`. It is the single place where capture, planning and rewriting meet.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx
from torch._guards import TracingContext

from memplan.ir import Budget, CostModel, Held, Machine, Plan, Step
from memplan.passes import capture, marks, tile, workspaces
from memplan.passes.calls import Call, copied
from memplan.passes.one_graph import rewrite
from memplan.passes.phases import hoist, leading
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies import Policy
from memplan.passes.pricing import priced
from memplan.passes.recompute import split
from memplan.passes.tilings import NOTES, UNFUSED, Pins, Tiling, has_fused, in_slices, menu
from memplan.passes.torch_policies import saved_sets
from memplan.runtime.failing import Failed, nobody

SURE = 1.1  # times are estimates: what is to be sliced without need must be predicted to be this much faster so

SizesGiven = tuple[tuple[str, int], ...]  # size symbol -> value
Resized = Callable[[SizesGiven, Held], Plan]  # the plan of the same decisions at other sizes, with more or less held


@dataclass(frozen=True)
class Partitioner:
    """`names`: people's names of the graph's inputs. `policy` is a policy or its name."""

    policy: str | Policy
    budget: Budget
    machine: Machine
    inner: str
    on_plan: Callable[[Plan, Resized], None]
    names: tuple[str, ...] = ()
    held: Held = field(default_factory=Held)  # what no op touches
    measure: bool = True  # run ops on the CPU to learn their workspaces, rather than look them up
    title: str = "step"
    notes: tuple[str, ...] = ()  # what is known to be missing before anything is captured
    sizes: SizesGiven = ()  # what size symbols are taken to be; the others: as they were traced
    smallest: bool = False  # the smallest plan of the policy, even if there is room for a faster one
    several: bool = False  # other graphs run in the same step
    parameters: frozenset[int] = frozenset()  # which arguments are parameters
    known: workspaces.Known = field(default_factory=dict, compare=False, repr=False)  # memory inside ops, as measured
    tiles: int | Pins | Literal["auto"] | None = None  # rows of a slice, or by place rows or a way; None: no slices
    tilings: list[Tiling] = field(default_factory=list, compare=False, repr=False)  # of the smallest plans
    decided: bool = False  # the policy repeats decisions made for the smallest plan's graph
    failed: Failed = field(default=nobody, compare=False, repr=False)  # hears of errors of what is compiled
    cost: CostModel = "roofline-v1"  # prices the steps it makes
    fit: bool = True  # refuse a plan over the budget; Inductor's is judged by its generated code instead

    def __call__(
        self,
        joint: fx.GraphModule,
        _inputs: Sequence[Any],
        *,
        num_fwd_outputs: int,
        static_lifetime_input_indices: Sequence[int] | None = None,
        **_: Any,
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        capture.prepare(joint)
        given = num_fwd_outputs, tuple(static_lifetime_input_indices or ()), mutated_inputs()
        joint = self.tiled(joint, *given)
        plan = self._planned(lambda by: by.step(joint, *given))
        forward, backward = split(joint, plan, num_fwd_outputs)
        marks.put(backward, plan)
        return forward, backward

    def tiled(
        self, joint: fx.GraphModule, num_fwd_outputs: int, parameters: Sequence[int], mutated: Collection[int]
    ) -> fx.GraphModule:
        """A prepared joint graph, tiled."""
        given = num_fwd_outputs, parameters, mutated
        return self._in_slices(joint, tile.forward_of_joint(num_fwd_outputs), lambda module: self.step(module, *given))

    def _in_slices(
        self, graph: fx.GraphModule, forward_of: tile.ForwardOf, step_of: Callable[[fx.GraphModule], Step]
    ) -> fx.GraphModule:
        """A prepared graph, tiled as option `tiles` says: its regions in slices of so many rows, or, "auto", as the
        fastest plan that fits has it.
        """
        if self.tiles is None:
            return graph
        if self.tiles != "auto":
            return in_slices(graph, forward_of, self.tiles, self.inner, several=self.several)
        if self.decided:  # for the graph as it was then
            return in_slices(graph, forward_of, self.tilings[0], self.inner)
        found = []
        looked_at, seen, unfused, everything = [Tiling()], set[str](), tuple[str, ...](), tuple[str, ...]()
        for tiling in looked_at:  # which grows
            module = in_slices(graph, forward_of, tiling, self.inner)
            if tiling.head:
                unfused = unfused or module.meta[UNFUSED]
            elif tiling.bytes:
                everything = module.meta[NOTES]
            if (tiling.head and not has_fused(module)) or str(module.graph) in seen:
                continue
            seen.add(str(module.graph))
            plan = self._made(step_of(module), fit=False)
            if tiling == Tiling():
                looked_at += menu(plan.peak - plan.step.base_bytes)
            by_time = plan.fits and not self.smallest
            seconds = plan.timeline.seconds * (SURE if tiling.slices else 1.0)
            found.append((not plan.fits, seconds if by_time else float(plan.peak), tiling, module))
        *_, tiling, module = min(found, key=lambda f: f[:2])
        if not tiling.slices:  # then what could not be
            module.meta[NOTES] = tuple(note for note in everything if note.startswith("not"))
        if not has_fused(module):
            module.meta[NOTES] += unfused
        if self.smallest:
            self.tilings.append(tiling)
        return module

    def _made(self, step: Step, *, fit: bool) -> Plan:
        return make_plan(
            step,
            self.policy,
            self.budget,
            self.machine,
            inner=self.inner,
            fit=fit,
            smallest=self.smallest,
            several=self.several,
        )

    def whole(self, graph: fx.GraphModule) -> None:
        """Plan a graph with its backward inside, and put the planned one in its place."""
        capture.prepare(graph)
        hoist(graph)
        # What runs beside it, before and after, keeps nothing of it: it need not be the smallest because of that.
        alone = dataclasses.replace(self, smallest=self.smallest and not self.several)
        # What follows from other sizes is read from the original.
        original = alone._in_slices(copied(graph), leading, alone.whole_step)
        graph.graph = copied(original).graph
        plan = alone._planned(lambda by: by.whole_step(original))
        rewrite(graph, plan)
        marks.put(graph, plan)

    def _planned(self, step_of: Callable[[Partitioner], Step]) -> Plan:
        plan = self._made(step_of(self), fit=self.fit)
        if self.budget.listener:
            plan = dataclasses.replace(plan, marks=marks.marks(plan))

        def resized(sizes: SizesGiven, held: Held) -> Plan:
            step = step_of(dataclasses.replace(self, sizes=sizes, held=held))
            made = evaluate(step, dict(plan.decisions), self.budget, self.machine, self.inner, plan.policy)
            return dataclasses.replace(made, notes=plan.notes, marks=plan.marks)

        self.on_plan(plan, resized)
        return plan

    def whole_step(self, graph: fx.GraphModule) -> Step:
        """The Step of a prepared graph with its backward inside."""
        step = capture.capture_whole(
            graph,
            parameters=self.parameters,
            names=self.names,
            workspaces=self._workspaces,
            fused=self.inner == "inductor",
            title=self.title,
            sizes=self.sizes,
        )
        notes = (*self.notes, *self.held.notes, *graph.meta.get(NOTES, ()), *step.notes)
        return priced(dataclasses.replace(step, held=self.held, notes=notes), self.cost)

    def step(
        self,
        joint: fx.GraphModule,
        num_fwd_outputs: int,
        parameters: Sequence[int],
        mutated: Collection[int],
    ) -> Step:
        """The Step of a prepared joint graph, with torch's saved sets when the policy wants them."""
        step = capture.capture(
            joint,
            num_fwd_outputs=num_fwd_outputs,
            parameters=self.parameters | frozenset(parameters),
            mutated=mutated,
            names=self.names,
            workspaces=self._workspaces,
            fused=self.inner == "inductor",
            title=self.title,
            sizes=self.sizes,
        )
        saved = saved_sets(joint, step, num_fwd_outputs, parameters, self.policy)
        notes = (*self.notes, *self.held.notes, *joint.meta.get(NOTES, ()), *step.notes)
        return priced(dataclasses.replace(step, held=self.held, saved_by=saved, notes=notes), self.cost)

    def _workspaces(self, calls: Sequence[Call]) -> list[workspaces.Inside]:
        if not self.measure or self.machine.device != "cpu":
            return [workspaces.Inside(workspaces.by_rule(c, self.machine)) for c in calls]
        if self.inner == "eager":
            return workspaces.run_alone(calls, self.known)
        # Inductor chooses the layout of convolutions, and with it their workspace: seen in the generated code.
        return [
            workspaces.Inside(0 if "convolution" in str(call.target) else size)
            for call, size in zip(calls, workspaces.measure(calls, self.known), strict=True)
        ]


def mutated_inputs() -> frozenset[int]:
    """Inputs that the step writes to, as AOTAutograd found them."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        return frozenset()
    # not mutated_inp_runtime_indices: it leaves out the inputs that the graph itself writes to, with copy_
    return frozenset(i for i, info in enumerate(metadata.input_info) if info.mutates_data)


def tensor_names(graph: fx.GraphModule) -> tuple[str, ...]:
    """People's names for a Dynamo graph's inputs: "model.layers.0.mlp.up_proj.weight"."""
    return tuple(_clean(str(n.target)) for n in graph.graph.nodes if n.op == "placeholder")


def _clean(name: str) -> str:
    name = re.sub(r"_(parameters|modules|buffers)_", ".", name.removeprefix("L_").removeprefix("G_"))
    return name.replace("self_", "").strip("_.")
