"""For authors of policies: is it a policy, on every kind of step?

In: a policy. Out: the Ranking of its plans, or a MemplanError that says what it does wrong, and where. Torch-free.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from memplan import steps
from memplan.errors import MemplanError
from memplan.ir import Budget, Machine, Step
from memplan.machines import machine
from memplan.passes import policies
from memplan.passes.pipeline import evaluate
from memplan.passes.policies import Policy, name_of
from memplan.ranking import rank
from memplan.report import Ranking

HOST = 64 * 10**9
BUDGETS = (4 * 10**9, 8 * 10**9, 16 * 10**9)
ASKED = ("llama8b_layers_4k_v32000", "unet_256")  # a chain of layers, and skips; all recorded ones would take minutes
RANKED = ASKED[0]


def check_policy(policy: str | Policy, *, limit: float = 60.0) -> Ranking:
    """Ask the policy about recorded steps, as they are and as Inductor would fuse them, with and without a host, at
    budgets from ample to impossible.

    Raises MemplanError if it is not a value (policies are compared, and equal ones compile once), if it decides
    differently when it is asked twice, if what it returns makes no valid plan, or if it takes longer than `limit`
    seconds for one plan. That it does not fit a budget is no error: the ranking that is returned says so.
    """
    found, name = policies.find(policy), name_of(policy)
    _is_a_value(found, name)
    target = machine("h100")
    for step, budget in _cases():
        _decides_alike(found, name, step, budget, target)
    every = {step.name: step for step, _ in _cases() if step.name.startswith(RANKED)}
    ranking = rank(every, [target], [policy], BUDGETS, host_bytes=HOST, limit=limit)
    for row in ranking.rows:
        if row.note and not row.note.startswith("the plan for"):
            raise MemplanError(f"{row.note}; it was asked about {row.step}")
    return ranking


def _cases() -> Iterator[tuple[Step, Budget]]:
    recorded = [steps.load(name) for name in ASKED]
    fused = [dataclasses.replace(step, name=f"{step.name}, fused", fused=True) for step in recorded]
    for step, host in (*itertools.product(recorded, (0, HOST)), *((step, HOST) for step in fused)):
        yield step, Budget(BUDGETS[1], host_bytes=host)
    yield recorded[0], Budget(1)  # nothing fits: a policy returns the best it has all the same


def _is_a_value(policy: Policy, name: str) -> None:
    try:
        hash(policy)
    except TypeError as e:
        raise MemplanError(
            f"policy {name!r} is not a value ({e}): make it a @dataclass(frozen=True), with tuples for lists, or a "
            "function"
        ) from None


def _decides_alike(policy: Policy, name: str, step: Step, budget: Budget, target: Machine) -> None:
    first, second = (policy(step, budget, target) for _ in range(2))
    if first != second:
        differ = [t for t in {*first, *second} if first.get(t) != second.get(t)]
        shown = step.tensors[differ[0]].name if isinstance(differ[0], int) else differ[0]
        raise MemplanError(
            f"policy {name!r} decides differently when it is asked twice about {step.name}: on {shown!r} and "
            f"{len(differ) - 1} more; draw no random numbers, and look at no clock"
        )
    evaluate(step, first, budget, target, "eager", name)  # raises if that is no plan
