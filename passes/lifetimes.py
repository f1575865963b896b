"""An order of execution -> the half-open lifetime of every storage in it.

In: a Step, its forward and backward Runs, the storages that cross. Out: one Life per storage and execution.
A moment is the index of a run, forward first. What must hold: a storage is alive from the run that makes it
to the run that reads it last, both included; graph outputs live to the end; a recomputed storage has two lives.
This is liveness of the executors: names are dropped after their last use, and nothing else holds a storage.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from memplan.ir import Run, Step
from memplan.passes.fusion import Access, inplace, inputs_and_outputs


class Life(NamedTuple):
    """`storage` lives over moments [start, end); `storage` -1: memory inside an op or of the generator."""

    storage: int
    start: int
    end: int
    bytes: int
    again: bool


def lifetimes(step: Step, forward: Sequence[Run], backward: Sequence[Run], saved: Collection[int]) -> list[Life]:
    """Every life, in order of start within each graph."""
    split, count = len(forward), len(forward) + len(backward)
    crossing, first, final = set(saved), set(step.forward.outputs), set(step.backward.outputs)
    ahead = _accesses(step, forward, keep=crossing | first)
    behind = _accesses(step, backward, keep=final)
    last_ahead, last_behind = _last_reads(ahead), _last_reads(behind)

    lives: list[Life] = []
    for moment, access in enumerate(ahead):
        for t in access[1]:
            end = last_ahead.get(t, moment) + 1
            if t in crossing and t in last_behind:
                end = split + last_behind[t] + 1
            if t in first or (t in crossing and t in final):
                end = count
            lives.append(Life(t, moment, end, step.tensors[t].bytes, False))
    for moment, access in enumerate(behind):
        again = backward[moment].again
        for t in access[1]:
            end = split + last_behind.get(t, moment) + 1
            if t in crossing:  # an op with several results ran again for another: the saved one is read
                end = split + moment + 1
            elif t in final:
                end = count
            lives.append(Life(t, split + moment, end, step.tensors[t].bytes, again))
    lives.extend(Life(t, split, count, step.tensors[t].bytes, False) for t in step.backward.inputs)
    if step.fused:
        lives = inplace(step, lives, [Access(*a) for a in (*ahead, *behind)], split)
    return lives + _inside_ops(step, forward, backward)


def _accesses(step: Step, runs: Sequence[Run], keep: Collection[int]) -> Sequence[tuple[tuple[int, ...], ...]]:
    """(reads, writes) of each run; storages in `keep` are always written."""
    if step.fused:
        return inputs_and_outputs(step, runs, keep)
    return [(op.inputs, op.outputs) for op in (step.ops[run.op] for run in runs)]


def _last_reads(accesses: Sequence[tuple[tuple[int, ...], ...]]) -> dict[int, int]:
    return {t: moment for moment, access in enumerate(accesses) for t in access[0]}


def _inside_ops(step: Step, forward: Sequence[Run], backward: Sequence[Run]) -> list[Life]:
    """Workspaces, and the generator states that a replayed random op carries from forward to its second run."""
    lives, ran = [], {run.op: moment for moment, run in enumerate(forward)}
    for moment, run in enumerate([*forward, *backward]):
        op = step.ops[run.op]
        if op.workspace_bytes:
            lives.append(Life(-1, moment, moment + 1, op.workspace_bytes, run.again))
        if op.rng_bytes and run.again:
            lives.append(Life(-1, ran[run.op], moment + 1, op.rng_bytes, True))
            lives.append(Life(-1, moment, moment + 1, op.rng_bytes, True))  # the state put back afterwards
    return lives
