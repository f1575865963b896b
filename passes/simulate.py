"""An order of execution -> a Timeline: bytes exactly, from op order alone; time as an estimate.

In: a Step, the Runs of its graphs, the storages that cross and the Offloads among them, placed. Out: who is alive when.
Bytes depend on no clock, so they are the same on every machine; seconds are the roofline's, and two copy engines' that
run beside it, one for each direction, each copy after the other: what waits for them stalls, and each takes its share
of the device's memory bandwidth. `peak` is the same arithmetic without the names, for policies that ask often.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from memplan.ir import Block, Held, Kind, Machine, Moment, Offload, Run, Step, Tensor, Timeline
from memplan.passes import copies
from memplan.passes.lifetimes import Life, lifetimes
from memplan.passes.schedule import schedule
from memplan.passes.totals import totals

NONE: Mapping[int, Offload] = {}


def simulate(
    step: Step,
    runs: Sequence[Sequence[Run]],
    saved: Collection[int],
    machine: Machine,
    offloads: Mapping[int, Offload] = NONE,
) -> Timeline:
    """The predicted timeline of one step."""
    moved = copies.moments(step, runs, offloads)
    moments = _moments(step, runs, moved, offloads, machine)
    order = [run for own in runs for run in own]
    gradients = set(step.backward.outputs)
    blocks = []
    for life in lifetimes(step, runs, saved, moved):
        decision = "offload" if life.storage in offloads and not life.again else ""
        crossing = bool(decision) or _crosses(moments, life)
        blocks.append(_block(step, life, order, crossing=crossing, gradients=gradients, decision=decision))
    host = tuple(_host_block(step.tensors[c.storage], c, offloads[c.storage]) for c in moved)
    host += tuple(_streamed(step.tensors[t], len(moments)) for t in sorted(step.below))
    made = Timeline(step.name, "predicted", tuple(moments), tuple(blocks), base(step), step.notes, host)
    return followed(made, step.held)


def copying(step: Step, runs: Sequence[Sequence[Run]], offloads: Mapping[int, Offload], machine: Machine) -> float:
    """Estimated time that copies add to the runs: what waits for them, and their share of the device's memory."""
    moved = copies.moments(step, runs, offloads)
    waits = sum(m.stall for m in _moments(step, runs, moved, offloads, machine))
    return waits + 2 * machine.contention * sum(step.tensors[c.storage].bytes for c in moved) / machine.bandwidth


def _moments(
    step: Step,
    runs: Sequence[Sequence[Run]],
    moved: Sequence[copies.Copy],
    offloads: Mapping[int, Offload],
    machine: Machine,
) -> list[Moment]:
    """The runs, with the time at which each ends and the time that it had to wait for copies."""
    events: dict[int, list[tuple[str, copies.Copy]]] = {}
    for c in moved:
        for at, what in ((c.start, "start"), (c.release, "release"), (c.reload, "reload"), (c.first_use, "use")):
            events.setdefault(at, []).append((what, c))
    out, clock, free = list[Moment](), 0.0, {"start": 0.0, "reload": 0.0}
    done = dict[tuple[int, str], float]()  # (storage, "start" or "reload") -> when that copy is done
    late, seconds = 0.0, step.seconds(machine)  # what is waited for before the next run

    def copy(c: copies.Copy, what: str, now: float) -> None:
        nonlocal clock
        size = step.tensors[c.storage].bytes
        free[what] = max(free[what], now) + machine.copy_seconds(size, offloads[c.storage].tier)
        done[c.storage, what] = free[what]
        clock += machine.contention * size / machine.bandwidth

    for graph, own in zip(step.graphs, runs, strict=True):
        begun = clock  # when the next fetch of this graph may start
        for run in own:
            op = step.ops[run.op]
            if len(out) not in events and not op.fetches:  # most runs copy nothing
                clock += late + seconds[run.op]
                out.append(Moment(op.name, clock, graph.phase, late))
                late = 0.0
                continue
            here = sorted(events.get(len(out), ()), key=lambda e: e[1].first_use)
            for what, c in here:
                if what == "reload":
                    copy(c, "reload", clock + late)
            ready = max((done[c.storage, "reload"] for what, c in here if what == "use"), default=0.0)
            late = max(late, ready - clock)
            if op.fetches:
                free["reload"] = max(free["reload"], begun) + seconds[run.op]
                late = max(late, free["reload"] - clock)
            clock += late + (0.0 if op.fetches else seconds[run.op])
            begun = clock if op.fetches else begun
            out.append(Moment(op.name, clock, graph.phase, late))
            for what, c in here:
                if what == "start":
                    copy(c, "start", clock)
            late = max((done[c.storage, "start"] - clock for what, c in here if what == "release"), default=0.0)
            late = max(late, 0.0)
    return out


