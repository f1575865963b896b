"""Joint graphs as a partitioner sees them, and real inputs for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from memplan.passes import capture


class Stop(Exception):
    """The graph is there."""


def joint_of(step: Callable[..., Any], batch: Any, inner: str) -> tuple[fx.GraphModule, list[Any]]:
    """The prepared joint graph of a step, as the inner compiler would have it planned, and inputs for it."""
    found: list[fx.GraphModule] = []
    real: list[Any] = []

    def partition(joint: fx.GraphModule, _inputs: Any, **_: Any) -> Any:
        capture.prepare(joint)
        found.append(joint)
        raise Stop

    def never(*_: Any) -> Any:
        raise AssertionError("nothing is to be compiled")

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        real[:] = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in inputs]
        table = select_decomp_table() if inner == "inductor" else {}
        make = aot_autograd(fw_compiler=never, bw_compiler=never, partition_fn=partition, decompositions=table)
        return make(graph, inputs)

    with contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed, Stop):
        torch.compile(step, backend=backend, fullgraph=True)(batch)
    return found[-1], [*real, torch.full((), 1.5, dtype=torch.float64)]  # the loss's own gradient
