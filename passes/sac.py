"""memplan's policies and those of torch's selective activation checkpointing, each as the other.

    options={"policy": memplan.from_sac(policy_fn)}                              torch's, in memplan
    checkpoint(step, batch, use_reentrant=False, context_fn=memplan.to_sac(plan))  memplan's, in torch

torch asks a policy function op by op, while forward runs; memplan asks it once for each op of the traced forward,
without arguments. In the other direction a plan answers by op and count: the third aten.mm of the region is the plan's
third. In-place ops, and computations made twice, which tracing changes, are counted as torch runs them: such an op may
get the answer of another of its kind. Gradients never depend on it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from memplan.ir import Budget, Decision, Decisions, Keep, Machine, Plan, Recompute, Step
from memplan.passes.policies.offload import away, oldest_first


@dataclass(frozen=True)
class FromSAC:
    """`function`: (ctx, op, *args, **kwargs) -> CheckpointPolicy, or whether to save. It is given no arguments."""

    function: Callable[..., Any]
    name: str = "sac"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        context = SelectiveCheckpointContext(is_recompute=False)
        said: dict[int, str] = {}
        for op in step.forward.ops:
            answer = self.function(context, overload(op.target))
            word = answer.name if isinstance(answer, CheckpointPolicy) else "MUST_SAVE" if answer else "RECOMPUTE"
            # As in torch: what must not run twice is saved, whatever is said.
            said |= dict.fromkeys(op.outputs, "MUST_SAVE" if op.fixed and "RECOMPUTE" in word else word)
        out: dict[int, Decision] = {t: Recompute() for t in step.saveable if "RECOMPUTE" in said.get(t, "")}
        out |= {t: Keep() for t in step.saveable if "SAVE" in said.get(t, "")}
        moved = {t for t in step.read_in_backward if "OFFLOAD" in said.get(t, "")}  # from torch 2.13 on
        saved = moved | {t for t, d in out.items() if isinstance(d, Keep)}
        out |= dict.fromkeys(moved, Keep())
        return out | away(step, saved, oldest_first(step, moved), budget, machine, small=0)


def from_sac(function: Callable[..., Any]) -> FromSAC:
    """A policy function of torch's selective activation checkpointing, as a policy of memplan."""
    return FromSAC(function)


def to_sac(plan: Plan) -> Callable[[], Any]:
    """What a plan saves, as the context_fn of torch.utils.checkpoint.checkpoint for the whole step. What it offloads is
    saved: eager torch does not offload.
    """
    saves: dict[str, list[bool]] = defaultdict(list)
    for op in plan.step.forward.ops:
        saves[op.target].append(not plan.saved.isdisjoint(op.outputs))

    def contexts() -> Any:
        seen = Counter[str]()

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if ctx.is_recompute:
                return CheckpointPolicy.PREFER_RECOMPUTE  # torch remembers what it was told in forward
            name = str(op)
            k, answers = seen[name], saves.get(name, [])
            seen[name] += 1
            save = k < len(answers) and answers[k]
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]

    return contexts


def overload(target: str) -> Any:
    """torch's op of that name; the name itself for what is none of its ops."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part, None)
        if found is None:
            return target
    return found
