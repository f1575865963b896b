"""What a fusing compiler keeps in memory: an estimate, replaced by the generated code's own allocations.

In: runs of one graph. Out: what each run really reads and writes.
Inductor computes a pointwise result inside every kernel that reads it, unless an extern kernel or a graph
output needs it in memory or it reads too much (torch._inductor: realize_reads_threshold = 4 for a value with
several readers, realize_acc_reads_threshold = 8). A kernel writes over an input that dies in it when the sizes agree.
Where the step does not fuse, accesses are the ops' own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memplan.ir import Run, Step

if TYPE_CHECKING:
    from memplan.passes.lifetimes import Life

READS_IF_SHARED, READS = 4, 8


class Access(NamedTuple):
    """The storages that one run reads from and writes to memory."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]


def inputs_and_outputs(step: Step, runs: Sequence[Run], keep: Collection[int]) -> list[Access]:
    """One Access per run; storages in `keep` are always written."""
    ops = [step.ops[run.op] for run in runs]
    if not step.fused:
        return [Access(op.inputs, op.outputs) for op in ops]
    needed, readers = set(keep), dict[int, int]()
    for op in ops:
        for t in op.inputs:
            readers[t] = readers.get(t, 0) + 1
            if op.fusion == "extern":
                needed.add(t)
    inlined: dict[int, tuple[int, ...]] = {}
    out = []
    for op in ops:
        reads = tuple(dict.fromkeys(r for t in op.inputs for r in inlined.get(t, (t,))))
        writes = list(op.outputs)
        if op.fusion == "pointwise" and len(op.outputs) == 1 and op.outputs[0] not in needed:
            limit = READS_IF_SHARED if readers.get(op.outputs[0], 0) > 1 else READS
            if len(reads) <= limit:
                inlined[writes.pop()] = reads
        out.append(Access(reads if writes or op.fusion == "extern" else (), tuple(writes)))
    return out


def inplace(step: Step, lives: list[Life], accesses: Sequence[Access], graph: Sequence[int]) -> list[Life]:
    """Let a fused op's output take the place of an input of the same size that dies in it and that the same graph made.

    `graph`: for each moment, which graph runs.
    """
    fusible = {t for op in step.ops if op.fusion != "extern" for t in op.outputs}
    ending: dict[tuple[int, int], list[int]] = {}
    for i, life in enumerate(lives):
        ending.setdefault((life.end, life.bytes), []).append(i)
    out = list(lives)
    for life in lives:
        if life.storage not in fusible:
            continue
        reads = accesses[life.start].reads
        dying = ending.get((life.start + 1, life.bytes), [])
        for i in dying:
            if lives[i].storage in reads and lives[i].start < life.start and graph[lives[i].start] == graph[life.start]:
                out[i] = lives[i]._replace(end=life.start)
                dying.remove(i)
                break
    return out
