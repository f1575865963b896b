"""torch.compile(step, backend="memplan", options={...}): the entry point torch looks up.

In: a graph from Dynamo with example inputs, and the user's options. Out: a callable that runs the step inside
the budget. Graphs without a backward are compiled by the inner compiler as they are.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._logging._internal import trace_structured

from memplan.errors import MemplanError
from memplan.here import this_machine
from memplan.ir import Plan
from memplan.options import Options, read_budget
from memplan.passes.compat import broken_at, compile_call, nested, resumed_at
from memplan.passes.dispatch import Compiler, adaptive
from memplan.passes.partition import Partitioner, tensor_names
from memplan.passes.policies.remembered import remembered
from memplan.passes.whole_step import WholeStep
from memplan.planned_oom import explain
from memplan.runtime.held import Watch
from memplan.runtime.optimizers import Around
from memplan.serialize import to_json

AROUND = 1024  # bytes kept for what runs around generated code: seeds of gradients, kernels' own odd bytes

log = logging.getLogger("torch.memplan")  # below torch's own, whose handler writes torch's format
log.setLevel(logging.getLogger("memplan").level)  # TORCH_LOGS="+memplan" sets that of the package's name


def memplan_backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    *,
    adopted: Callable[[Plan], None] = lambda plan: None,
    **more: Any,
) -> Callable[..., Any]:
    """Compile one graph under memplan. Raises MemplanError, which torch wraps in BackendCompilerFailed. `adopted` is
    given each plan that will run, before it does.
    """
    if more:
        raise MemplanError(f"torch.compile was given {sorted(more)}; memplan takes options={{...}} only")
    read = Options.read(options, os.environ)
    device = "cuda" if any(isinstance(t, torch.Tensor) and t.is_cuda for t in example_inputs) else "cpu"
    target = read.machine or this_machine(device)
    budget = read_budget(read.budget, target, host=read.host_budget)
    if read.inner == "inductor":
        budget = replace(budget, fixed_bytes=budget.fixed_bytes + AROUND)
    partitioner = Partitioner(
        policy=remembered(read.policy),
        budget=budget,
        machine=target,
        inner=read.inner,
        on_plan=lambda *_: None,
        names=tensor_names(graph),
        notes=tuple(_limits(graph)),
        tiles=read.tiles,
        cost=read.cost_model,
    )

    def report(plan: Plan) -> None:
        _report(plan, read)
        adopted(plan)

    log.debug("a graph of %d nodes, planned with %s", len(graph.graph.nodes), read)
    step = whole_step(compile_call(), read.optimizer)
    if step is not None:
        step.several = step.several or bool(broken_at(graph)) or nested() or _goes_on(graph)
    return adaptive(
        graph,
        example_inputs,
        partitioner,
        _compiler(read),
        report,
        functools.partial(explain, out=read.file),
        dict(read.limits),
        step,
        read.optimizer,
    )


def whole_step(owner: Any, optimizer: Any = None) -> WholeStep | None:
    """What the graphs of one torch.compile call share, kept with what stands for that call."""
    if owner is None:
        return None
    if not hasattr(owner, "memplan_step"):
        owner.memplan_step = WholeStep(watch=Watch(optimizer, Around()))
    step: WholeStep = owner.memplan_step
    return step


def _compiler(options: Options) -> Compiler:
    if options.inner == "eager":
        from memplan.passes.eager import compile_planned

        return compile_planned
    from memplan.passes.inductor import compile_inductor

    return functools.partial(compile_inductor, config=dict(options.inductor))


def _limits(graph: fx.GraphModule) -> list[str]:
    """What the plan of this graph cannot promise."""
    if place := broken_at(graph) or resumed_at():
        return [
            f"a graph break at {place} split the step: each graph runs its smallest plan once, and they are planned "
            "together at the second call, with what runs between them"
        ]
    return []


def _goes_on(graph: fx.GraphModule) -> bool:
    """Whether it returns more than a loss: then something runs after it, outside of graphs, before its backward."""
    results = [n.meta.get("example_value") for n in graph.graph.output_node().all_input_nodes]
    return any(isinstance(r, torch.Tensor) and r.requires_grad and r.dim() > 0 for r in results)


def _report(plan: Plan, options: Options) -> None:
    """Say which plan is adopted: in the log, in torch's structured trace (TORCH_TRACE, tlparse), in option `out`."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "memplan_plan", "encoding": "json"},
        payload_fn=lambda: to_json(plan),
        expect_trace_id=False,  # a plan for other sizes is made outside of Dynamo
    )
    log.info("%s", plan)
    for note in plan.notes:
        log.info("%s", note)
    for note in plan.step.notes:  # what the plan cannot promise, but for what was tiled
        log.log(logging.INFO if note.startswith("tiled") else logging.WARNING, "%s", note)
    if options.file is not None:
        plan.with_others().save(options.file)
    elif callable(options.out):
        options.out(plan)
