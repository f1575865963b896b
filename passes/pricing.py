"""What ops cost when a compiler fuses them: a Step priced by a named cost model. Torch-free.

In: a Step, the name of a cost model. Out: the same Step, whose ops say what memory traffic they are priced at.

    roofline-v1   each op reads its inputs from memory, and writes its outputs there
    fused         a chain of pointwise ops pays once: what is not written costs nothing, and what reads it reads what
                  it was made from. Written are what an extern op or a caller needs, what fusion.py says reads too
                  much, and the boundaries between blocks, or a chain of layers would be one kernel.

What must hold: prices follow from the step alone, never from decisions, so that policies, bound and simulator add up
the same seconds for each run of an op. A storage that crosses costs no write of its own: the kernel that would make it
again reads about as much. Bytes are nobody's business here: a plan has the same peak under both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from memplan.errors import MemplanError
from memplan.ir import CostModel, Graph, Op, Run, Step, Tensor
from memplan.passes.blocks import frontiers
from memplan.passes.fusion import Access, inputs_and_outputs

_ITEM = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}  # bytes; else 1


def priced(step: Step, cost: CostModel) -> Step:
    """The step with its ops priced. Raises MemplanError for "fused" where no op says whether it fuses."""
    if cost == "fused" and not step.fused and all(op.fusion == "extern" for op in step.ops):
        raise MemplanError(
            f"cost 'fused' has nothing to go by: no op of step {step.name!r} says that it can be fused, as in steps "
            "traced for inner='eager'; trace it for inner='inductor', or use cost='roofline-v1'"
        )
    graphs = _fused(step) if cost == "fused" else (_with_prices(g, [None] * len(g.ops)) for g in step.graphs)
    return replace(step, graphs=tuple(graphs), cost=cost)


def _fused(step: Step) -> Iterator[Graph]:
    compiled = replace(step, fused=True)
    written = frozenset().union(step.between, step.forward.outputs, step.backward.outputs, *frontiers(step))
    for graph, span in zip(step.graphs, step.spans, strict=True):
        accesses = inputs_and_outputs(compiled, [Run(i) for i in span], written)
        yield _with_prices(graph, [_price(step, op, access) for op, access in zip(graph.ops, accesses, strict=True)])


def _with_prices(graph: Graph, prices: Iterable[int | None]) -> Graph:
    return replace(graph, ops=tuple(replace(op, priced=p) for op, p in zip(graph.ops, prices, strict=True)))


def _price(step: Step, op: Op, access: Access) -> int | None:
    """Bytes that the op's kernel reads and writes for it; None: what it does alone."""
    if op.fusion == "extern" or (access.reads == op.inputs and access.writes == op.outputs):
        return None
    if not access.writes:
        return 0
    looked_at = op.outputs if op.fusion == "pointwise" else op.inputs
    elements = max((_elements(step.tensors[t]) for t in looked_at), default=math.inf)
    reads = (min(step.tensors[t].bytes, elements * _ITEM.get(step.tensors[t].dtype, 1)) for t in access.reads)
    return int(sum(reads) + sum(step.tensors[t].bytes for t in access.writes))


def _elements(tensor: Tensor) -> float:
    """How many it shows; infinite if that was not recorded."""
    return math.prod(tensor.shape) if tensor.shape else math.inf
