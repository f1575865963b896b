"""Rank policies: each one's plan of each step, on each machine, inside each budget.

In: Steps, policies, budgets, machines. Out: a Ranking: what every plan takes in bytes and time, and how far that is
from the best there can be. Torch-free for recorded steps.
What must hold: all are judged by the same simulator and bound. Budgets are taken from the smallest up, and a plan that
a policy made for a smaller one stands if it is faster: so its overhead never rises with the budget.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from memplan.errors import MemplanError, Stopped
from memplan.ir import Bound, Budget, Machine, Plan, Step
from memplan.passes import policies
from memplan.passes.bound import bound
from memplan.passes.pipeline import evaluate, make_plan, smallest_plan
from memplan.passes.policies import Policy, name_of
from memplan.report import Ranking, Row
from memplan.units import human

AGAIN = 5.0  # seconds at least, for a policy that was stopped to return what it has
BUDGETS = 6  # of a step for which none are given: from the smallest that anything fits to what save-all takes


def rank(
    steps: Mapping[str, Step],
    machines: Sequence[Machine],
    wanted: Sequence[str | Policy],
    budgets: Sequence[int] = (),
    *,
    host_bytes: int = 0,
    limit: float = math.inf,
    progress: Callable[[str], None] = lambda _: None,
) -> Ranking:
    """The plans of `wanted` for every step, machine and budget (bytes); without budgets, of each step's own range.

    host_bytes: what may be off the device. limit: seconds that a policy may take for one plan; one that takes longer is
    stopped and named, and has the best that it made so far: what it returns when it catches memplan.errors.Stopped, or
    its plan for a smaller budget. Raises MemplanError for a policy that is not known, a limit of 0 or less,
    two machines of one name, and nothing to rank.
    """
    if not limit > 0:
        raise MemplanError(f"a limit of {limit:g} seconds leaves no time to plan: give a positive number, or none")
    found = tuple({name_of(one): policies.find(one) for one in wanted}.items())
    machines = list(dict.fromkeys(machines))
    for k, one in enumerate(machines):
        if any(one.name == other.name for other in machines[:k]):
            raise MemplanError(
                f"two machines are called {one.name!r}, and rows go by name: give one another, as with "
                "memplan calibrate --name"
            )
    if not (found and machines and steps):
        missing = "policy" if not found else "machine" if not machines else "step"
        raise MemplanError(f"there is no {missing} to rank: name one at least")
    asked = _Asked(found, tuple(sorted({*budgets})), host_bytes, limit, progress)
    return Ranking(tuple(row for name, step in steps.items() for row in _of_step(asked, name, step, machines)))


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is asked of every step and machine."""

    policies: tuple[tuple[str, Policy], ...]
    budgets: tuple[int, ...]
    host_bytes: int
    limit: float
    progress: Callable[[str], None]


Plans = dict[tuple[str, int], Plan]  # (policy, budget) -> its best plan


def _of_step(asked: _Asked, name: str, step: Step, machines: Sequence[Machine]) -> list[Row]:
    """In the order of the machines; planned from the slowest bus, whose plans stand on faster ones."""
    of, slower = dict[str, list[Row]](), list[tuple[Machine, Plans]]()
    for machine in sorted(machines, key=lambda m: m.host_bandwidth):
        before = [plans for other, plans in slower if _differs_in_the_bus(other, machine)]
        rows, made = _on_machine(asked, name, step, machine, before)
        of.setdefault(machine.name, []).extend(rows)
        slower.append((machine, made))
    return [row for machine in machines for row in of[machine.name]]


