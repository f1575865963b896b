"""Every difference between the torch versions that memplan supports (2.11 to 2.13), in one place."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch
import torch._inductor.config
import torch.utils._pytree as pytree
from torch import fx
from torch._functorch import partitioners
from torch._guards import detect_fake_mode

UNKNOWN_SIZE = 8192  # what a size that depends on data is taken to be when nothing bounds it


def symbol_value(size: torch.SymInt, symbol: Any) -> int:
    """The value that one symbol of a size had when the graph was traced; of one that depends on data, its bound."""
    environment = size.node.shape_env
    values = environment.backed_var_to_val if hasattr(environment, "backed_var_to_val") else environment.var_to_val
    if symbol in values:
        return int(values[symbol])
    bound = environment.var_to_range[symbol].upper if symbol in environment.var_to_range else None
    return int(bound) if bound is not None and bound.is_integer and bound < sys.maxsize else UNKNOWN_SIZE


def dimension(size: torch.SymInt) -> int:
    """The dimension of an input that the size symbol was made for; -1 if it is something else."""
    environment, expression = size.node.shape_env, size.node.expr
    sources = getattr(environment, "var_to_sources", None) or environment.source_to_var
    found = sources.get(expression, ()) if isinstance(sources, dict) else ()
    index = getattr(found[0], "idx", None) if found else None
    return -1 if index is None else int(index)


def resumed_at() -> str:
    """Where the graph break was after which Dynamo resumed with this graph: "step, line 12"; empty: at none."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        name = InstructionTranslator.current_tx().f_code.co_name
    except AttributeError:  # not called from Dynamo
        return ""
    found = re.match(r"torch_dynamo_resume_in_(.+)_at_(\d+)$", name)
    return f"{found[1]}, line {found[2]}" if found else ""


def compile_call() -> Any:
    """What stands for one torch.compile call while it calls a backend, the same for all its graphs; None: not there."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_back is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__name__ == "_TorchCompileWrapper":
            return owner
        frame = frame.f_back
    return None


def nested() -> bool:
    """Whether Dynamo compiles a frame that code outside of torch has called since the compiled function was entered:
    then it is a part of what was asked for.
    """
    frame, in_dynamo, inside = sys._getframe(1), True, os.path.dirname(torch.__file__)
    while frame is not None and frame.f_back is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.startswith(inside):
            return False
        if not in_dynamo and not code.co_filename.startswith(inside):
            return True
        if in_dynamo and type(frame.f_locals.get("self")).__name__ == "CatchErrorsWrapper":
            in_dynamo = False
        frame = frame.f_back
    return False


def argument_index(description: Any) -> int:
    """Which argument of the compiled function AOTAutograd's description of an input is of; -1: none."""
    return description.idx if type(description).__name__ == "PlainAOTInput" else -1


def result_index(description: Any) -> int:
    """Which result of the compiled function AOTAutograd's description of an output is of; -1: none."""
    if type(description).__name__ == "IntermediateBaseAOTOutput":  # a result that is a view is made from it
        description = description.base_of
    return description.idx if type(description).__name__ == "PlainAOTOutput" else -1


def drop_dead_code(graph: fx.Graph) -> None:
    """Remove what nothing reads and has no effect; to draw random numbers is one, on the next draw."""
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=True))


def random_draws_stay() -> contextlib.AbstractContextManager[Any]:
    """While it is open, torch's partitioner helpers keep random ops that nothing reads, as drop_dead_code does."""
    patch: contextlib.AbstractContextManager[Any] = torch._inductor.config.patch(fallback_random=True)
    return patch  # where Graph.eliminate_dead_code looks


def broken_at(graph: fx.GraphModule) -> str:
    """The graph break that ended a Dynamo graph: "train.py:12 in loss (call to print)"; empty: it was not broken."""
    why = getattr(graph, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return ""
    frame = why.user_stack[-1] if why.user_stack else None
    place = f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name} " if frame else ""
    return f"{place}({(why.reason.splitlines() or [''])[0]})"


def extract(
    joint: fx.GraphModule, saved: Sequence[fx.Node], symbols: list[fx.Node], num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's split of a joint graph into forward and backward; `symbols` becomes the size symbols it saved."""
    more: dict[str, Any] = {}
    if "saved_opaque_nodes" in inspect.signature(partitioners._extract_fwd_bwd_modules).parameters:
        more["saved_opaque_nodes"] = []
    with random_draws_stay():
        return partitioners._extract_fwd_bwd_modules(
            joint, list(saved), symbols, num_fwd_outputs=num_fwd_outputs, **more
        )


def _mapped(node: fx.Node, made: Mapping[fx.Node, fx.Node]) -> tuple[Any, Any]:
    """Target with arguments, and keywords, of the same call in another graph."""
    everything: Any = (node.target, *node.args), dict(node.kwargs)
    return pytree.tree_map_only(fx.Node, lambda n: made[n], everything)  # type: ignore[no-any-return]


def save_random(graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
    """A copy of a random op, in `graph`, that saves the generator's state first: (its result, the state)."""
    given, kwargs = _mapped(node, made)
    both = graph.call_function(torch._prims.rng_prims.run_and_save_rng_state, given, kwargs)
    state = graph.call_function(getitem, (both, 0))
    result = graph.call_function(getitem, (both, 1))
    result.meta = dict(node.meta)
    value = node.meta["val"]
    size = torch.get_rng_state().numel()
    with detect_fake_mode(value) or contextlib.nullcontext():
        state.meta["val"] = torch.empty(size, dtype=torch.uint8)
    both.meta = dict(node.meta) | {"val": (state.meta["val"], value)}
    return result, state


def replay_random(graph: fx.Graph, node: fx.Node, state: fx.Node, made: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a random op, in `graph`, that starts from a saved state and puts the generator back."""
    given, kwargs = _mapped(node, made)
    new = graph.call_function(torch._prims.rng_prims.run_with_rng_state, (state, *given), kwargs)
    new.meta = dict(node.meta)
    return new
