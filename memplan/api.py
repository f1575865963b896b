"""plan, largest and timeline: look before you run. compile: a whole step, its backward included."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from memplan.ir import Budget, Machine, Plan, Timeline
from memplan.options import Options, read_budget

if TYPE_CHECKING:
    from memplan.passes.largest import Largest
    from memplan.passes.partition import Partitioner


def plan(
    step: Callable[..., Any],
    *batch: Any,
    budget: str | int | float | Budget | None = None,
    machine: str | Machine | None = None,
    policy: Any = "optimal",
    inner: str = "inductor",
    optimizer: Any = None,
    tiles: int | str | Mapping[str, int | str] | None = None,
    host_budget: str | int | float | None = None,
    cost: str | None = None,
) -> Plan:
    """The plan for `step(*batch)` inside `budget`, made on fake tensors.

    step: returns the loss, or calls .backward() on it; its modules may be on any device, "meta" included.
    budget: "24GB", "50%", 0.5, bytes as an int, or what a ledger's budget_for returns; None: the whole machine.
    machine: whose memory and speed to plan for: a name, a machine file of `memplan calibrate`, or a memplan.Machine;
        None: this one, where each op is run alone once, on zeros, to learn the memory inside it. For another machine
        nothing is run at all.
    optimizer: what will update the parameters: "adamw", or a function that makes it from parameters, or itself; None:
        the one that has them by now. Its states count, and what its step takes.
    tiles: the most rows of a slice, for every region that can run in slices; {"lm_head": 256} for those in a module or
        at a source line; {"lm_head": "vocab"} for log-probs by linear_logprob, in this way, "rows", "vectors" or
        "auto"; or "auto" alone: as the fastest plan that fits has it; None: no slices.
    host_budget: what may be off the device in the host's memory at a time, written as a budget is; 0: nothing; None:
        half of this host's free memory, and nothing where device and host share one memory.
    inner: with "inductor" bytes are an estimate until code is generated; with "eager" they are exact.
    cost: what durations are by: "roofline-v1", where each op reads and writes memory, or "fused", where a chain of
        pointwise ops does so once; None: as `inner` runs them.
    Returns memplan.Plan. Raises DoesNotFit, with the smallest budget that fits, and MemplanError for bad input.
    Nothing is left behind: parameters, .grad, buffers, random state and torch's caches are as they were.
    """
    from memplan.passes.bound import with_bound
    from memplan.passes.pipeline import make_plan
    from memplan.passes.reasons import with_reasons
    from memplan.passes.trace import trace

    partitioner, options = _asked(
        budget=budget,
        machine=machine,
        policy=policy,
        inner=inner,
        optimizer=optimizer,
        tiles=tiles,
        host_budget=host_budget,
        cost=cost,
    )
    traced = trace(step, batch, partitioner, options.optimizer)
    made = make_plan(traced, partitioner.policy, partitioner.budget, partitioner.machine, inner=options.inner)
    return with_bound(with_reasons(made)).with_others()


def largest(step: Callable[..., Any], batch: Any, dimension: Literal["tokens", "batch"], **options: Any) -> int:
    """The largest tokens, or batch, for which `step(batch)` fits the budget.

    dimension: "batch" is the first dimension of the batch's tensors, "tokens" the second. The size is that of the first
        tensor that has 2 or more in it; all others of that size change with it, and those whose size the step relates
        to it (tokens - 1).
    options: budget, machine, policy, inner, optimizer, tiles, host_budget and cost, as in memplan.plan.
    Guaranteed: memplan.plan fits at that size, and does not at the next one that the step takes. Peaks may fall by some
    bytes as a size grows, so a still larger one may fit again. What the step takes is what its trace allows: with
    `if tokens > 4096` in it, the sizes of the batch's own branch; with a reshape to blocks of 64, multiples of 64.
    Raises DoesNotFit where the smallest size does not fit, MemplanError with torch's reason where the step takes one
    size alone. Nothing is left behind.
    """
    return find_largest(step, batch, dimension, **options).size


def find_largest(
    step: Callable[..., Any],
    batch: Any,
    dimension: str,
    *,
    tried: Callable[[int], None] = lambda size: None,
    **options: Any,
) -> Largest:
    """The same, with the plans at that size and at the next. `tried` is told of each size before it is planned."""
    from memplan.passes.largest import largest

    partitioner, read = _asked(**options)
    return largest(step, (batch,), dimension, partitioner, read.optimizer, tried)


def _asked(**given: Any) -> tuple[Partitioner, Options]:
    """The options, and a partitioner that plans by them for a machine that need not be there."""
    from memplan.here import this_machine
    from memplan.passes.partition import Partitioner
    from memplan.passes.policies.remembered import remembered

    options = Options.read({k: v for k, v in given.items() if v is not None}, os.environ)
    target = options.machine or this_machine("cpu")
    partitioner = Partitioner(
        policy=remembered(options.policy),
        budget=read_budget(options.budget, target, host=options.host_budget),
        machine=target,
        inner=options.inner,
        on_plan=lambda *_: None,
        measure=options.machine is None,
        tiles=options.tiles,
        cost=options.cost_model,
    )
    return partitioner, options


def compile(
    step: Callable[..., Any],
    *,
    budget: str | int | float | Budget | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """torch.compile(step, backend="memplan") for a step that calls backward itself: loss, backward, optimizer, all.

    budget, options: as in torch.compile(options={...}). fullgraph, dynamic: as in torch.compile; with fullgraph a step
    that would be split is refused, with the line.
    Dynamo traces `.backward()` into the graph (torch._dynamo.config.trace_autograd_ops, set for each call). What it
    cannot trace splits the step: torch.optim's own step, and returning a loss that is not detached. An optimizer
    written with torch._foreach ops stays inside.
    A call raises DoesNotFit and other MemplanErrors as they are, not wrapped by torch.
    """
    import torch

    from memplan.backend import memplan_backend
    from memplan.compiled import Asked, own_errors

    given = {"budget": budget, **options}
    Options.read(given, os.environ)  # what is wrong with them is said here, not at the first call
    own = Asked(memplan_backend)  # equal to no other: Dynamo would run graphs of one step in another's
    compiled = torch.compile(step, backend=own, options=given, fullgraph=fullgraph, dynamic=dynamic)

    @functools.wraps(step if hasattr(step, "__name__") else type(step).__call__)
    def run(*args: Any, **kwargs: Any) -> Any:
        with own_errors(), torch._dynamo.config.patch(trace_autograd_ops=True):
            out = compiled(*args, **kwargs)
        own.refuse_unplanned(f"the step {getattr(run, '__name__', '')}")
        return out

    return run


def timeline(of: Plan | Timeline) -> Timeline:
    """The predicted timeline of a plan; a timeline is returned as it is."""
    return of.timeline if isinstance(of, Plan) else of
