"""Policies: (step, budget, machine) -> a Decision for each storage they care about.

In: a Step, a Budget, a Machine. Out: a mapping storage -> Keep() | Recompute() | Offload(); a storage left out is kept
if backward reads it. A policy never touches a graph and never imports torch.
Three ways to bring one: pass the object in options, decorate a function with @memplan.policy("name"), or
publish an entry point in the group "memplan.policies". One file here per built-in policy.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Budget, Decisions, Machine, Step


class Policy(Protocol):
    """What every policy is: a callable value. Make it a frozen dataclass: equal policies then compile once."""

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions: ...


@dataclass(frozen=True)
class FunctionPolicy:
    """A decorated function, as a policy with a name."""

    name: str
    function: Callable[[Step, Budget, Machine], Decisions]

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return self.function(step, budget, machine)


def policy(name: str) -> Callable[[Callable[[Step, Budget, Machine], Decisions]], FunctionPolicy]:
    """Decorator: the function becomes a policy to pass in options={"policy": ...}."""
    return lambda function: FunctionPolicy(name, function)


def builtin() -> dict[str, Policy]:
    """The policies that come with memplan, by name."""
    from memplan.passes.policies.block_checkpoint import BlockCheckpoint, SqrtN
    from memplan.passes.policies.chunked import Chunked
    from memplan.passes.policies.greedy import Greedy
    from memplan.passes.policies.offload import HandBack, OffloadAll, OffloadLayerInputs
    from memplan.passes.policies.optimal import Optimal
    from memplan.passes.policies.save_all import SaveAll
    from memplan.passes.policies.torch_saved import TorchBudget, TorchMinCut

    found: list[Policy] = [Optimal(), Greedy(), SaveAll(), BlockCheckpoint(), SqrtN(), TorchMinCut()]
    found += [OffloadAll(), OffloadAll("disk"), OffloadLayerInputs(), HandBack(), Chunked()]
    found += [TorchBudget(ratio) for ratio in TorchBudget.RATIOS]
    return {name_of(p): p for p in found}


def find(wanted: str | Policy) -> Policy:
    """A policy by name (built in, then entry points), or the object itself. Raises MemplanError for anything else."""
    if callable(wanted):
        return wanted
    if not isinstance(wanted, str):
        raise MemplanError(f"policy {wanted!r} is neither a name nor callable; pass one of {sorted(builtin())}")
    known = builtin()
    if wanted in known:
        return known[wanted]
    if ratio := re.fullmatch(r"torch-budget-(0?\.\d+|[01](?:\.0*)?)", wanted):
        from memplan.passes.policies.torch_saved import TorchBudget

        return TorchBudget(float(ratio[1]))
    published = {e.name: e for e in importlib.metadata.entry_points(group="memplan.policies")}
    if wanted in published:
        loaded = published[wanted].load()
        return find(loaded() if isinstance(loaded, type) else loaded)
    names = sorted([*known, *published])
    raise MemplanError(f"no policy is called {wanted!r}: there are {', '.join(names)}{did_you_mean(wanted, names)}")


def finds_least(policy: Policy) -> bool:
    """Whether what it makes where nothing fits is the smallest plan that it knows."""
    return bool(getattr(policy, "finds_least", False))


def name_of(wanted: str | Policy) -> str:
    """How a policy is called in reports."""
    if isinstance(wanted, str):
        return wanted
    return str(getattr(wanted, "name", None) or getattr(wanted, "__name__", None) or repr(wanted))
