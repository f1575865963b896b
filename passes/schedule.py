"""Decisions -> the exact order of execution.

In: a Step and a Decision per storage. Out: the storages that cross from forward to backward, and a list of Runs for
each graph. What must hold: forward ops run in program order; backward ops run in program order, each preceded
by just those recomputations it needs that have not run yet, so a recomputed storage is made once, as late as
possible. The simulator and the rewrite both follow this order and know no other.

    forward  a b c d            keep b; recompute c
    backward d' c'              -> d'(needs c): c again from b, d', c'
"""

from collections.abc import Collection, Iterable

from memplan.ir import Decisions, Recompute, Run, Step


def saved_by(step: Step, decisions: Decisions) -> frozenset[int]:
    """The storages that cross: those kept or offloaded by name, and those backward reads that no decision mentions."""
    kept = {t for t, d in decisions.items() if not isinstance(d, Recompute)}
    return frozenset(kept | (step.read_in_backward - decisions.keys()))


def needs_tangents(step: Step) -> list[int]:
    """Indices of the ops that can only run in backward, in program order: all the others wait until they are needed."""
    first = len(step.forward.ops)
    return [first + k for k, op in enumerate(step.backward.ops) if step.saveable.isdisjoint(op.outputs)]


def moved_ahead(step: Step, saved: Iterable[int]) -> list[int]:
    """Indices of the backward ops that run in forward so that their results can be saved, in program order."""
    first = len(step.forward.ops)
    late = [t for t in saved if t in step.producer and step.producer[t][0] >= first]
    return [i for i in closure(step, late, step.given) if i >= first] if late else []


def closure(step: Step, wanted: Iterable[int], available: Collection[int]) -> list[int]:
    """Indices of the ops that make `wanted` out of `available`, in program order."""
    needed: set[int] = set()
    producer, stack = step.producer, [t for t in wanted if t not in available]
    while stack:
        found = producer.get(stack.pop())
        if found is not None and found[0] not in needed:
            needed.add(found[0])
            stack += [t for t in found[1].inputs if t not in available]
    return sorted(needed)


def schedule(step: Step, saved: Collection[int]) -> tuple[tuple[Run, ...], ...]:
    """The runs of each graph when the storages `saved` cross."""
    early = moved_ahead(step, saved)
    unit_of = {i: g.unit for g, span in zip(step.graphs, step.spans, strict=True) for i in span} if early else {}
    late = step.once(needs_tangents)
    ran = {*range(len(step.forward.ops)), *early}
    available = {*step.given, *saved, *step.backward.inputs}
    out = []
    for graph, span in zip(step.graphs, step.spans, strict=True):
        if graph.phase == "forward":
            runs = _forward_order(step, span, [i for i in early if unit_of[i] == graph.unit])
        else:
            own = late if len(span) == len(step.backward.ops) else [i for i in late if i in span]
            runs = _backward_order(step, own, graph.outputs, available, ran)
        out.append(tuple(runs))
    return tuple(out)


def read_in(step: Step, runs: Iterable[Iterable[Run]]) -> set[int]:
    """The storages that backward reads or returns when the graphs run so."""
    found = set(step.backward.outputs)
    for graph, own in zip(step.graphs, runs, strict=True):
        if graph.phase == "backward":
            found.update(*(step.ops[run.op].inputs for run in own))
    return found


def _backward_order(
    step: Step, own: Iterable[int], outputs: Iterable[int], available: set[int], ran: Collection[int]
) -> list[Run]:
    """The ops `own`, each behind the ops that make what it reads and is not `available`, which grows."""
    runs, alone, ops = list[Run](), step.once(_alone), step.ops
    lacking = set(step.saveable - available)  # all else is there by now

    def make(storages: Iterable[int]) -> None:
        for i in closure(step, [t for t in storages if t not in available], available):
            runs.append(Run(i, again=i in ran))
            available.update(ops[i].outputs)
            lacking.difference_update(ops[i].outputs)

    for i in own:
        op = ops[i]
        if not lacking.isdisjoint(op.inputs):
            make(op.inputs)
        runs.append(alone[i])
        available.update(op.outputs)
    make(sorted(outputs))
    return runs


def _alone(step: Step) -> list[Run]:
    """Of each op, its first run."""
    return [Run(i) for i in range(len(step.ops))]


def _forward_order(step: Step, span: range, early: list[int]) -> list[Run]:
    """A graph's ops in program order, each early backward op right after the last of its inputs."""
    if not early:
        return step.once(_alone)[span.start : span.stop]
    runs: list[Run] = []
    there = set(step.given).difference(*(step.ops[i].outputs for i in span))
    missing = {e: {t for t in step.ops[e].inputs if t not in there} for e in early}
    readers: dict[int, list[int]] = {}
    for e, storages in missing.items():
        for t in storages:
            readers.setdefault(t, []).append(e)

    def run(i: int) -> list[int]:
        """Run it; those that wait for nothing else now."""
        runs.append(Run(i))
        ready = list[int]()
        for t in step.ops[i].outputs:
            for e in readers.get(t, ()):
                missing[e].discard(t)
                ready += [e] if not missing[e] else []
        return ready

    ready = sorted(e for e in early if not missing[e])
    for i in span:
        ready += run(i)
        while ready:
            ready = sorted({e for now in sorted(ready) for e in run(now)})
    ran = {r.op for r in runs}
    return runs + [Run(e) for e in early if e not in ran]
