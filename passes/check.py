"""Is a plan valid? Which rule does it break? Shares no code with any policy, nor with the scheduler.

In: a Plan. Out: one sentence per broken rule, none for a valid plan. Executes the plan's runs over sets of
storages, the way an executor would over memory.
"""

from collections.abc import Mapping

from memplan.ir import Graph, Keep, Offload, Plan, Run, Step


def check(plan: Plan) -> list[str]:
    """The rules that `plan` breaks."""
    if len(plan.runs) != len(plan.step.graphs):
        return [f"runs for {len(plan.runs)} graphs, and the step has {len(plan.step.graphs)}"]
    return [*_decisions(plan), *_execution(plan), *_counts(plan)]


def _decisions(plan: Plan) -> list[str]:
    broken, seen, elsewhere = [], set(), _read_elsewhere(plan.step)
    for t, decision in plan.decisions:
        if not 0 <= t < len(plan.step.tensors):
            broken.append(f"decision for storage {t}, and the step has {len(plan.step.tensors)}")
            continue
        name = plan.step.tensors[t].name
        if t in seen:
            broken.append(f"{name}: two decisions")
        seen.add(t)
        if t in plan.step.resident:
            broken.append(f"{name}: {decision} for a {plan.step.tensors[t].kind} that is always there")
        elif _needs_tangents(plan.step, t):
            broken.append(f"{name}: {decision} for a storage that exists only in backward")
        elif t in elsewhere:
            broken.append(f"{name}: {decision} for a storage that another unit of the step reads")
        elif isinstance(decision, Offload) and any(t in g.outputs for g in plan.step.graphs if g.phase == "forward"):
            broken.append(f"{name}: {decision} for a result of forward, which the caller holds")
    return broken


def _needs_tangents(step: Step, storage: int) -> bool:
    seen, stack = set(), [storage]
    alone = {t for g in step.graphs if g.phase == "backward" and not g.inputs for op in g.ops for t in op.outputs}
    ahead = {t for op in step.forward.ops for t in op.outputs}
    while stack:
        t = stack.pop()
        if t in step.backward.inputs or t in alone:  # alone: with its loss in the same graph
            return True
        if t in step.producer and t not in seen and t not in ahead:
            seen.add(t)
            stack.extend(step.producer[t][1].inputs)
    return False


def _read_elsewhere(step: Step) -> set[int]:
    """Storages that a forward graph makes and a graph of another unit reads."""
    makers = [(g.unit, {t for op in g.ops for t in op.outputs}) for g in step.graphs if g.phase == "forward"]
    readers = [(g.unit, {t for op in g.ops for t in op.inputs}) for g in step.graphs]
    return {t for unit, made in makers for other, read in readers if other != unit for t in made & read}


def _execution(plan: Plan) -> list[str]:
    """Every run finds what it reads, and every graph leaves behind what it should."""
    step, broken = plan.step, []
    elsewhere = _read_elsewhere(step)
    kept = {t for t, d in plan.decisions if isinstance(d, Keep)}
    away = {t: d for t, d in plan.decisions if isinstance(d, Offload)}
    have, made_ahead = set(step.resident), set[int]()
    copied = dict[int, int]()  # off the device -> the unit that made it
    for graph, runs in zip(step.graphs, plan.runs, strict=True):
        if graph.phase == "backward":
            have -= made_ahead - kept - elsewhere
            made_ahead = set()
        have.update(t for t in graph.inputs if t not in step.producer)
        for run in runs:
            op = step.ops[run.op]
            have |= {t for t, unit in copied.items() if unit == graph.unit and away[t].reload_at == run.op}
            missing = [_name(step, t) for t in op.inputs if t not in have]
            if missing:
                broken.append(f"{op.name}: reads {', '.join(missing)} in {graph.name}, which is not there")
            have.update(op.outputs)
            if graph.phase == "forward":
                made_ahead.update(op.outputs)
                left = {t for t in made_ahead & away.keys() if away[t].release_at == run.op}
                have -= left
                copied |= dict.fromkeys(left, graph.unit)
        if graph.phase == "forward":
            broken += _starts(step, graph, runs, away)
        leaves = (kept & {t for op in graph.ops for t in op.outputs}) | set(graph.outputs)
        if graph.phase == "forward":
            for t in sorted(leaves - have):
                broken.append(f"{_name(step, t)}: leaves {graph.name} and was never made there")
    for t in sorted(set(step.backward.outputs) - have - set(step.forward.outputs)):
        broken.append(f"{_name(step, t)}: an output of backward that is never made")
    return broken


def _starts(step: Step, graph: Graph, runs: tuple[Run, ...], away: Mapping[int, Offload]) -> list[str]:
    """Copies start when there is something to copy, and before the memory is freed."""
    broken = []
    at: dict[int | None, int] = {run.op: k for k, run in enumerate(runs)}
    made_at = {t: k for k, run in enumerate(runs) for t in step.ops[run.op].outputs if t in away}
    for t, made in made_at.items():
        d = away[t]
        points = [at.get(d.start_after, -1), at.get(d.release_at, -1)]
        if points[0] < made:
            broken.append(f"{_name(step, t)}: its copy starts where it is not there, in {graph.name}")
        if points[1] < 0:
            broken.append(f"{_name(step, t)}: freed where no op of {graph.name} runs")
        elif points[1] < points[0]:
            broken.append(f"{_name(step, t)}: freed before its copy starts, in {graph.name}")
    return broken


def _counts(plan: Plan) -> list[str]:
    """Every op runs in its own graph, once; in backward those of forward may run again, if they are marked and may."""
    step, broken = plan.step, []
    ahead: set[int] = set()
    for graph, span, runs in zip(step.graphs, step.spans, plan.runs, strict=True):
        count: dict[int, int] = {}
        for run in runs:
            op = step.ops[run.op]
            count[run.op] = count.get(run.op, 0) + 1
            if graph.phase == "forward" and run.again:
                broken.append(f"{op.name}: marked as recomputed in {graph.name}")
            if graph.phase == "backward" and run.again != (run.op in ahead):
                broken.append(f"{op.name}: wrongly marked as {'recomputed' if run.again else 'running first'}")
            if graph.phase == "backward" and run.op in ahead and op.fixed:
                broken.append(f"{op.name}: recomputed, and must not be: {op.fixed}")
        ahead.update(count)
        for i in span:
            if graph.phase == "forward" and count.get(i, 0) != 1:
                broken.append(f"{step.ops[i].name}: runs {count.get(i, 0)} times in {graph.name}, not once")
            if graph.phase == "backward" and not step.ops[i].outputs and i not in count:
                broken.append(f"{step.ops[i].name}: runs for its effects, and never runs")
        for i, n in count.items():
            if n > 1 and (graph.phase == "backward" or i not in span):
                broken.append(f"{step.ops[i].name}: runs twice in {graph.name}")
    return broken


def _name(step: Step, storage: int) -> str:
    return step.tensors[storage].name if 0 <= storage < len(step.tensors) else f"storage {storage}"
