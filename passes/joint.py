"""Several graphs of one step: one Step for policies, and one Timeline for the budget. Torch-free.

A graph break splits a step into units, each a forward and a backward graph that is compiled alone. In: for each run of
a unit its own plan, and which storages it was called with and returned, as seen when the step ran. Out:

    merge    the Step of all units (forward 1, forward 2, backward 2, backward 1), for a policy to decide on at once
    shares   what a plan of that Step means for each unit
    compose  the Timeline of the whole step from those of the units, whatever made them (simulator, generated code)

What must hold: `compose` never has fewer bytes than the step. Between its forward and its backward a unit keeps what
its own timeline says; its results are held until its backward has run; a parameter's gradient stays until the end, or,
where it is added to one that exists, until its unit's backward has run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.ir import (
    Block,
    Decision,
    Graph,
    Held,
    Keep,
    Kind,
    Moment,
    Offload,
    Op,
    Plan,
    Recompute,
    Step,
    Tensor,
    Timeline,
)
from memplan.passes.simulate import followed


@dataclass(frozen=True)
class Part:
    """One run of a unit. `arguments` and `results` identify storages across runs: 0 where there is none."""

    plan: Plan
    arguments: tuple[int, ...]
    results: tuple[int, ...]

    def storages(self) -> dict[int, int]:
        """Storage of the unit's Step -> its identity, for what the caller sees."""
        ports = self.plan.step.ports
        seen = [*zip(ports.results, self.results, strict=False), *zip(ports.arguments, self.arguments, strict=False)]
        return {t: key for t, key in seen if t >= 0 and key}


@dataclass(frozen=True)
class Link:
    """`reader` was called with a result of `maker`. `gradient`: the storage of its gradient in the reader's Step."""

    key: int
    maker: int
    reader: int
    gradient: int = -1


def links(parts: Sequence[Part]) -> list[Link]:
    """What earlier parts made and later parts were called with."""
    maker: dict[int, int] = {}
    out = []
    for k, part in enumerate(parts):
        ports = part.plan.step.ports
        gradients = (*ports.gradients, *(-1 for _ in part.arguments))
        for key, gradient in zip(part.arguments, gradients, strict=False):
            if key in maker:
                out.append(Link(key, maker[key], k, gradient))
        resident = set(part.plan.step.resident)
        maker |= {key: k for t, key in part.storages().items() if t not in resident}
    return out


# ---- one Step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The Step of all parts. `index`: for each part, its own storages -> those of `step`."""

    step: Step
    index: tuple[Mapping[int, int], ...]


def merge(parts: Sequence[Part], held: Held) -> Merged:
    """One Step of all parts. Its sizes are fixed: those of the parts' own Steps."""
    tensors: list[Tensor] = []
    by_key: dict[int, int] = {}
    index: list[dict[int, int]] = []
    for k, part in enumerate(parts):
        keys = part.storages()
        mine: dict[int, int] = {}
        for t, tensor in enumerate(part.plan.step.tensors):
            key = keys.get(t, 0)
            if key not in by_key:
                mine[t] = len(tensors)
                tensors.append(dataclasses.replace(tensor, name=_named(tensor.name, k), formula=None))
                if key:
                    by_key[key] = mine[t]
            else:
                mine[t] = by_key[key]
        index.append(mine)

    crossing = links(parts)
    _join_tangents(parts, crossing, index)
    made = {index[k][t] for k, p in enumerate(parts) for op in p.plan.step.ops for t in op.outputs}
    resident = tuple(dict.fromkeys(index[k][t] for k, p in enumerate(parts) for t in p.plan.step.resident))
    graphs = [_forward(k, parts, index[k], crossing) for k in range(len(parts))]
    graphs += [_backward(k, parts, index[k], crossing) for k in reversed(range(len(parts)))]
    steps = [p.plan.step for p in parts]
    step = Step(
        name=f"{steps[0].name}, {len(parts)} graphs",
        tensors=tuple(tensors),
        graphs=tuple(graphs),
        resident=tuple(t for t in resident if t not in made),
        held=held,
        gaps=tuple(gap for s in steps for gap in s.gaps),
        saved_by=_saved_by(steps, index),
        fused=any(s.fused for s in steps),
        notes=tuple(dict.fromkeys(note for s in steps for note in s.notes)),
        cost=steps[0].cost,
    )
    return Merged(step, tuple(index))


def _named(name: str, part: int) -> str:
    return name if part == 0 else f"{name}@{part + 1}"


