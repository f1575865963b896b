"""Is a plan valid? Which rule does it break? Shares no code with any policy, nor with the scheduler.

In: a Plan. Out: one sentence per broken rule, none for a valid plan. Executes the plan's runs over sets of
storages, the way an executor would over memory.
"""

from memplan.ir import Keep, Plan, Run, Step


def check(plan: Plan) -> list[str]:
    """The rules that `plan` breaks."""
    return [*_decisions(plan), *_forward(plan), *_backward(plan)]


def _decisions(plan: Plan) -> list[str]:
    broken, seen = [], set()
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
    return broken


def _needs_tangents(step: Step, storage: int) -> bool:
    seen, stack = set(), [storage]
    while stack:
        t = stack.pop()
        if t in step.backward.inputs:
            return True
        if t in step.producer and t not in seen:
            seen.add(t)
            stack.extend(step.producer[t][1].inputs)
    return False


def _forward(plan: Plan) -> list[str]:
    step, broken = plan.step, []
    count: dict[int, int] = {}
    have = set(step.resident)
    for run in plan.forward:
        broken += _run(step, run, have, "forward")
        if run.again:
            broken.append(f"{step.ops[run.op].name}: marked as recomputed in forward")
        count[run.op] = count.get(run.op, 0) + 1
    for i, op in enumerate(step.forward.ops):
        if count.get(i, 0) != 1:
            broken.append(f"{op.name}: runs {count.get(i, 0)} times in forward, not once")
    broken += [f"{step.ops[i].name}: runs twice in forward" for i, n in count.items() if n > 1]
    crossing = {t for t, d in plan.decisions if isinstance(d, Keep)}
    for t in sorted((crossing | set(step.forward.outputs)) - have):
        broken.append(f"{_name(step, t)}: leaves forward and was never made there")
    return broken


def _backward(plan: Plan) -> list[str]:
    step, broken = plan.step, []
    ahead = {run.op for run in plan.forward}
    have = set(step.resident) | set(step.backward.inputs) | {t for t, d in plan.decisions if isinstance(d, Keep)}
    ran: set[int] = set()
    for run in plan.backward:
        op = step.ops[run.op]
        broken += _run(step, run, have, "backward")
        if run.op in ran:
            broken.append(f"{op.name}: runs twice in backward")
        ran.add(run.op)
        if run.again != (run.op in ahead):
            broken.append(f"{op.name}: wrongly marked as {'recomputed' if run.again else 'running first'}")
        if run.op in ahead and op.fixed:
            broken.append(f"{op.name}: recomputed, and must not be: {op.fixed}")
    first = len(step.forward.ops)
    for i, op in enumerate(step.backward.ops, first):
        if not op.outputs and i not in ran:
            broken.append(f"{op.name}: runs for its effects, and never runs")
    for t in sorted(set(step.backward.outputs) - have - set(step.forward.outputs)):
        broken.append(f"{_name(step, t)}: an output of backward that is never made")
    return broken


def _run(step: Step, run: Run, have: set[int], where: str) -> list[str]:
    """Execute one run over the set of storages `have`."""
    op = step.ops[run.op]
    missing = [_name(step, t) for t in op.inputs if t not in have]
    have.update(op.outputs)
    return [f"{op.name}: reads {', '.join(missing)} in {where}, which is not there"] if missing else []


def _name(step: Step, storage: int) -> str:
    return step.tensors[storage].name if 0 <= storage < len(step.tensors) else f"storage {storage}"
