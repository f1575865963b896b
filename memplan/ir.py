"""The data that memplan's stages hand to each other: frozen, torch-free, saved as JSON by serialize.py.

    Step      what runs: graphs of Ops over Tensors (storages), in order of execution
    Decision  Keep | Recompute | Offload, for the gap between a storage's last forward and first backward use
    Plan      a Step, a Decision per storage, and the exact order of execution that follows
    Timeline  what is alive when, predicted or measured: the same type, so comparing them is one function

What must hold: a Tensor is a storage, never a view, so bytes are counted once; lifetimes are half-open
intervals of moments; everything downstream follows from op order alone, never from clocks.
Sizes are bytes, times are seconds, throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from memplan.errors import MemplanError

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


@dataclass(frozen=True)
class Keep:
    """The storage stays on the device until its last use in backward."""


@dataclass(frozen=True)
class Recompute:
    """The storage is freed after its last use in forward and computed again just before backward needs it."""


Tier = Literal["host", "disk"]


@dataclass(frozen=True)
class Offload:
    """The storage is copied to a tier below the device and freed there; backward copies it back before it needs it.

    Each point is an op, an index into Step.ops; None: placed by passes/copies.py, from the machine's bandwidth.
    `start_after`: the op of the forward graph after which the copy starts. `release_at`: the op of the forward graph
    after which the device waits for the copy, and the memory is freed. `reload_at`: the op of the backward graph
    before which memory is allocated again and the copy back starts; the first op that reads it waits for that copy.
    So bytes follow from the order of ops alone: a copy that is late costs time, never memory.
    """

    tier: Tier = "host"
    start_after: int | None = None
    release_at: int | None = None
    reload_at: int | None = None


Decision = Keep | Recompute | Offload
Decisions = Mapping[int, Decision]  # storage -> decision; a storage left out is kept if backward reads it


@dataclass(frozen=True)
class Run:
    """One execution of an op: `op` indexes Step.ops; `again` marks a recomputation."""

    op: int
    again: bool = False


@dataclass(frozen=True)
class Machine:
    """What a device can do. `flops`: dtype -> FLOP/s of products; a dtype that is absent is not supported.

    `attention`: dtype -> FLOP/s of attention, where it is known to differ.
    """

    name: str
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    bandwidth: float  # bytes/s of device memory
    flops: tuple[tuple[str, float], ...]
    host_bandwidth: float = 0.0  # bytes/s between host and device, one direction
    disk_bandwidth: float = 1e9  # bytes/s between device and disk, one direction
    contention: float = 1.0  # of the bytes of a copy, how many compete with ops for device memory; 0: copies cost none
    unified: bool = False  # host and device share one memory
    context_bytes: int = 0  # what the driver takes before the first tensor
    workspace_rules: tuple[tuple[str, float], ...] = ()  # op -> hidden workspace, in multiples of its first output
    attention: tuple[tuple[str, float], ...] = ()

    @functools.cached_property
    def rates(self) -> Mapping[str, float]:
        """`flops` as a mapping."""
        return dict(self.flops)

    @functools.cached_property
    def attention_rates(self) -> Mapping[str, float]:
        """`attention` as a mapping."""
        return dict(self.attention)

    def seconds(self, op: Op) -> float:
        """Roofline (Williams, Waterman, Patterson 2009): the longer of arithmetic and memory traffic."""
        if op.fetches:
            return self.copy_seconds(op.traffic // 2, "host")
        rate = self.rates.get(op.dtype) or self.rates["float32"]
        if self.attention and "attention" in op.target:
            rate = self.attention_rates.get(op.dtype, rate)
        return max(op.flops / rate, (op.traffic if op.priced is None else op.priced) / self.bandwidth)

    def copy_seconds(self, size: int, tier: Tier) -> float:
        """Time of a copy of `size` bytes between the device and a tier."""
        return size / (self.disk_bandwidth if tier == "disk" else self.host_bandwidth or self.bandwidth)


@dataclass(frozen=True)
class Budget:
    """The largest peak allowed on the device. `available` is what is left for the step's own bytes.

    `host_bytes`: the most that may be in the host's memory at a time; 0: nothing is offloaded there.
    `others`: what else is there while the step runs, by name, as of a ledger's leases.
    `listener`: who hears, as the step runs, what it leaves of this (runtime/room.py); 0: nobody.
    """

    bytes: int
    fixed_bytes: int = 0  # context and libraries, measured
    reserve: float = 0.0  # the fraction held back against fragmentation
    note: str = ""  # how it was read: "clamped to the device's 24.0 GB"
    host_bytes: int = 0
    others: tuple[tuple[str, int], ...] = ()
    listener: int = dataclasses.field(default=0, compare=False, repr=False)

    @property
    def reserve_bytes(self) -> int:
        return int(self.reserve * self.bytes)

    @property
    def available(self) -> int:
        return self.bytes - self.reserve_bytes - sum(size for _, size in self.beside)

    @property
    def beside(self) -> tuple[tuple[str, int], ...]:
        """What is there throughout and not the step's, by name, but for what is held back."""
        return (("context", self.fixed_bytes), *self.others) if self.fixed_bytes else self.others

    def leaving(self, available: int) -> Budget:
        """One that leaves so many bytes for the step, and the same beside the device."""
        return Budget(available, host_bytes=self.host_bytes, listener=self.listener)

    def needed_for(self, peak: int) -> int:
        """The smallest budget of this kind that leaves `peak` bytes for the step."""
        there = sum(size for _, size in self.beside)
        size = int((peak + there) / (1 - self.reserve)) - 2  # the reserve is rounded down: look from below
        while dataclasses.replace(self, bytes=size).available < peak:
            size += 1
        return size


