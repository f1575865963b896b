"""Compile with the eager inner compiler: exact kernels, in the plan's own order.

In: a Dynamo graph and a Partitioner. Out: AOTAutograd's callable, whose peak is the plan's.
"""

from __future__ import annotations

import dataclasses
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
from memplan.runtime.executor import compile_eager


def compile_planned(graph: fx.GraphModule, example_inputs: Sequence[Any], partitioner: Partitioner) -> Compiled:
    """The callable and its plan. Raises DoesNotFit when no plan is inside the budget."""
    planned: list[tuple[Plan, Resized]] = []
    target = dataclasses.replace(partitioner, on_plan=lambda *made: planned.append(made))

    def whole(graph: fx.GraphModule, inputs: Any) -> Callable[[list[Any]], Any]:
        if has_backward(graph):
            target.whole(graph)
        return compile_eager(graph, inputs)

    compiler = aot_autograd(
        fw_compiler=compile_eager, bw_compiler=compile_eager, inference_compiler=whole, partition_fn=target
    )
    with random_draws_stay():  # Inductor has random numbers of its own, and leaves out those that nothing reads
        run = compiler(copied(graph), example_inputs)
    return Compiled(run, *planned[-1]) if planned else Compiled(run)
