"""A step traced once and run under many plans, in memory that is measured: the harness of the tests of bytes and bits.

    joint = Joint.of(loss, tensors)                  # or Joint.of_step(sample): through Dynamo
    plans = [joint.plan(policy) for policy in ...]
    results, peaks = joint.run(plans, seed=0)

What must hold: graphs are made by the product's own partitioner pieces (step, make_plan, split) and run by its eager
executor; tracing, capture and the measuring of workspaces, which no policy changes, are done once. AOTAutograd's
runtime is the only part of torch.compile left out: forward's outputs are given to backward here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses import FakeTensorMode

import memplan
from memplan.ir import Budget, Plan, Step
from memplan.machines import machine
from memplan.passes import capture
from memplan.passes.partition import Partitioner, mutated_inputs
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies import find, name_of
from memplan.passes.recompute import split
from memplan.runtime.executor import compile_eager

CPU = machine("cpu")
AMPLE = Budget(10**15, host_bytes=10**15)
NO_DEVICE = Budget(0, host_bytes=10**15)
NOTHING = Budget(0)
SENTINEL = 999_983  # bytes of an allocation that marks a place in a recording; no test tensor has this size


@dataclass
class Joint:
    """A prepared joint graph with its Step, and the tensors it runs on."""

    graph: fx.GraphModule
    step: Step
    num_fwd_outputs: int
    inputs: list[torch.Tensor]  # the primals
    fakes: FakeTensorMode

    @staticmethod
    def of(loss: Callable[[list[torch.Tensor]], torch.Tensor], tensors: list[torch.Tensor]) -> Joint:
        """Trace loss(tensors), whose first tensor requires a gradient, without Dynamo."""
        seen: list[Joint] = []
        primals = [t.detach() for t in tensors]

        def stop(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
            seen.append(Joint.prepared(joint, num_fwd_outputs, (), primals))
            raise _Stop

        try:
            aot_function(lambda *t: loss(list(t)), fw_compiler=_never, bw_compiler=_never, partition_fn=stop)(*tensors)
        except _Stop:
            return seen[0]
        raise AssertionError("the partitioner was not called")

    @staticmethod
    def prepared(
        joint: fx.GraphModule, num_fwd_outputs: int, parameters: Sequence[int], inputs: list[torch.Tensor]
    ) -> Joint:
        partitioner = Partitioner("torch", AMPLE, CPU, "eager", on_plan=lambda *_: None)
        capture.prepare(joint)
        step = partitioner.step(joint, num_fwd_outputs, parameters, mutated_inputs())
        fakes = detect_fake_mode([n.meta.get("val") for n in joint.graph.nodes])
        assert fakes is not None
        return Joint(joint, step, num_fwd_outputs, inputs, fakes)

    @staticmethod
    def of_step(step: Callable[[Any], torch.Tensor], batch: Any) -> Joint:
        """Trace step(batch) with torch.compile, and run it once."""
        seen: list[Joint] = []

        def partition(
            joint: fx.GraphModule,
            _inputs: Any,
            *,
            num_fwd_outputs: int,
            static_lifetime_input_indices: Sequence[int] | None = None,
            **_: Any,
        ) -> Any:
            seen.append(Joint.prepared(joint, num_fwd_outputs, static_lifetime_input_indices or (), []))
            return seen[0].split(seen[0].plan("save-all"))

        def forward(graph: fx.GraphModule, inputs: Any) -> Callable[[list[Any]], Any]:
            run = compile_eager(graph, inputs)

            def note_inputs(args: list[Any]) -> Any:
                seen[0].inputs = [a.detach() for a in args]
                return run(args)

            note_inputs._boxed_call = True  # type: ignore[attr-defined]
            return note_inputs

        backend = aot_autograd(fw_compiler=forward, bw_compiler=compile_eager, partition_fn=partition)
        torch.compile(step, backend=backend, fullgraph=True)(batch)
        return seen[0]

    def plan(self, policy: Any, budget: Budget = AMPLE) -> Plan:
        """The policy's plan, fitting or not."""
        if budget is AMPLE:
            return make_plan(self.step, policy, budget, CPU, inner="eager")
        return evaluate(self.step, find(policy)(self.step, budget, CPU), budget, CPU, "eager", name_of(policy))

    def split(self, plan: Plan) -> tuple[fx.GraphModule, fx.GraphModule]:
        with tracing(TracingContext(self.fakes)):  # where the replay of random numbers looks for the fake mode
            return split(_copied(self.graph), plan, self.num_fwd_outputs)

    def run(self, plans: Sequence[Plan], seed: int) -> tuple[list[list[torch.Tensor | None]], list[int]]:
        """For each plan: the step's outputs and gradients, the next random number, and the peak of its bytes beyond
        what was there before.

        Results of earlier plans do not count, because they are moved into memory that is there already.
        """
        pairs = []
        for plan in plans:
            forward, backward = self.split(plan)
            pairs.append((compile_eager(forward, None), compile_eager(backward, None)))
        tangents = [self.step.tensors[t] for t in self.step.backward.inputs]
        assert len(tangents) == 1 and tangents[0].bytes <= 8, "the step returns a scalar loss"
        like = self._execute(*pairs[0], seed)
        places = [[None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in like] for _ in plans]
        numbers = [torch.empty(1) for _ in plans]
        del like
        with memplan.record("cpu") as seen:
            for pair, place, number in zip(pairs, places, numbers, strict=True):
                torch.empty(SENTINEL, dtype=torch.int8)
                results = self._execute(*pair, seed)
                torch.empty(SENTINEL, dtype=torch.int8)
                for into, result in zip(place, results, strict=True):
                    assert (into is None) == (result is None)
                    if into is not None and result is not None:
                        into.copy_(result)
                number.uniform_()
                del results, result
        places = [[*place, number] for place, number in zip(places, numbers, strict=True)]
        return places, _peaks_between_sentinels(seen.timeline)

    def _execute(self, forward: Any, backward: Any, seed: int) -> list[torch.Tensor | None]:
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs = list(forward(list(self.inputs)))
            saved, outputs = outputs[self.num_fwd_outputs :], outputs[: self.num_fwd_outputs]
            tangent = torch.ones_like(outputs[0])  # held to the end, as loss.backward() does
            saved.append(tangent)
            return [*outputs, *backward(saved)]


def _copied(joint: fx.GraphModule) -> fx.GraphModule:
    """A joint graph of its own for each split, which writes to its nodes; fake values are shared."""
    graph = fx.Graph()
    old = next(n for n in joint.graph.nodes if n.op == "output")
    results = graph.graph_copy(joint.graph, {})
    graph.output(results).meta = dict(old.meta)
    return fx.GraphModule(joint, graph)


class _Stop(Exception):
    """Tracing has given what was wanted."""


def _never(*_: Any) -> Any:
    raise AssertionError("compiled a graph of a step that has no backward")


def _peaks_between_sentinels(timeline: memplan.Timeline) -> list[int]:
    """The peak above base in each stretch that a pair of sentinels encloses."""
    marks = sorted((b.start, b.end) for b in timeline.blocks if b.bytes == SENTINEL)
    assert marks and len(marks) % 2 == 0
    return [max(timeline.totals[marks[i][1] : marks[i + 1][0]]) - timeline.base_bytes for i in range(0, len(marks), 2)]