def _join_tangents(parts: Sequence[Part], crossing: Sequence[Link], index: Sequence[dict[int, int]]) -> None:
    """A tangent of one part is the gradient that a later part computes."""
    for link in crossing:
        maker = parts[link.maker]
        for tangent, key in zip(maker.plan.step.ports.tangents, maker.results, strict=False):
            if key == link.key and tangent >= 0 and link.gradient >= 0:
                index[link.maker][tangent] = index[link.reader][link.gradient]


def _ops(ops: Sequence[Op], index: Mapping[int, int], part: int) -> tuple[Op, ...]:
    return tuple(
        dataclasses.replace(
            op,
            name=_named(op.name, part),
            inputs=tuple(index[t] for t in op.inputs),
            outputs=tuple(index[t] for t in op.outputs),
        )
        for op in ops
    )


def _forward(k: int, parts: Sequence[Part], index: Mapping[int, int], crossing: Sequence[Link]) -> Graph:
    own, keys = parts[k].plan.step.forward, parts[k].storages()
    read_later = {link.key for link in crossing if link.maker == k}
    return Graph(
        f"forward {k + 1}",
        _ops(own.ops, index, k),
        tuple(index[t] for t in own.inputs),
        tuple(index[t] for t in own.outputs if keys.get(t, 0) not in read_later),
        "forward",
        k,
    )


def _backward(k: int, parts: Sequence[Part], index: Mapping[int, int], crossing: Sequence[Link]) -> Graph:
    own = parts[k].plan.step.backward
    handed_on = {link.gradient for link in crossing if link.reader == k}
    return Graph(
        f"backward {k + 1}",
        _ops(own.ops, index, k),
        tuple(index[t] for t in own.inputs),
        tuple(index[t] for t in own.outputs if t not in handed_on),
        "backward",
        k,
    )


