"""What runs: graphs of Ops over Tensors (storages), in order of execution.

Must hold: a Tensor is a storage, never a view, so bytes are counted once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from memplan.ir.machine import Machine

T = TypeVar("T")

# torch.profiler's words for what memory is used for.
Kind = Literal["parameter", "input", "activation", "temporary", "gradient", "optimizer_state"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


@dataclass(frozen=True)
class Polynomial:
    """A size in bytes as a polynomial in the size symbols: a sum of coefficient * product of symbol ** power."""

    terms: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]

    def at(self, sizes: Mapping[str, int]) -> int:
        """Its value; every symbol must be in `sizes`."""
        return sum(c * math.prod(sizes[s] ** p for s, p in powers) for c, powers in self.terms)


@dataclass(frozen=True)
class Tensor:
    """A storage. `name` is that of the node that allocates it; `shape` and `dtype` are of that node, for people."""

    name: str
    bytes: int
    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: str = ""
    formula: Polynomial | None = None  # None: `bytes` does not depend on the size symbols
    source: str = ""  # the user's line: "train.py:12 in loss"
    layer: str = ""  # the module path: "model.layers.3.mlp"
    dense: bool = True  # its elements, as its node shows them, fill it: it can be copied as they are


# How the memory traffic of ops is priced: each pays its own, or for its part of a fused kernel (passes/pricing.py).
CostModel = Literal["roofline-v1", "fused"]
COST_MODELS: tuple[CostModel, ...] = typing.get_args(CostModel)

# How a compiler that fuses treats an op: only an extern op needs its inputs and outputs in memory.
Fusion = Literal["pointwise", "reduction", "extern"]


@dataclass(frozen=True)
class Op:
    """One kernel call. `inputs` and `outputs` index Step.tensors; views are not ops."""

    name: str
    target: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]  # the storages it allocates
    flops: int = 0
    traffic: int = 0  # bytes read and written when it runs alone
    dtype: str = ""  # decides the machine's arithmetic rate
    fusion: Fusion = "extern"
    workspace_bytes: int = 0  # the peak inside the op beyond its inputs and outputs
    fixed: str = ""  # why it must not run twice; empty: it may be recomputed
    rng_bytes: int = 0  # size of the generator state saved when a random op is recomputed; 0: not random
    source: str = ""
    layer: str = ""
    body: Loop | None = None
    fetches: bool = False  # copies a parameter from the host; the copy starts when the one before it is done
    priced: int | None = None  # bytes that its kernel moves for it, by the step's cost model; None: `traffic`


@dataclass(frozen=True)
class Loop:
    """A region run in `count` equal slices: `body` for one slice, `accumulators` summed in place across them."""

    body: Graph
    count: int
    accumulators: tuple[int, ...] = ()


Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Graph:
    """Ops in program order, of one phase.

    `unit`: a forward graph and the backward graph that autograd pairs with it have the same number. A decision is about
    a storage between the two; what another unit reads is simply there.
    `inputs`: storages that the caller holds while the graph runs: resident ones, tangents, values across a break.
    `outputs`: storages that outlive the step.
    """

    name: str
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    phase: Phase = "forward"
    unit: int = 0


@dataclass(frozen=True)
class Gap:
    """Python outside of graphs: after a forward graph, and again when backward is back at that place; or after the
    step.

    `bytes`: its peak beside what is there when it starts. `kept`: what of it stays until it runs backward.
    `backward_bytes`, `backward_kept`: the same in backward; what stays then stays to the end of the step.
    """

    name: str
    bytes: int
    kept: int = 0
    backward_bytes: int = 0
    backward_kept: int = 0

    def exceeds(self, other: Gap) -> bool:
        """Whether it needs more at any place."""
        pairs = zip(dataclasses.astuple(self)[1:], dataclasses.astuple(other)[1:], strict=True)
        return any(mine > theirs for mine, theirs in pairs)

    def scaled(self, factor: float) -> Gap:
        """The same at other sizes."""
        sizes = (self.bytes, self.kept, self.backward_bytes, self.backward_kept)
        return Gap(self.name, *(math.ceil(size * factor) for size in sizes))


@dataclass(frozen=True)
class Held:
    """What is there beside a step's own tensors: bytes by kind throughout (existing .grad, optimizer states), and what
    runs after the step. `notes`: what of it is not known. `fresh`: the most bytes of the step's gradients that stay
    after it, as there are none by now that they are added to; None: all.
    """

    kinds: tuple[tuple[Kind, int], ...] = ()
    gaps: tuple[Gap, ...] = ()
    notes: tuple[str, ...] = ()
    fresh: int | None = None

    @property
    def extent(self) -> tuple[int, int, int]:
        """Bytes throughout, the most that runs beside them after the step, and with the gradients that are new by then:
        a peak grows with each.
        """
        there = sum(size for _, size in self.kinds)
        after = 2**63 if self.fresh is None else there + self.fresh
        return there, max((gap.bytes for gap in self.gaps), default=0), after


@dataclass(frozen=True)
class Ports:
    """Where a compiled function's own arguments and results are in its Step: a storage for each, -1 for none."""

    arguments: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()  # of each argument
    results: tuple[int, ...] = ()
    tangents: tuple[int, ...] = ()  # of each result


