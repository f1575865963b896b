"""What torch's own partitioner would save, recorded in the Step so that policies need no torch.

In: a prepared joint graph and its Step. Out: (policy name, saved storages) for torch's min-cut and for its
activation_memory_budget at the ratios that TorchBudget offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch import partitioners

from memplan.ir import Step
from memplan.passes.capture import storage_keys
from memplan.passes.policies import Policy, builtin, find
from memplan.passes.policies.torch_saved import TorchBudget, TorchMinCut


def saved_sets(
    joint: fx.GraphModule, step: Step, num_fwd_outputs: int, parameters: Sequence[int], wanted: str | Policy
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The saved set of `wanted` if it is a torch policy, of all of them if it is "torch"."""
    chosen = builtin().values() if wanted == "torch" else [find(wanted)]
    ratios = {p.name: getattr(p, "ratio", 1.0) for p in chosen if isinstance(p, (TorchMinCut, TorchBudget))}
    if not ratios:
        return ()
    info = partitioners.classify_nodes(joint, list(parameters), num_fwd_outputs)
    _distances(joint, info)
    storage = _storages(step, joint)
    out = []
    for name, ratio in ratios.items():
        with torch._functorch.config.patch(activation_memory_budget=ratio):
            nodes = partitioners.choose_saved_values_set(joint.graph, info, memory_budget=ratio)
        found = {storage[n] for n in nodes if n in storage}
        out.append((name, tuple(sorted(found & step.saveable))))
    return tuple(out)


def _distances(joint: fx.GraphModule, info: partitioners.NodeInfo) -> None:
    """The distance to backward that torch's heuristics read from each node."""
    far = int(1e9)
    for node in reversed(joint.graph.nodes):
        if node.op == "output":
            node.dist_from_bw = far
        elif not info.is_required_fw(node):
            node.dist_from_bw = 0
        else:
            node.dist_from_bw = min([far, *(user.dist_from_bw + 1 for user in node.users)])


def _storages(step: Step, joint: fx.GraphModule) -> dict[fx.Node, int]:
    """node -> the storage it shows, views included."""
    by_name = {tensor.name: t for t, tensor in enumerate(step.tensors)}
    by_key: dict[Any, int] = {}
    for node in joint.graph.nodes:
        for key in storage_keys(node)[:1]:
            if node.name in by_name:
                by_key.setdefault(key, by_name[node.name])
    return {node: by_key[keys[0]] for node in joint.graph.nodes if (keys := storage_keys(node)) and keys[0] in by_key}
