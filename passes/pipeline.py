"""Step -> Plan: decide, schedule, check, simulate. Torch-free.

In: a Step, a policy, a Budget, a Machine. Out: a Plan that passes `check` and fits, or an exception that says
why not. Whatever a policy returns is validated here, so policies stay small.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import replace

from memplan.errors import DoesNotFit, MemplanError, did_you_mean
from memplan.ir import Budget, Decision, Decisions, Keep, Machine, Offload, Plan, Recompute, Step, Tier, Timeline
from memplan.passes import copies, policies
from memplan.passes.check import check
from memplan.passes.policies.greedy import Greedy, least_beside_others
from memplan.passes.policies.optimal import Optimal
from memplan.passes.schedule import read_in, saved_by, schedule
from memplan.passes.simulate import simulate
from memplan.units import human


def make_plan(
    step: Step,
    policy: str | policies.Policy,
    budget: Budget,
    machine: Machine,
    *,
    inner: str,
    fit: bool = True,
    smallest: bool = False,
    several: bool = False,
) -> Plan:
    """The policy's plan; with `smallest` its smallest one, or greedy's where that fits, and with `several` too the best
    of any policy for a graph that others run beside. Raises DoesNotFit when `fit` and it is over the budget.
    """
    if smallest and several:
        saved = least_beside_others(step, machine)
        decisions = {t: Keep() if t in saved else Recompute() for t in step.read_in_backward | saved}
        plan = evaluate(step, decisions, budget, machine, inner, "greedy")
        if fit and not plan.fits:
            plan = replace(smallest_plan(step, machine, inner, budget), budget=budget)
            if not plan.fits:
                raise does_not_fit(plan, plan)
        return plan
    chosen, name = policies.find(policy), policies.name_of(policy)
    if smallest and policies.finds_least(chosen):  # which takes it long, and greedy's may do
        quick = replace(smallest_plan(step, machine, inner, budget), budget=budget, policy=name)
        if quick.fits:
            return quick
    asked = budget.leaving(0) if smallest else budget
    plan = evaluate(step, _ask(chosen, step, asked, machine), budget, machine, inner, name)
    if fit and not plan.fits:
        raise does_not_fit(plan, _least(plan, chosen))
    return plan


def _least(plan: Plan, chosen: policies.Policy) -> Plan:
    """The smallest plan that is found where this one, of a policy, does not fit: a policy's own if it looks for it, so
    that what a refusal names is enough for it, else optimal's.
    """
    if policies.finds_least(chosen):
        return plan
    nothing, optimal = plan.budget.leaving(0), Optimal()
    decisions = optimal(plan.step, nothing, plan.machine)
    return evaluate(plan.step, decisions, nothing, plan.machine, plan.inner, optimal.name)


def evaluate(step: Step, decisions: Decisions, budget: Budget, machine: Machine, inner: str, policy: str) -> Plan:
    """What follows from the decisions, fitting or not. Raises MemplanError when they make no valid plan."""
    decisions = _resolved(step, decisions, policy)
    runs = schedule(step, saved_by(step, decisions))
    saved = saved_by(step, decisions) & read_in(step, runs)
    again = {t for own in runs for run in own if run.again for t in step.ops[run.op].outputs}
    wanted = {t: d for t, d in decisions.items() if isinstance(d, Offload) and t in saved}
    offloads = copies.placed(step, runs, wanted, machine)
    final: dict[int, Decision] = {t: offloads.get(t, Keep()) for t in saved}
    final |= {t: Recompute() for t in again & step.saveable - saved}
    plan = Plan(
        step=step,
        decisions=tuple((t, final[t]) for t in sorted(final)),
        runs=runs,
        timeline=Timeline(step.name, "predicted", (), ()),
        budget=budget,
        machine=machine,
        policy=policy,
        base_seconds=sum(step.seconds(machine)),
        inner=inner,
    )
    broken = check(plan)
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise MemplanError(f"policy {policy!r} made no valid plan: {broken[0]}{more}\n" + "\n".join(broken[1:]))
    return replace(plan, timeline=simulate(step, runs, saved, machine, offloads))


def _ask(policy: policies.Policy, step: Step, budget: Budget, machine: Machine) -> Decisions:
    try:
        return policy(step, budget, machine)
    except MemplanError:
        raise
    except Exception as e:
        raise MemplanError(f"policy {policies.name_of(policy)!r} raised {type(e).__name__}: {e}") from e


def _resolved(step: Step, decisions: Decisions, policy: str) -> Decisions:
    """Decisions by storage; names are accepted in their place, anything else is refused."""
    if not isinstance(decisions, Mapping):
        raise MemplanError(
            f"policy {policy!r} returned a {type(decisions).__name__}; it must return a mapping storage -> Keep() | "
            "Recompute() | Offload()"
        )
    by_name = {tensor.name: t for t, tensor in enumerate(step.tensors)}
    out: dict[int, Decision] = {}
    for key, decision in decisions.items():
        storage = by_name.get(key, -1) if isinstance(key, str) else key
        if not isinstance(storage, int) or not 0 <= storage < len(step.tensors):
            hint = did_you_mean(key, by_name) if isinstance(key, str) else f": the step has {len(step.tensors)}"
            raise MemplanError(f"policy {policy!r} decides on a storage {key!r} that the step does not have{hint}")
        if not isinstance(decision, (Keep, Recompute, Offload)):
            raise MemplanError(
                f"policy {policy!r} gives {decision!r} for {key!r}; it must be Keep(), Recompute() or Offload()"
            )
        if storage not in step.saveable:
            raise MemplanError(
                f"policy {policy!r} decides on {step.tensors[storage].name!r}, which cannot cross from forward to "
                "backward: decide on storages in step.saveable"
            )
        if isinstance(decision, Offload) and decision.tier not in typing.get_args(Tier):
            raise MemplanError(
                f"policy {policy!r} offloads to tier {decision.tier!r}: there are {' and '.join(typing.get_args(Tier))}"
            )
        if isinstance(decision, Offload) and storage not in step.offloadable:
            raise MemplanError(
                f"policy {policy!r} offloads {step.tensors[storage].name!r}, which is a result of forward that the "
                "caller holds, or has gaps: offload storages in step.offloadable"
            )
        out[storage] = decision
    return out


def smallest_plan(step: Step, machine: Machine, inner: str, budget: Budget) -> Plan:
    """The smallest plan that is found at once, greedy's; `optimal` looks longer, and for a smaller one."""
    nothing = budget.leaving(0)
    return evaluate(step, Greedy()(step, nothing, machine), nothing, machine, inner, "greedy")