@dataclass(frozen=True)
class Moment:
    """One point of a timeline: an op (predicted) or an allocator event (measured)."""

    name: str
    seconds: float  # since the start; an estimate in a prediction
    phase: str = ""  # "forward" | "backward" | ...
    stall: float = 0.0  # seconds that the device waits for a copy before this moment's work


@dataclass(frozen=True)
class Block:
    """Bytes alive over the half-open interval of moments [start, end)."""

    name: str
    bytes: int
    kind: Kind
    start: int
    end: int
    decision: str = ""  # "keep" | "recompute" | "offload" | ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    source: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Timeline:
    """What is alive when. `base` are bytes alive throughout, by kind.

    `host`: what is off the device, over the same moments, with its tier for a decision; it is in no total.
    `others`: what is on the device and not the step's, over the same moments: of a plan the context and what is held
    back against fragmentation, of a recording what the device had in use beside torch's allocator. It is in no total
    either: `beside`.
    """

    title: str
    origin: Literal["predicted", "measured"]
    moments: tuple[Moment, ...]
    blocks: tuple[Block, ...]
    base: tuple[tuple[Kind, int], ...] = ()
    notes: tuple[str, ...] = ()
    host: tuple[Block, ...] = ()
    others: tuple[Block, ...] = ()

    @property
    def base_bytes(self) -> int:
        return sum(b for _, b in self.base)

    @functools.cached_property
    def totals(self) -> tuple[int, ...]:
        """Bytes alive at each moment, base included."""
        return tuple(self.base_bytes + n for n in _sums(self.blocks, len(self.moments)))

    @functools.cached_property
    def beside(self) -> tuple[int, ...]:
        """Bytes that others hold at each moment."""
        return tuple(_sums(self.others, len(self.moments)))

    def away(self, tier: Tier) -> int:
        """The most bytes that are in a tier below the device at a time."""
        return max(_sums((b for b in self.host if b.decision == tier), len(self.moments)), default=0)

    @property
    def host_peak(self) -> int:
        """The most bytes that are in the host's memory at a time."""
        return self.away("host")

    @property
    def stalled(self) -> float:
        """Seconds that the device waits for copies."""
        return sum(m.stall for m in self.moments)

    @property
    def peak(self) -> int:
        """The largest total in bytes, base included."""
        return max(self.totals, default=self.base_bytes)

    @property
    def peak_moment(self) -> int:
        """Index of the first moment at which the total is largest."""
        return self.totals.index(self.peak) if self.moments else 0

    @property
    def peak_above_base(self) -> int:
        return self.peak - self.base_bytes

    @property
    def seconds(self) -> float:
        return self.moments[-1].seconds if self.moments else 0.0

    def alive(self, moment: int | None = None) -> list[Block]:
        """The blocks alive at a moment (by default at the peak), largest first."""
        at = self.peak_moment if moment is None else moment
        return sorted((b for b in self.blocks if b.start <= at < b.end), key=lambda b: -b.bytes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it in the format of the suffix: .json is read back by Timeline.load, .html is a page for any browser,
        .png a picture, .pickle opens in torch's memory viewer, .perfetto-trace in Perfetto's.
        """
        from memplan import report

        report.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Timeline:
        from memplan import serialize

        return serialize.load(path, Timeline)


def _sums(blocks: Iterable[Block], count: int) -> list[int]:
    """The bytes of the blocks alive at each of `count` moments."""
    change = [0] * (count + 1)
    for block in blocks:
        change[block.start] += block.bytes
        change[block.end] -= block.bytes
    return list(itertools.accumulate(change[:-1]))


@dataclass(frozen=True)
class Bound:
    """What no plan of the class of passes/bound.py can beat, whatever decided it.

    `seconds`: the step takes at least so long inside the budget; infinite: nothing fits.
    `per_byte`: seconds that a byte more of budget takes off that, at the margin. `at`: the op where memory binds most;
    empty: nowhere. `needs`: bytes that are there then whatever is decided, beyond parameters and inputs.
    `per_bus`: seconds that a faster bus takes off, at the margin: a hundredth of it for each percent.
    """

    seconds: float
    per_byte: float = 0.0
    at: str = ""
    needs: int = 0
    per_bus: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Decisions for every storage that could cross from forward to backward, and what follows from them.

    `reasons`: storages decided alike, and what would follow from the other choice, where memplan.plan has looked:
    "recompute: +3.1 ms", "keep: over by 1.200 GB".
    `bound`: what no plan inside this budget can beat, where memplan.plan has looked.
    `marks`: the moments behind which the running step tells its budget's listener what it leaves.
    """

    step: Step
    decisions: tuple[tuple[int, Decision], ...]
    runs: tuple[tuple[Run, ...], ...]  # one list for each of the step's graphs
    timeline: Timeline
    budget: Budget
    machine: Machine
    policy: str
    base_seconds: float  # the step's estimated time with nothing recomputed
    inner: str = "eager"
    notes: tuple[str, ...] = ()
    reasons: tuple[tuple[tuple[int, ...], str], ...] = ()
    bound: Bound | None = None
    marks: tuple[int, ...] = ()

    @property
    def gap(self) -> float | None:
        """By how much of the step's time with nothing recomputed a better plan could be faster, at most; None: it is
        not known.
        """
        if self.bound is None or not self.base_seconds:
            return None
        return max(0.0, (self.timeline.seconds - self.bound.seconds) / self.base_seconds)

    @property
    def forward(self) -> tuple[Run, ...]:
        """The runs of all forward graphs."""
        return self._runs("forward")

    @property
    def backward(self) -> tuple[Run, ...]:
        """The runs of all backward graphs."""
        return self._runs("backward")

    def _runs(self, phase: Phase) -> tuple[Run, ...]:
        pairs = zip(self.step.graphs, self.runs, strict=True)
        return tuple(run for graph, runs in pairs if graph.phase == phase for run in runs)

    @property
    def peak(self) -> int:
        return self.timeline.peak

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget.available and self.timeline.host_peak <= self.budget.host_bytes

    @property
    def overhead(self) -> float:
        """Estimated extra time as a fraction of the step's time with nothing recomputed."""
        return self.timeline.seconds / self.base_seconds - 1 if self.base_seconds else 0.0

    @property
    def saved(self) -> frozenset[int]:
        """The storages that cross from forward to backward, on the device or off it."""
        return frozenset(t for t, d in self.decisions if isinstance(d, (Keep, Offload)))

    @property
    def offloads(self) -> dict[int, Offload]:
        """Those of them that leave the device."""
        return {t: d for t, d in self.decisions if isinstance(d, Offload)}

    @property
    def instead(self) -> dict[int, str]:
        """`reasons`, by storage."""
        return {t: reason for members, reason in self.reasons for t in members}

    def with_others(self) -> Plan:
        """The plan, its timeline with what the budget leaves to others."""
        held = (*self.budget.beside, ("fragmentation reserve", self.budget.reserve_bytes))
        end = len(self.timeline.moments)
        others = tuple(Block(name, size, "temporary", 0, end) for name, size in held if size)
        return dataclasses.replace(self, timeline=dataclasses.replace(self.timeline, others=others))

    def __str__(self) -> str:
        from memplan import report

        return report.table(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as .json (read back by Plan.load), or its timeline in another format (see Timeline.save)."""
        from memplan import report

        report.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        from memplan import serialize

        return serialize.load(path, Plan)
