"""Compile with Inductor inside the budget: plan, generate code, read what it allocates, plan again if it is over.

In: a Dynamo graph and a Partitioner. Out: Inductor's callable, whose generated code was seen to fit.
Before any of it runs, forward and backward are generated and run on ghosts (wrapper.py), so the reported
timeline is that of the code itself. Where it is over the budget the plan is made again for a budget scaled
by the ratio of what was wanted to what was generated, at most ROUNDS times; then the smallest plan is tried.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch._inductor.graph import GraphLowering

from memplan.errors import MemplanError
from memplan.ir import Block, Budget, Held, Kind, Moment, Plan, Timeline
from memplan.passes import kernel_order, workspaces
from memplan.passes.calls import Sizes, copied
from memplan.passes.dispatch import Compiled
from memplan.passes.partition import Partitioner, SizesGiven
from memplan.passes.phases import has_backward
from memplan.passes.pipeline import does_not_fit
from memplan.passes.simulate import base, followed
from memplan.passes.wrapper import Tape, ghost, run_wrapper
from memplan.runtime.failing import Failed, watched

ROUNDS = 3
MARGIN = 0.99  # each new plan aims this much lower, so that rounds do not creep up on the budget


@functools.cache
def _sources() -> str:
    """A digest of memplan's passes: code that others of them generated is not to be found in a cache."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(folder.rglob("*.py")))).hexdigest()


class _Recorded(CustomPartitionerFn):
    """The partitioner as Inductor wants it; keeps the plan and the inputs that each generated graph will get."""

    def __init__(self, partitioner: Partitioner) -> None:
        self.plans: list[Plan] = []
        self.partitioner = replace(partitioner, on_plan=lambda plan, _: self.plans.append(plan), fit=False)
        self.inputs: list[list[Any]] = []
        self.sources: list[str] = []  # generated for this graph; planning generates code too, for slices
        self.num_fwd_outputs = 0

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        halves = self.partitioner(gm, joint_inputs, **kwargs)
        self.sources.clear()
        self.num_fwd_outputs = kwargs["num_fwd_outputs"]
        self.inputs = [[n.meta.get("val") for n in h.graph.find_nodes(op="placeholder")] for h in halves]
        return halves

    def __deepcopy__(self, _memo: Any) -> _Recorded:
        """Inductor copies its config to make a cache key; a record of one compile has no copies."""
        return self

    def uuid(self) -> str:
        """Code is cached by the planned graphs themselves, and by the memplan that had a hand in generating it."""
        return f"memplan {_sources()}"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Inductor pickles its config into that key too."""
        return str, (self.uuid(),)


class _Whole(CustomGraphPass):
    """The planning of a graph with its backward inside, as Inductor wants it. It comes after Inductor has given random
    numbers seeds, so that what runs again draws the same.
    """

    def __init__(self, recorded: _Recorded) -> None:
        self.recorded = recorded

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        planned = bool(self.recorded.plans)  # then this is a part of it that Inductor looks at alone
        if module is not None and not planned and has_backward(module):
            self.recorded.partitioner.whole(module)
            self.recorded.sources.clear()
            self.recorded.inputs = [[n.meta.get("val") for n in module.graph.find_nodes(op="placeholder")]]

    def __deepcopy__(self, _memo: Any) -> _Whole:
        return self

    def uuid(self) -> str:
        return self.recorded.uuid()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.uuid(),)


def compile_inductor(
    graph: fx.GraphModule, example_inputs: Sequence[Any], partitioner: Partitioner, config: dict[str, Any]
) -> Compiled:
    """Inductor's callable and its plan. Raises DoesNotFit when no plan's generated code is inside the budget."""
    budget = partitioner.budget
    wanted = budget.available
    tried: list[Plan] = []
    # (the smallest plan, in Inductor's order): that order suits its fusions better now and then, so it is tried last.
    rounds = [(False, False)] * (0 if partitioner.smallest else ROUNDS) + [(True, False), (True, True)]
    while rounds:
        smallest, reorder = rounds.pop(0)
        target = replace(partitioner, budget=budget.leaving(wanted), smallest=smallest)
        compiled, predicted = _compile(graph, example_inputs, target, config, reorder=reorder)
        notes = (f"planned {len(tried) + 1} times until the generated code fitted",) if tried else ()
        compiled = compiled.changed(functools.partial(_inside, budget=budget, notes=notes))
        plan = compiled.plan
        if plan is None or plan.fits or not partitioner.fit:  # None: nothing to plan, a graph without a backward
            return compiled
        tried.append(plan)
        if predicted > wanted:  # the policy has nothing smaller
            rounds = rounds[-1:]
        base = plan.step.base_bytes
        wanted = base + int((predicted - base) * (budget.available - base) / max(1, plan.peak - base) * MARGIN)
    raise does_not_fit(tried[0], min(tried, key=lambda p: p.peak))


def _inside(plan: Plan, budget: Budget, notes: tuple[str, ...]) -> Plan:
    """A plan is made for less than the budget; what it is judged by is the budget itself."""
    return replace(plan, budget=budget, notes=plan.notes + notes)


def _compile(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    partitioner: Partitioner,
    config: dict[str, Any],
    *,
    reorder: bool,
) -> tuple[Compiled, int]:
    """The callable, its plan with the generated code's timeline, and the peak that was predicted before."""
    recorded = _Recorded(partitioner)
    # Without `reorder` ops stay in the plan's order: Inductor's own knows nothing of recomputation just in time.
    # And of graphs with a backward inside it would move gradients of weights to where they are added up.
    # A buffer that is to be used again would be held until then. A kernel's output may still take its input's place.
    patches = {"reorder_for_peak_memory": reorder, "reorder_for_locality": False, "allow_buffer_reuse": False} | config
    patches |= {"custom_partitioner_fn": recorded, "joint_custom_post_pass": _Whole(recorded)}
    with (
        mock.patch.object(GraphLowering, "save_output_code", recorded.sources.append),
        kernel_order.kept(),
        # AOTAutograd's own cache would skip the partitioner: no plan, and no check of what is generated.
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
    ):
        try:
            watching = _watching(partitioner.failed)
            run: Any = compile_fx(copied(graph), list(example_inputs), inner_compile=watching, config_patches=patches)
        except torch._inductor.exc.InvalidCxxCompiler as e:
            raise MemplanError(
                "inner='inductor' generates C++ on the CPU, and no C++ compiler was found: install g++ or clang++, "
                "or pass inner='eager'"
            ) from e
    if not recorded.plans:
        return Compiled(run), 0
    plan = recorded.plans[-1]

    def resized(sizes: SizesGiven, held: Held) -> Plan:
        known = dict(plan.step.sizes)
        step = replace(plan.step.at(**{s: n for s, n in sizes if s in known}), held=held)
        return _generated(replace(plan, step=step), recorded, Sizes(sizes))

    return Compiled(run, resized(partitioner.sizes, partitioner.held), resized), plan.peak