def does_not_fit(plan: Plan, least: Plan) -> DoesNotFit:
    """What `plan` needed, the best that can be reached (`least`), and the largest tensors alive then."""
    step, budget = plan.step, plan.budget
    if plan.peak <= budget.available:  # then it is the host's
        away = plan.timeline.host_peak
        shared = ", the default where host and device share one memory" if not budget.host_bytes else ""
        return DoesNotFit(
            f"policy {plan.policy!r} has {human(away)} in the host's memory at a time, and host_budget is "
            f'{human(budget.host_bytes)}{shared}: set host_budget="{away}B", or offload less',
            budget=budget.bytes,
            needed=budget.needed_for(plan.peak),
            smallest=budget.needed_for(min(plan.peak, least.peak)),
        )
    best = min(plan, least, key=lambda p: p.peak)
    enough = budget.needed_for(best.peak)
    needed = enough if best.policy == plan.policy else budget.needed_for(plan.peak)
    advice = f'set a budget of at least "{enough}B", or make the batch smaller'
    if enough < needed:
        advice = f'set a budget of at least "{needed}B", or policy="{best.policy}" and at least "{enough}B"'
    if budget.bytes < 2**10:
        advice += f'; or did you mean "{budget.bytes}GB"?'
    largest = [
        f"  {human(b.bytes):>10}  {b.name} {list(b.shape)} {b.dtype}  {b.source}" for b in best.timeline.alive()[:3]
    ]
    return DoesNotFit(
        f"the step does not fit {human(budget.bytes)}: policy {plan.policy!r} needs {human(needed)}, and the best of "
        f"the built-in policies {human(enough)}; {advice}\n"
        f"alive at that peak, {_where(best.timeline)}beyond {human(step.base_bytes)} of parameters and inputs:\n"
        + "\n".join([*largest, *(f"note: {note}" for note in step.notes)]),
        budget=budget.bytes,
        needed=needed,
        smallest=enough,
    )


def _where(timeline: Timeline) -> str:
    """The moment of the peak."""
    if not timeline.moments:
        return ""
    moment = timeline.moments[timeline.peak_moment]
    return f"at {moment.name}" + (f" in {moment.phase}, " if moment.phase else ", ")
