"""Plan -> the forward and backward FX graphs that follow it. Decides nothing.

Before: one joint graph, and a Plan whose Runs name its nodes. After: a forward graph that also returns the
saved storages, and a backward graph that takes them and computes the others again, each in the plan's order.

    joint     a b c d | d' c'          plan: keep b, recompute c
    forward   a b c d -> out, b        backward(b)  c d' c'

What saves a storage is the node that allocates it, never a view; views are replayed where they are used.
A random op that runs twice draws the same numbers: its generator state travels with the saved tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import getitem

from torch import fx
from torch._functorch.partitioners import functionalize_rng_ops
from torch.fx.experimental.proxy_tensor import is_sym_node
from torch.utils.checkpoint import CheckpointPolicy

from memplan.errors import MemplanError
from memplan.ir import Plan, Run, Step
from memplan.passes.compat import extract
from memplan.passes.offload import offload
from memplan.passes.prefetch import prefetch

MOMENT = "memplan_moment"  # in a node's meta: which moment of the plan it is


def split(joint: fx.GraphModule, plan: Plan, num_fwd_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(forward, backward) graph modules."""
    by_name = {node.name: node for node in joint.graph.nodes}
    primals = [n for n in joint.graph.nodes if n.op == "placeholder" and not n.name.startswith("tangents")]
    saved = [n for n in primals if not is_sym_node(n)]
    saved += [by_name[plan.step.tensors[t].name] for t in sorted(plan.saved)]
    symbols = [n for n in joint.graph.nodes if is_sym_node(n) and not _needs_tangents(n)]
    for run in plan.backward:
        node = by_name[plan.step.ops[run.op].name]
        if run.again and plan.step.ops[run.op].rng_bytes:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    forward, backward = extract(joint, saved, symbols, num_fwd_outputs)
    forward.graph = _ordered(forward.graph, _nodes(forward.graph, plan.step, plan.forward, 0))
    backward.graph = _ordered(backward.graph, _nodes(backward.graph, plan.step, plan.backward, len(plan.forward)))
    offload(forward.graph, backward.graph, plan)
    for half in (forward, backward):
        prefetch(half.graph)
    if any(n.meta.get("recompute") for n in joint.graph.nodes) and any(_is_tangent(n) for n in backward.graph.nodes):
        forward, backward = functionalize_rng_ops(joint, forward, backward, len(symbols))
        forward.graph, backward.graph = (_ordered(half.graph, half.graph.nodes) for half in (forward, backward))
    forward.recompile()
    backward.recompile()
    return forward, backward


def _nodes(graph: fx.Graph, step: Step, runs: Sequence[Run], first: int) -> list[fx.Node]:
    """The nodes of one half of torch's split that the plan runs there, in its order, from moment `first` on."""
    by_name = {node.name: node for node in graph.nodes}
    names = [step.ops[run.op].name for run in runs]
    if missing := [name for name in names if name not in by_name]:
        raise MemplanError(f"the plan runs {', '.join(missing)} where torch's split left it out; please report this")
    nodes = [by_name[name] for name in names]
    for moment, node in enumerate(nodes, first):
        node.meta[MOMENT] = moment
    return nodes


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in node.name


def _needs_tangents(node: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            if _is_tangent(n):
                return True
            stack.extend(n.all_input_nodes)
    return False


def _ordered(graph: fx.Graph, order: Iterable[fx.Node]) -> fx.Graph:
    """The graph with just these nodes and the views they need: views just before their use; getitems, and sizes that
    would else hold on to a tensor, just after it.
    """
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()

    def emit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            n = stack[-1]
            missing = [i for i in n.all_input_nodes if i not in env]
            if n in env:
                stack.pop()
            elif missing:
                stack.extend(reversed(missing))
            else:
                env[stack.pop()] = new.node_copy(n, lambda x: env[x])
                for user in n.users:
                    if (
                        (user.target is getitem or is_sym_node(user))
                        and user not in env
                        and user.all_input_nodes == [n]
                    ):
                        env[user] = new.node_copy(user, lambda x: env[x])

    for node in (*graph.find_nodes(op="placeholder"), *order, graph.output_node()):
        emit(node)
    return new