def _watching(failed: Failed) -> Callable[..., Any]:
    """Inductor's compiler of one graph, of whose errors `failed` hears. AOTAutograd's cache, off here, skips it."""

    def compile_one(*args: Any, **kwargs: Any) -> Any:
        made: Any = compile_fx_inner(*args, **kwargs)
        if getattr(made, "current_callable", None) is not None:
            phase = "backward" if kwargs.get("is_backward") else "" if kwargs.get("is_inference") else "forward"
            made.current_callable = watched(made.current_callable, phase, failed)
        return made

    return compile_one


def _generated(plan: Plan, recorded: _Recorded, sizes: Sizes) -> Plan:
    """The plan with the timeline of the generated forward and backward, one after the other, and its marks there."""
    tape = Tape()
    inputs = sizes.concrete(recorded.inputs)
    if len(inputs) == 1:  # with its backward inside
        outputs = run_wrapper(recorded.sources[0], tape, [ghost(tape, v, None) for v in inputs[0]])
        end = tape.tick()
        timeline = _timeline(plan, tape, end, end, set(), recorded.partitioner.known)
        del outputs
        return replace(plan, timeline=timeline, marks=tuple(tape.marks))
    forward_inputs, backward_inputs = inputs
    results = run_wrapper(recorded.sources[0], tape, [ghost(tape, v, None) for v in forward_inputs])
    split = tape.tick()
    outputs, saved = results[: recorded.num_fwd_outputs], results[recorded.num_fwd_outputs :]
    symbols = [s for s in saved if not hasattr(s, "buffer")]
    args = symbols + [s for s in saved if hasattr(s, "buffer")]
    tangents = [ghost(tape, v, "tangent") for v in backward_inputs[len(args) :]]  # autograd holds them to the end
    args += tangents
    del results, saved
    gradients = run_wrapper(recorded.sources[1], tape, args)
    end = tape.tick()
    kept = {g.buffer.id for g in gradients if getattr(g, "buffer", None)}
    timeline = _timeline(plan, tape, split, end, kept, recorded.partitioner.known)
    del outputs, gradients, tangents
    return replace(plan, timeline=timeline, marks=tuple(tape.marks))


def _timeline(plan: Plan, tape: Tape, split: int, end: int, gradients: set[int], known: workspaces.Known) -> Timeline:
    blocks, host = list[Block](), list[Block]()
    for i, (start, size, name) in enumerate(tape.allocated):
        stop = tape.freed.get(i, end)
        if i in tape.away:
            host.append(Block(name, size, "activation", start, min(stop, end), tape.away[i]))
            continue
        kind: Kind = "gradient" if i in gradients else "activation" if start < split < stop else "temporary"
        blocks.append(Block(name, size, kind, start, min(stop, end), "keep" if start < split < stop else ""))
    inside = workspaces.measure([call for _, call in tape.calls], known)
    for (at, call), size in zip(tape.calls, inside, strict=True):
        if size:
            blocks.append(Block(f"{call.target} workspace", size, "temporary", at, at + 1))
    moments = tuple(
        Moment(f"event {i}", plan.timeline.seconds * i / end, "forward" if i < split else "backward")
        for i in range(end)
    )
    made = replace(plan.timeline, moments=moments, blocks=tuple(blocks), base=base(plan.step), host=tuple(host))
    return followed(made, plan.step.held)