def _on_machine(
    asked: _Asked, name: str, step: Step, machine: Machine, before: Sequence[Plans]
) -> tuple[list[Row], Plans]:
    """From the smallest budget, whose plans stand in larger ones; `before`: what was made for slower buses."""
    rows, made, best = list[Row](), Plans(), dict[str, Plan]()
    for size in asked.budgets or _range(step, machine, asked.host_bytes):
        budget = Budget(size, host_bytes=asked.host_bytes)
        least, here = bound(step, budget, machine), list[Row]()
        for label, policy in asked.policies:
            asked.progress(f"{name} on {machine.name}: {label} inside {human(size)}")
            plan, row = _planned(step, machine, budget, label, policy, asked.limit)
            known = [plans[label, size] for plans in before if (label, size) in plans]
            plan, row = _no_slower(plan, row, known, machine)
            here.append(_judged(dataclasses.replace(row, step=name), plan, least, best))
            if label in best:
                made[label, size] = best[label]
        rows += sorted(here, key=lambda row: (not row.fits, row.overhead, row.peak, row.policy))
    return rows, made


def _differs_in_the_bus(slower: Machine, machine: Machine) -> bool:
    """Whether the machines are alike but for that, and their names."""
    return dataclasses.replace(slower, name=machine.name, host_bandwidth=machine.host_bandwidth) == machine


def _no_slower(plan: Plan | None, row: Row, known: Sequence[Plan], machine: Machine) -> tuple[Plan | None, Row]:
    """The plan, or one that was made for the last slower bus: its copies end no later here."""
    for other in known[-1:]:
        again = evaluate(other.step, dict(other.decisions), other.budget, machine, other.inner, other.policy)
        if plan is None or not plan.fits or again.overhead < plan.overhead:
            note = f"the plan for {other.machine.name}" + (f"; {row.note}" if row.note else "")
            return again, dataclasses.replace(row, note=note)
    return plan, row


def _range(step: Step, machine: Machine, host_bytes: int) -> list[int]:
    """Budgets from the least to what save-all takes, evenly spread on a scale of ratios."""
    most = evaluate(step, {}, Budget(2**62), machine, "eager", "save-all").peak
    least = smallest_plan(step, machine, "eager", Budget(0, host_bytes=host_bytes)).peak
    ratio = (most / max(1, least)) ** (1 / (BUDGETS - 1))
    return sorted({*(math.ceil(least * ratio**k) for k in range(BUDGETS - 1)), most})


def _planned(
    step: Step, machine: Machine, budget: Budget, label: str, policy: Policy, limit: float
) -> tuple[Plan | None, Row]:
    row = Row(step.name, machine.name, budget.bytes, label, False, cost=step.cost)
    start = time.perf_counter()
    try:
        with _stopped_after(limit, label) as stopped:
            plan = make_plan(step, policy, budget, machine, inner="eager", fit=False)
    except MemplanError as error:
        seconds = time.perf_counter() - start
        return None, dataclasses.replace(row, seconds=seconds, note=str(error).partition("\n")[0])
    note = f"{stopped[0]}: its best so far" if stopped else ""
    return plan, dataclasses.replace(row, seconds=time.perf_counter() - start, note=note)


def _judged(row: Row, plan: Plan | None, least: Bound, best: dict[str, Plan]) -> Row:
    """The row of the best plan that the policy has made for this budget or a smaller one."""
    known = best.get(row.policy)
    if known is not None and (plan is None or not plan.fits or known.overhead < plan.overhead):
        note = f"the plan for {human(known.budget.bytes)}" + (f"; {row.note}" if row.note else "")
        plan, row = known, dataclasses.replace(row, note=note)
    if plan is None:
        return row
    fits = plan.fits or plan is known
    if fits:
        best[row.policy] = plan
    gap = (plan.timeline.seconds - least.seconds) / plan.base_seconds if plan.base_seconds and fits else math.inf
    return dataclasses.replace(
        row, fits=fits, peak=plan.peak, away=plan.timeline.host_peak, overhead=plan.overhead, gap=gap
    )


@contextmanager
def _stopped_after(seconds: float, policy: str) -> Iterator[list[str]]:
    """Raises Stopped in the block when it takes longer, and again after each such time; what it then says is in the
    list. In the main thread of a process; elsewhere nothing is stopped.
    """
    said = list[str]()
    if seconds == math.inf:
        yield said
        return

    def stop(*_: object) -> None:
        said.append(f"policy {policy!r} took longer than {seconds:g} seconds and was stopped")
        raise Stopped(said[0])

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, AGAIN))
    try:
        yield said
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