def _streamed(tensor: Tensor, end: int) -> Block:
    """A parameter that is off the device throughout. It is not the step that holds it: no host budget counts it."""
    return Block(
        tensor.name, tensor.bytes, tensor.kind, 0, end, "", tensor.shape, tensor.dtype, tensor.source, tensor.layer
    )


def _host_block(tensor: Tensor, c: copies.Copy, decision: Offload) -> Block:
    """An offloaded storage off the device: from the start of its copy to the end of the copy back."""
    return Block(
        tensor.name, tensor.bytes, "activation", c.start, c.first_use + 1, decision.tier,
        tensor.shape, tensor.dtype, tensor.source, tensor.layer,
    )  # fmt: skip


def followed(timeline: Timeline, held: Held) -> Timeline:
    """The timeline with what runs after the step: beside its results, which are held until then. Gradients that were
    added to others are not; where some were, it does not matter which, but how much of them was not.
    """
    some = any(kind == "gradient" for kind, _ in held.kinds)
    for gap in held.gaps:
        end = len(timeline.moments)
        new = sum(b.bytes for b in timeline.blocks if b.end == end and b.kind == "gradient")
        stays = min(new, held.fresh) if some and held.fresh is not None else new
        blocks = [
            replace(b, end=b.end + (b.end == end and (b.kind != "gradient" or stays == new))) for b in timeline.blocks
        ]
        if 0 < stays < new:
            blocks.append(Block("new gradients", stays, "gradient", end, end + 1))
        blocks.append(Block(gap.name, gap.bytes, "temporary", end, end + 1))
        moments = (*timeline.moments, Moment(gap.name, timeline.seconds, "optimizer"))
        timeline = replace(timeline, moments=moments, blocks=tuple(blocks))
    return timeline


def _crosses(moments: Sequence[Moment], life: Life) -> bool:
    return moments[life.start].phase == "forward" and moments[life.end - 1].phase == "backward"


def peak(
    step: Step,
    saved: Collection[int],
    offloads: Mapping[int, Offload] = NONE,
    runs: Sequence[Sequence[Run]] | None = None,
) -> int:
    """The peak in bytes, base included, when the storages `saved` cross, `offloads` among them off the device; `runs`:
    their schedule, where it is known.
    """
    runs = schedule(step, saved) if runs is None else runs
    found = totals(step, runs, saved, copies.moments(step, runs, offloads) if offloads else ())
    return step.base_bytes + int(found.max(initial=0))


def seconds(step: Step, runs: Collection[Run], machine: Machine) -> float:
    """Estimated time of the runs."""
    return sum(machine.seconds(step.ops[run.op]) for run in runs)


def _block(
    step: Step, life: Life, runs: Sequence[Run], *, crossing: bool, gradients: set[int], decision: str = ""
) -> Block:
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
    decision = decision or ("recompute" if life.again else "keep" if crossing else "")
    return Block(
        tensor.name, life.bytes, kind, life.start, life.end, decision,
        tensor.shape, tensor.dtype, tensor.source, tensor.layer,
    )  # fmt: skip


def base(step: Step) -> tuple[tuple[Kind, int], ...]:
    """Bytes that no decision changes, by kind."""
    total: dict[Kind, int] = {}
    there = [step.tensors[t] for t in step.resident if t not in step.below]
    for kind, size in [*((tensor.kind, tensor.bytes) for tensor in there), *step.held.kinds]:
        total[kind] = total.get(kind, 0) + size
    return tuple(total.items())
