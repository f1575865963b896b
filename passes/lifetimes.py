"""An order of execution -> the half-open lifetime of every storage in it.

In: a Step, the Runs of each of its graphs, the storages that cross, the copies of those that are off the device in
between. Out: one Life per storage and execution.
A moment is the index of a run, counted through all graphs. What must hold: a storage is alive from the run that makes
it to the run that reads it last, both included; step outputs live to the end; a recomputed or offloaded storage has two
lives; a fetched parameter lives from where its copy starts; what a graph is given by its caller lives at least as long
as that graph runs.
This is liveness of the executors: names are dropped after their last use, and nothing else holds a storage.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from memplan.ir import Run, Step
from memplan.passes.copies import Copy
from memplan.passes.fusion import Access, inplace, inputs_and_outputs


class Life(NamedTuple):
    """`storage` lives over moments [start, end); `storage` -1: memory inside an op or of the generator."""

    storage: int
    start: int
    end: int
    bytes: int
    again: bool


def lifetimes(
    step: Step, runs: Sequence[Sequence[Run]], saved: Collection[int], copies: Sequence[Copy] = ()
) -> list[Life]:
    """Every life."""
    stays = step.given.union(saved)  # read from their first life, even if an op with several results makes them again
    count = sum(map(len, runs))
    lives: list[list[int]] = []  # storage, start, end, again
    first, current = dict[int, int](), dict[int, int]()  # storage -> index in lives

    def begin(t: int, start: int, end: int, again: bool) -> None:
        if t not in first or t not in stays:
            current[t] = len(lives)
        first.setdefault(t, len(lives))
        lives.append([t, start, end, again])

    def hold(life: int, end: int) -> None:
        lives[life][2] = max(lives[life][2], end)

    resident, accesses, moment = set(step.resident), list[Access](), 0
    for graph, own, part in zip(step.graphs, runs, _accesses(step, runs, stays), strict=True):
        fetch = moment  # where the next copy of a parameter starts
        given = [t for t in graph.inputs if t not in resident]
        for t in given:  # tangents: nobody in the step makes them
            if t not in current:
                begin(t, moment, moment, False)
        for run, access in zip(own, part, strict=True):
            for t in access.reads:
                if t in current:
                    hold(current[t], moment + 1)
            fetches = step.ops[run.op].fetches
            for t in access.writes:
                begin(t, min(fetch, moment) if fetches else moment, moment + 1, run.again)
            moment += 1
            fetch = moment if fetches else fetch
        for t in given:
            hold(current[t], moment)
        accesses += part
    for t in set(step.forward.outputs) & first.keys():
        hold(first[t], count)
    for t in set(step.backward.outputs) & first.keys():
        hold(current[t], count)
    out = [Life(t, start, end, step.tensors[t].bytes, bool(again)) for t, start, end, again in lives if start < end]
    if step.fused:
        out = inplace(step, out, accesses, [k for k, own in enumerate(runs) for _ in own])
    return _without_gaps(out, copies) + _inside_ops(step, runs)


def _without_gaps(lives: list[Life], copies: Sequence[Copy]) -> list[Life]:
    """The lives, but for the moments in which a storage is off the device."""
    away, out = {copy.storage: copy for copy in copies}, list[Life]()
    for life in lives:
        copy = None if life.again else away.get(life.storage)
        if copy is None:
            out.append(life)
        else:
            out += [life._replace(end=copy.release + 1), life._replace(start=copy.reload)]
    return out


def _accesses(step: Step, runs: Sequence[Sequence[Run]], stays: Collection[int]) -> list[list[Access]]:
    """What each run of each graph reads and writes."""
    if not step.fused:
        return [[Access(op.inputs, op.outputs) for op in (step.ops[run.op] for run in own)] for own in runs]
    forward, backward = {*stays, *step.forward.outputs}, step.between.union(step.backward.outputs)
    return [
        inputs_and_outputs(step, own, forward if graph.phase == "forward" else backward)
        for graph, own in zip(step.graphs, runs, strict=True)
    ]


def _inside_ops(step: Step, runs: Sequence[Sequence[Run]]) -> list[Life]:
    """Workspaces, and the generator states that a replayed random op carries from forward to its second run."""
    lives, ran = [], dict[int, int]()
    for moment, run in enumerate(run for own in runs for run in own):
        op = step.ops[run.op]
        if op.workspace_bytes:
            lives.append(Life(-1, moment, moment + 1, op.workspace_bytes, run.again))
        if op.rng_bytes and run.again:
            lives.append(Life(-1, ran[run.op], moment + 1, op.rng_bytes, True))
            lives.append(Life(-1, moment, moment + 1, op.rng_bytes, True))  # the state put back afterwards
        ran.setdefault(run.op, moment)
    return lives
