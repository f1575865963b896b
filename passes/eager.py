"""Compile with the eager inner compiler: exact kernels, in the plan's own order.

In: a Dynamo graph and a Partitioner. Out: AOTAutograd's callable, whose peak is the plan's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._dynamo.backends.common import aot_autograd

from memplan.ir import Plan
from memplan.passes.calls import copied
from memplan.passes.compat import random_draws_stay
from memplan.passes.dispatch import Compiled
from memplan.passes.partition import Partitioner, Resized
from memplan.passes.phases import has_backward
from memplan.passes.recompute import MOMENT
from memplan.runtime.executor import compile_eager
from memplan.runtime.failing import Failed, watched


def compile_planned(graph: fx.GraphModule, example_inputs: Sequence[Any], partitioner: Partitioner) -> Compiled:
    """The callable and its plan. Raises DoesNotFit when no plan is inside the budget."""
    planned: list[tuple[Plan, Resized]] = []
    target = dataclasses.replace(partitioner, on_plan=lambda *made: planned.append(made))

    def half(graph: fx.GraphModule, inputs: Any, phase: str = "") -> Callable[[list[Any]], Any]:
        return watched(compile_eager(graph, inputs), phase, _moments(graph, target.failed))

    def whole(graph: fx.GraphModule, inputs: Any) -> Callable[[list[Any]], Any]:
        if has_backward(graph):
            target.whole(graph)
        return half(graph, inputs)

    compiler = aot_autograd(
        fw_compiler=functools.partial(half, phase="forward"),
        bw_compiler=functools.partial(half, phase="backward"),
        inference_compiler=whole,
        partition_fn=target,
    )
    with random_draws_stay():  # Inductor has random numbers of its own, and leaves out those that nothing reads
        run = compiler(copied(graph), example_inputs)
    return Compiled(run, *planned[-1]) if planned else Compiled(run)


def _moments(graph: fx.GraphModule, failed: Failed) -> Failed:
    """`failed`, told the moment of the plan as well."""
    moments = {node.name: node.meta[MOMENT] for node in graph.graph.nodes if MOMENT in node.meta}
    return lambda error, place: failed(error, dataclasses.replace(place, moment=moments.get(place.name)))