@dataclass(frozen=True)
class Step:
    """A train step: graphs in order of execution, over one list of storages.

    One compiled graph is a pair, forward and backward. A graph break makes forward 1, forward 2, backward 2, backward
    1; micro-batches with their backward inside make forward 1, backward 1, forward 2, backward 2, and what follows.
    `resident`: storages alive throughout (parameters, buffers, the batch).
    `held`: state that no op touches, and the optimizer's step after it.
    `gaps`: what runs between graphs: it is among their ops too.
    `saved_by`: what torch's own partitioner would save, by policy name, so that policies need no torch.
    `notes`: what was found but not handled, each with its source line; shown with every plan.
    """

    name: str
    tensors: tuple[Tensor, ...]
    graphs: tuple[Graph, ...]
    resident: tuple[int, ...]
    held: Held = Held()
    gaps: tuple[Gap, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()  # the size symbols and the values that Tensor.bytes are for
    saved_by: tuple[tuple[str, tuple[int, ...]], ...] = ()
    fused: bool = False  # the inner compiler fuses pointwise chains and reuses dying buffers (Inductor)
    notes: tuple[str, ...] = ()
    ports: Ports = Ports()
    cost: CostModel = "roofline-v1"  # what durations of ops are by

    def once(self, make: Callable[..., T], *given: Any) -> T:
        """make(self, *given), computed at the first call alone: what follows from a step and is asked for often."""
        key = (make, *given)
        if key not in self._made:
            self._made[key] = make(self, *given)
        found: T = self._made[key]
        return found

    def seconds(self, machine: Machine) -> tuple[float, ...]:
        """What each of its ops takes on the machine."""
        return self.once(_seconds, machine)

    @functools.cached_property
    def _made(self) -> dict[tuple[Any, ...], Any]:
        return {}

    @functools.cached_property
    def forward(self) -> Graph:
        """All forward graphs as one."""
        return _joined([g for g in self.graphs if g.phase == "forward"])

    @functools.cached_property
    def backward(self) -> Graph:
        """All backward graphs as one, in order of execution."""
        return _joined([g for g in self.graphs if g.phase == "backward"])

    @functools.cached_property
    def closed(self) -> bool:
        """Its backward is inside: it runs as one graph, and leaves nothing for a later one."""
        return any(g.phase == "backward" and not g.inputs for g in self.graphs)

    @functools.cached_property
    def ops(self) -> tuple[Op, ...]:
        """forward.ops + backward.ops: what Run.op indexes."""
        return self.forward.ops + self.backward.ops

    @functools.cached_property
    def spans(self) -> tuple[range, ...]:
        """For each graph, the indices of its ops in `ops`."""
        ends = {"forward": 0, "backward": len(self.forward.ops)}
        out = []
        for graph in self.graphs:
            out.append(range(ends[graph.phase], ends[graph.phase] + len(graph.ops)))
            ends[graph.phase] += len(graph.ops)
        return tuple(out)

    @functools.cached_property
    def producer(self) -> dict[int, tuple[int, Op]]:
        """storage -> (index in `ops`, op) that allocates it; resident storages and tangents are absent."""
        return {t: (i, op) for i, op in enumerate(self.ops) for t in op.outputs}

    @functools.cached_property
    def between(self) -> frozenset[int]:
        """Storages that graphs hand to each other with nothing to decide: all but those that a forward graph makes for
        the backward graph of its own unit alone.
        """
        if len(self.graphs) == 2:
            return frozenset()
        maker = {t: g for g in self.graphs for op in g.ops for t in op.outputs}
        read = ((t, g) for g in self.graphs for op in g.ops for t in op.inputs if t in maker)
        return frozenset(
            t for t, g in read if maker[t] is not g and (maker[t].phase == "backward" or maker[t].unit != g.unit)
        )

    @functools.cached_property
    def given(self) -> frozenset[int]:
        """Storages that an op may read whenever it runs: they are resident, or live until their last use."""
        return frozenset(self.resident) | (self.between - self.late)

    @functools.cached_property
    def late(self) -> frozenset[int]:
        """Storages that exist only in backward: they depend on a tangent. Of a backward graph without tangents, whose
        loss is in the same graph, all results count.
        """
        late = set(self.backward.inputs)
        for graph in self.graphs:
            if graph.phase == "backward":
                for op in graph.ops:
                    if not graph.inputs or not late.isdisjoint(op.inputs):
                        late.update(op.outputs)
        return frozenset(late)

    @functools.cached_property
    def saveable(self) -> frozenset[int]:
        """Storages that can cross from forward to backward by decision: made by an op, not `late`, not `given`."""
        return frozenset(t for op in self.ops for t in op.outputs) - self.late - self.given

    @functools.cached_property
    def read_in_backward(self) -> frozenset[int]:
        """Storages of a forward graph that backward reads or returns: what save-all keeps."""
        made = {t for op in self.forward.ops for t in op.outputs}
        read = {t for op in self.backward.ops for t in op.inputs} | set(self.backward.outputs)
        return frozenset(made & read & self.saveable)

    @functools.cached_property
    def offloadable(self) -> frozenset[int]:
        """Storages that can leave the device between forward and backward: those saveable, without gaps, that no caller
        holds.
        """
        held = {t for g in self.graphs if g.phase == "forward" for t in g.outputs}
        return frozenset(t for t in self.saveable - held if self.tensors[t].dense)

    @functools.cached_property
    def base_bytes(self) -> int:
        """Bytes that no decision changes: resident storages and state."""
        there = (t for t in self.resident if t not in self.below)
        return sum(self.tensors[t].bytes for t in there) + sum(b for _, b in self.held.kinds)

    @functools.cached_property
    def below(self) -> frozenset[int]:
        """Resident storages that are off the device: they are only ever fetched."""
        fetched = {t for op in self.ops if op.fetches for t in op.inputs}
        return frozenset(self.resident) & fetched - {t for op in self.ops if not op.fetches for t in op.inputs}

    def at(self, **sizes: int) -> Step:
        """The same step at other values of its size symbols. Costs and workspaces scale with nothing: bytes only."""
        unknown = set(sizes) - {s for s, _ in self.sizes}
        if unknown:
            raise MemplanError(f"size symbols {sorted(unknown)} are not in this step: it has {dict(self.sizes)}")
        values = dict(self.sizes) | sizes
        tensors = tuple(dataclasses.replace(t, bytes=t.formula.at(values)) if t.formula else t for t in self.tensors)
        return dataclasses.replace(self, tensors=tensors, sizes=tuple(values.items()))


def _seconds(step: Step, machine: Machine) -> tuple[float, ...]:
    return tuple(machine.seconds(op) for op in step.ops)


def _joined(graphs: Sequence[Graph]) -> Graph:
    if len(graphs) == 1:
        return graphs[0]

    def chain(parts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(itertools.chain.from_iterable(parts)))

    return Graph(
        ", ".join(g.name for g in graphs),
        tuple(op for g in graphs for op in g.ops),
        chain(g.inputs for g in graphs),
        chain(g.outputs for g in graphs),
        graphs[0].phase if graphs else "backward",
    )
