"""An order of execution -> a Timeline: bytes exactly, from op order alone; time as an estimate.

In: a Step, the Runs of its graphs and the storages that cross. Out: who is alive when. Bytes depend on no clock, so
they are the same on every machine; seconds are the roofline's. `peak` is the same arithmetic without the names, for
policies that ask often.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

from memplan.ir import Block, Held, Kind, Machine, Moment, Run, Step, Timeline
from memplan.passes.lifetimes import Life, lifetimes
from memplan.passes.schedule import schedule


def simulate(step: Step, runs: Sequence[Sequence[Run]], saved: Collection[int], machine: Machine) -> Timeline:
    """The predicted timeline of one step."""
    moments, clock = [], 0.0
    for graph, own in zip(step.graphs, runs, strict=True):
        for run in own:
            op = step.ops[run.op]
            clock += machine.seconds(op)
            moments.append(Moment(op.name, clock, graph.phase))
    order = [run for own in runs for run in own]
    gradients = set(step.backward.outputs)
    blocks = tuple(
        _block(step, life, order, crossing=_crosses(moments, life), gradients=gradients)
        for life in lifetimes(step, runs, saved)
    )
    made = Timeline(step.name, "predicted", tuple(moments), blocks, base(step), step.notes)
    return followed(made, step.held)


def followed(timeline: Timeline, held: Held) -> Timeline:
    """The timeline with what runs after the step: beside its results, which are held until then. Gradients that were
    added to others are not.
    """
    added = any(kind == "gradient" for kind, _ in held.kinds)
    for gap in held.gaps:
        end = len(timeline.moments)
        blocks = [
            replace(b, end=b.end + (b.end == end and not (added and b.kind == "gradient"))) for b in timeline.blocks
        ]
        blocks.append(Block(gap.name, gap.bytes, "temporary", end, end + 1))
        moments = (*timeline.moments, Moment(gap.name, timeline.seconds, "optimizer"))
        timeline = replace(timeline, moments=moments, blocks=tuple(blocks))
    return timeline


def _crosses(moments: Sequence[Moment], life: Life) -> bool:
    return moments[life.start].phase == "forward" and moments[life.end - 1].phase == "backward"


def peak(step: Step, saved: Collection[int]) -> int:
    """The peak in bytes, base included, when the storages `saved` cross."""
    runs = schedule(step, saved)
    change = [0] * (sum(map(len, runs)) + 1)
    for life in lifetimes(step, runs, saved):
        change[life.start] += life.bytes
        change[life.end] -= life.bytes
    return step.base_bytes + max(itertools.accumulate(change[:-1]), default=0)


def seconds(step: Step, runs: Collection[Run], machine: Machine) -> float:
    """Estimated time of the runs."""
    return sum(machine.seconds(step.ops[run.op]) for run in runs)


def _block(step: Step, life: Life, runs: Sequence[Run], *, crossing: bool, gradients: set[int]) -> Block:
    if life.storage < 0:
        op = step.ops[runs[life.start].op]
        name = "generator state" if op.rng_bytes and not op.workspace_bytes else f"{op.name} workspace"
        return Block(name, life.bytes, "temporary", life.start, life.end, source=op.source, layer=op.layer)
    tensor = step.tensors[life.storage]
    kind: Kind = "temporary"
    if life.storage in gradients and not life.again:
        kind = "gradient"
    elif crossing or life.again:
        kind = "activation"
    decision = "recompute" if life.again else "keep" if crossing else ""
    return Block(
        tensor.name, life.bytes, kind, life.start, life.end, decision,
        tensor.shape, tensor.dtype, tensor.source, tensor.layer,
    )  # fmt: skip


def base(step: Step) -> tuple[tuple[Kind, int], ...]:
    """Bytes that no decision changes, by kind."""
    total: dict[Kind, int] = {}
    for kind, size in [*((step.tensors[t].kind, step.tensors[t].bytes) for t in step.resident), *step.held.kinds]:
        total[kind] = total.get(kind, 0) + size
    return tuple(total.items())
