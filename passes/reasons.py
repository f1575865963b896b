"""Why not the other choice? Each row of a plan's table is decided otherwise, scheduled and simulated. Torch-free.

In: a Plan. Out: the same Plan with `reasons`: what would follow for a row, as a text.

    kept         "recompute: +3.1 ms"         or "recompute: not, it draws the random seed"
                 "offload: +1.2 ms"           where the host has room, and that is the cheaper
    recomputed   "keep: over by 1.200 GB"     or "keep: fits, -0.4 ms", where the policy has left room
    offloaded    likewise

What must hold: a row changes as a whole and all else stays as it is, so what is said is exact in bytes, and in time as
good as the plan's own estimate. Only where the points of other copies cannot stay (an op that they name runs no more)
are these placed anew.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from memplan.errors import MemplanError
from memplan.groups import ROWS, groups
from memplan.ir import Decision, Decisions, Keep, Offload, Plan, Recompute, Step
from memplan.passes.pipeline import evaluate
from memplan.passes.schedule import saved_by, schedule
from memplan.units import human

LIMIT = 200_000  # runs of ops that are simulated in all: about 4 s on one core


class _Outcome(NamedTuple):
    short: bool  # it does not fit, or is no plan
    seconds: float  # that it adds
    words: str


def with_reasons(plan: Plan, limit: int = LIMIT) -> Plan:
    """The plan with its reasons: of the largest rows first, up to `limit` simulated runs of ops."""
    rows = groups(plan)[:ROWS]
    cost = sum(map(len, plan.runs))
    found, simulated = [], 0
    for members in rows:
        choices = _choices(plan, members)
        if simulated + cost * len(choices) > limit:
            break
        simulated += cost * len(choices)
        outcomes = [_outcome(plan, members, choice) for choice in choices]
        found.append((members, min(outcomes, key=lambda o: o[:2]).words))
    notes = plan.notes
    if len(found) < len(rows):
        notes += (
            f"what would follow from other choices is said of the {len(found)} largest of {len(rows)} rows: for more, "
            f"over {limit:,} runs of ops would be simulated",
        )
    return replace(plan, reasons=tuple(found), notes=notes)


def _choices(plan: Plan, members: Sequence[int]) -> list[Decision]:
    """What else a row could be."""
    if not isinstance(dict(plan.decisions)[members[0]], Keep):
        return [Keep()]
    leave = plan.budget.host_bytes and plan.step.offloadable.issuperset(members)
    return [Recompute(), Offload()] if leave else [Recompute()]


def _outcome(plan: Plan, members: Sequence[int], choice: Decision) -> _Outcome:
    verb = type(choice).__name__.lower()
    decisions = _as_it_is(plan) | dict.fromkeys(members, choice)
    other = _evaluated(plan, decisions)
    if other is None:
        return _Outcome(True, 0.0, f"{verb}: not{_refusal(plan.step, decisions, members)}")
    added = other.timeline.seconds - plan.timeline.seconds
    over = other.peak - plan.budget.available
    beyond = other.timeline.host_peak - plan.budget.host_bytes
    if over > 0 or beyond > 0:
        words = f"over by {human(over)}" if over > 0 else f"host over by {human(beyond)}"
        return _Outcome(True, 0.0, f"{verb}: {words}")
    return _Outcome(False, added, f"{verb}: {'fits, ' if isinstance(choice, Keep) else ''}{_time(added)}")


def _as_it_is(plan: Plan) -> dict[int, Decision]:
    """The plan's decisions, and that what it does not mention is not kept if it should be needed."""
    return dict[int, Decision](dict.fromkeys(plan.step.read_in_backward, Recompute())) | dict(plan.decisions)


def _evaluated(plan: Plan, decisions: Decisions) -> Plan | None:
    """What follows; None if that is no valid plan."""
    anew = {t: Offload(d.tier) if isinstance(d, Offload) else d for t, d in decisions.items()}
    for attempt in (decisions, anew):
        try:
            return evaluate(plan.step, attempt, plan.budget, plan.machine, plan.inner, plan.policy)
        except MemplanError:
            if anew == decisions:
                break
    return None


def _refusal(step: Step, decisions: Decisions, members: Sequence[int]) -> str:
    """Which op must not run again."""
    again = {run.op for own in schedule(step, saved_by(step, decisions)) for run in own if run.again}
    fixed = next((step.ops[i] for i in sorted(again) if step.ops[i].fixed), None)
    if fixed is None:
        return ""
    its_own = not set(members).isdisjoint(fixed.outputs)
    return f", {fixed.fixed}" if its_own else f", {fixed.name}: {fixed.fixed}"


def _time(seconds: float) -> str:
    size, unit = (1e3 * seconds, "ms") if abs(seconds) >= 5e-5 else (1e6 * seconds, "us")
    return f"{size:+.1f} {unit}".replace("-0.0", "+0.0")
