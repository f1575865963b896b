"""Decisions -> the exact order of execution.

In: a Step and a Decision per storage. Out: the storages that cross from forward to backward, and two lists
of Runs. What must hold: forward ops run in program order; backward ops run in program order, each preceded
by just those recomputations it needs that have not run yet, so a recomputed storage is made once, as late as
possible. The simulator and the rewrite both follow this order and know no other.

    forward  a b c d            keep b; recompute c
    backward d' c'              -> d'(needs c): c again from b, d', c'
"""

from collections.abc import Collection, Iterable

from memplan.ir import Decisions, Keep, Run, Step


def saved_by(step: Step, decisions: Decisions) -> frozenset[int]:
    """The storages that cross: those kept by name, and those backward reads that no decision mentions."""
    kept = {t for t, d in decisions.items() if isinstance(d, Keep)}
    return frozenset(kept | (step.read_in_backward - decisions.keys()))


def closure(step: Step, wanted: Iterable[int], available: Collection[int]) -> list[int]:
    """Indices of the ops that make `wanted` out of `available`, in program order."""
    needed: set[int] = set()
    stack = [t for t in wanted if t not in available]
    while stack:
        found = step.producer.get(stack.pop())
        if found is None or found[0] in needed:
            continue
        needed.add(found[0])
        stack.extend(t for t in found[1].inputs if t not in available)
    return sorted(needed)


def schedule(step: Step, saved: Collection[int]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """(forward runs, backward runs) when the storages `saved` cross."""
    resident, first = set(step.resident), len(step.forward.ops)
    early = [i for i in closure(step, saved, resident) if i >= first]  # backward ops whose results are saved
    forward = _forward_order(step, early)

    ran = {run.op for run in forward}
    available = resident | set(saved) | set(step.backward.inputs)
    wanted = set(step.backward.outputs)
    backward: list[Run] = []

    def run_closure(storages: Iterable[int]) -> None:
        for i in closure(step, storages, available):
            backward.append(Run(i, again=i in ran))
            available.update(step.ops[i].outputs)

    for i in range(first, len(step.ops)):
        op = step.ops[i]
        # What depends on no tangent waits until something needs it.
        if step.saveable.isdisjoint(op.outputs) or not op.outputs:
            run_closure(t for t in op.inputs if t not in available)
            backward.append(Run(i))
            available.update(op.outputs)
    run_closure(t for t in sorted(wanted) if t not in available)
    return tuple(forward), tuple(backward)


def _forward_order(step: Step, early: list[int]) -> list[Run]:
    """Forward ops in program order, each early backward op right after the last of its inputs."""
    runs: list[Run] = []
    made = set(step.resident)
    waiting = list(early)
    for i in range(len(step.forward.ops)):
        runs.append(Run(i))
        made.update(step.ops[i].outputs)
        ready = [e for e in waiting if made.issuperset(step.ops[e].inputs)] if waiting else []
        while ready:
            for e in ready:
                runs.append(Run(e))
                made.update(step.ops[e].outputs)
                waiting.remove(e)
            ready = [e for e in waiting if made.issuperset(step.ops[e].inputs)]
    return runs + [Run(e) for e in waiting]