def _saved_by(steps: Sequence[Step], index: Sequence[Mapping[int, int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The sets that torch would save in each graph, together."""
    found: dict[str, list[int]] = {}
    for step, mine in zip(steps, index, strict=True):
        for name, saved in step.saved_by:
            found.setdefault(name, []).extend(mine[t] for t in saved)
    return tuple((name, tuple(sorted(set(saved)))) for name, saved in found.items())


def shares(plan: Plan, merged: Merged, own_plans: Sequence[Plan]) -> list[dict[int, Decision]]:
    """For each part, of which any plan is given: the decisions under which it runs as `plan` of the whole says."""
    step, out = plan.step, []
    given = step.given - set(step.resident)
    runs = {g.unit: own for g, own in zip(step.graphs, plan.runs, strict=True) if g.phase == "backward"}
    for k, alone in enumerate(own_plans):
        index, own = merged.index[k], alone.step
        read = {t for run in runs[k] for t in step.ops[run.op].inputs}
        kept = plan.saved | (given & read)
        mine = [t for t in own.saveable if t in own.read_in_backward or index[t] in kept]
        places = _places(step, own, k)
        away = {t: d for t, d in plan.offloads.items()}
        out.append(
            {
                t: _elsewhere(away[index[t]], places)
                if index[t] in away
                else Keep()
                if index[t] in kept
                else Recompute()
                for t in mine
            }
        )
    return out


def _places(step: Step, own: Step, unit: int) -> dict[int | None, int]:
    """Ops of the whole step -> the same of a part."""
    found = dict[int | None, int]()
    for graph, span in zip(step.graphs, step.spans, strict=True):
        if graph.unit == unit:
            first = len(own.forward.ops) if graph.phase == "backward" else 0
            found |= {i: first + k for k, i in enumerate(span)}
    return found


def _elsewhere(decision: Offload, places: Mapping[int | None, int]) -> Offload:
    points = (decision.start_after, decision.release_at, decision.reload_at)
    return Offload(decision.tier, *(places.get(point) for point in points))


# ---- one Timeline ---------------------------------------------------------------------------------------------------


def compose(parts: Sequence[Part], held: Held, title: str) -> Timeline:
    """The timeline of the step in which the parts ran in this order, forward, and in reverse, backward."""
    sizes, ahead, behind, at = _offsets(parts)
    crossing = links(parts)
    ends = _gradients(parts, crossing, behind, at, adding=held.fresh == 0)
    blocks, host = list[Block](), list[Block]()
    for k, part in enumerate(parts):
        first, count = sizes[k][0], sum(sizes[k])
        waiting = _by_size(part.plan.step, ends[k])
        for block in part.plan.timeline.blocks:
            start = ahead[k] + block.start if block.start < first else behind[k] + block.start - first
            end = ahead[k] + block.end if block.end <= first else behind[k] + block.end - first
            if block.kind == "gradient" and block.end == count and block.start >= first:
                # Of gradients of one size it does not matter which is which: all are alive when the unit ends.
                end = max(end, waiting[block.bytes].pop() if waiting.get(block.bytes) else at)
            blocks.append(dataclasses.replace(block, start=start, end=end))
        for b in part.plan.timeline.host:  # from forward to backward
            host.append(dataclasses.replace(b, start=ahead[k] + b.start, end=behind[k] + b.end - first))
        blocks += _sums(k, parts, crossing, behind[k] + count - first)
    moments, base = _moments(parts, sizes), _base(parts, crossing, held)
    made = Timeline(title, "predicted", moments, tuple(blocks), base, host=tuple(host))
    return followed(made, held)


def placed(parts: Sequence[Part], k: int, moment: int) -> int:
    """A moment of the k-th part's own timeline in that of all."""
    sizes, ahead, behind, _ = _offsets(parts)
    first = sizes[k][0]
    return ahead[k] + moment if moment < first else behind[k] + moment - first


def _offsets(parts: Sequence[Part]) -> tuple[list[tuple[int, int]], list[int], list[int], int]:
    """For each part its moments forward and backward, and where they begin in the timeline of all; and its end."""
    sizes = [_count(p.plan.timeline) for p in parts]
    ahead = list(itertools.accumulate((f for f, _ in sizes), initial=0))
    behind, at = [0] * len(parts), ahead[-1]
    for k in reversed(range(len(parts))):
        behind[k], at = at, at + sizes[k][1]
    return sizes, ahead, behind, at


def _count(timeline: Timeline) -> tuple[int, int]:
    forward = sum(m.phase != "backward" for m in timeline.moments)
    return forward, len(timeline.moments) - forward


def _gradients(
    parts: Sequence[Part], crossing: Sequence[Link], behind: Sequence[int], last: int, *, adding: bool
) -> list[dict[int, int]]:
    """For each part, the storage of each gradient that it computes -> the moment up to which that is needed."""
    maker = {(link.reader, link.key): link.maker for link in crossing}
    shared = {key for key, n in Counter(key for p in parts for key in set(p.arguments)).items() if n > 1}
    out = []
    for k, part in enumerate(parts):
        ends: dict[int, int] = {}
        for key, gradient in zip(part.arguments, part.plan.step.ports.gradients, strict=False):
            if gradient < 0:
                continue
            end = 0 if adding and key not in shared else last
            if (k, key) in maker:  # from there on it is the tangent of the unit that made the argument
                end = behind[maker[k, key]]
            ends[gradient] = max(end, ends.get(gradient, 0))
        out.append(ends)
    return out


def _by_size(step: Step, ends: Mapping[int, int]) -> dict[int, list[int]]:
    out: dict[int, list[int]] = {}
    for t, end in ends.items():
        out.setdefault(step.tensors[t].bytes, []).append(end)
    return out


def _sums(k: int, parts: Sequence[Part], crossing: Sequence[Link], end: int) -> list[Block]:
    """Where gradients of several parts meet they are added: for a moment there may be a third beside the two."""
    later = {
        key for p in parts[k + 1 :] for key, g in zip(p.arguments, p.plan.step.ports.gradients, strict=False) if g >= 0
    }
    step, blocks = parts[k].plan.step, []
    for key, gradient in zip(parts[k].arguments, step.ports.gradients, strict=False):
        if gradient >= 0 and key in later:
            tensor = step.tensors[gradient]
            blocks.append(Block(f"sum of {tensor.name}", tensor.bytes, "temporary", end - 1, end))
    return blocks


def _moments(parts: Sequence[Part], sizes: Sequence[tuple[int, int]]) -> tuple[Moment, ...]:
    order = [(k, 0, sizes[k][0]) for k in range(len(parts))]
    order += [(k, sizes[k][0], sum(sizes[k])) for k in reversed(range(len(parts)))]
    clock, out = 0.0, list[Moment]()
    for k, start, end in order:
        moments = parts[k].plan.timeline.moments
        before = moments[start - 1].seconds if start else 0.0
        out += [dataclasses.replace(m, seconds=clock + m.seconds - before) for m in moments[start:end]]
        clock = out[-1].seconds if out else clock
    return tuple(out)


def _base(parts: Sequence[Part], crossing: Sequence[Link], held: Held) -> tuple[tuple[Kind, int], ...]:
    """What is there throughout, once: parameters, the batch, what came from outside the graphs."""
    made = {(link.reader, link.key) for link in crossing}
    total, seen = Counter[Kind](dict(held.kinds)), set[int]()
    for k, part in enumerate(parts):
        keys = part.storages()
        for t in part.plan.step.resident:
            key = keys.get(t, 0)
            if key in seen or (k, key) in made or t in part.plan.step.below:
                continue
            seen |= {key} if key else set()
            total[part.plan.step.tensors[t].kind] += part.plan.step.tensors[t].bytes
    return tuple(total.items())
