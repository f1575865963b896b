"""A joint FX graph -> a Step.

In: the forward and backward of a train step in one functional graph, with fake values on its nodes (what
AOTAutograd hands to a partitioner). Out: ir.Step, whose ops and storages are named after the nodes.
What must hold: one Tensor per storage, so views are neither ops nor bytes; an op is forward if the forward
outputs need it, else backward, in the graph's order. `capture`, `lifetimes` of storages, `costs` and
`workspaces` are all that read FX; nothing here changes the graph except `prepare`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import getitem
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import classify_nodes
from torch.multiprocessing.reductions import StorageWeakRef

from memplan.ir import Graph, Kind, Op, Phase, Polynomial, Ports, Step, Tensor
from memplan.passes import costs, one_hot
from memplan.passes.calls import Call, Sizes, has_effects, name, tensors, view_base
from memplan.passes.compat import argument_index, drop_dead_code, random_draws_stay, result_index, symbol_value
from memplan.passes.phases import is_backward, phases, unplanned
from memplan.passes.workspaces import Inside
from memplan.runtime.streamed import FETCH

LAYER = "memplan_layer"  # where trace.py notes a node's module path, when Dynamo is not there to do it
LARGE_MASK = 2**24  # bytes from which a T x T mask is worth a note
RNG_STATE_BYTES = {"cpu": 5056, "cuda": 16}  # torch.get_rng_state().numel() on each device


def prepare(joint: fx.GraphModule) -> None:
    """Remove dead code, checks of metadata that tracing has already made, and computations made twice."""
    one_hot.rewrite(joint)
    for node in list(joint.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            joint.graph.erase_node(node)
    for k, node in enumerate(joint.graph.find_nodes(op="call_function", target=FETCH)):
        node.args = (*node.args[:2], k)  # each brings the parameter in for itself, or one copy would stay in between
    drop_dead_code(joint.graph)
    joint.graph = fx_graph_cse(joint.graph)
    joint.recompile()


def capture(
    joint: fx.GraphModule,
    *,
    num_fwd_outputs: int,
    parameters: Collection[int],
    mutated: Collection[int] = (),
    names: Sequence[str] = (),
    workspaces: Callable[[Sequence[Call]], Sequence[Inside]] = lambda calls: [Inside(0)] * len(calls),
    fused: bool = False,
    title: str = "step",
    sizes: tuple[tuple[str, int], ...] = (),
) -> Step:
    """The Step of a prepared joint graph.

    `parameters` and `mutated` index the primal inputs: those that stay for good, and those that forward writes
    to. `names` are people's names for the primals. `workspaces` gives the memory inside each op. `sizes` are values
    for size symbols, in the place of those that the graph was traced with.
    """
    with random_draws_stay():
        in_forward = classify_nodes(joint, list(parameters), num_fwd_outputs).required_fw_nodes
    outputs: Any = joint.graph.output_node().args[0]
    graphs = [
        _Part("forward", "forward", 0, in_forward, outputs[:num_fwd_outputs]),
        _Part("backward", "backward", 0, None, outputs[num_fwd_outputs:]),
    ]
    reader = _Reader(joint, graphs, parameters, mutated, names, fused, Sizes(sizes))
    reader.read(workspaces)
    return reader.step(title)


def capture_whole(
    graph: fx.GraphModule,
    *,
    parameters: Collection[int] = (),
    names: Sequence[str] = (),
    workspaces: Callable[[Sequence[Call]], Sequence[Inside]] = lambda calls: [Inside(0)] * len(calls),
    fused: bool = False,
    title: str = "step",
    sizes: tuple[tuple[str, int], ...] = (),
) -> Step:
    """The Step of one graph with the backward of its loss, or of several, inside. Its ops stay in their order.

    What the graph writes to its inputs counts as written at the end, unless a backward follows.
    """
    outputs: Any = graph.graph.output_node().args[0]
    graphs = [_Part(*part, outputs) for part in phases(graph)]
    last = {n: i for i, n in enumerate(graph.graph.nodes)}
    late = max(i for n, i in last.items() if is_backward(n))
    early_writes = [n for n in _writes(graph) if last[n] < late]  # the others come when all else has been read
    reader = _Reader(graph, graphs, parameters, (), names, fused, Sizes(sizes), early_writes)
    reader.read(workspaces)
    return _with_unplanned_forwards(reader.step(title), graph)


def _with_unplanned_forwards(step: Step, graph: fx.GraphModule) -> Step:
    """The step with a note on the arithmetic of forwards that are among the ops of a backward."""
    between = {n.name for n in unplanned(graph)}
    found = [op for op in step.backward.ops if op.flops > op.traffic and op.name in between]
    if not found:
        return step
    note = (
        f"{len(found)} products of a forward, the first at {found[0].source or 'an unknown line'}, read parameters "
        "that the same graph has updated: that forward is not planned; compile one update per graph"
    )
    return dataclasses.replace(step, notes=(*step.notes, note))


def _writes(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.target is torch.ops.aten.copy_.default]


class _Part(NamedTuple):
    """What becomes one Graph. `nodes`: its nodes, None: those that no other has."""

    name: str
    phase: Phase
    unit: int
    nodes: Collection[fx.Node] | None
    outputs: Sequence[Any]


class _Reader:
    """One pass over the nodes, collecting storages and ops."""

    def __init__(
        self,
        joint: fx.GraphModule,
        parts: Sequence[_Part],
        parameters: Collection[int],
        mutated: Collection[int],
        names: Sequence[str],
        fused: bool,
        sizes: Sizes,
        writes: Sequence[fx.Node] | None = None,
    ) -> None:
        self.whole = writes is not None
        self.sizes = sizes
        self.nodes = list(joint.graph.nodes)
        self.parts = parts
        self.writes = _writes(joint) if writes is None else writes
        self.primals = [n for n in self.nodes if n.op == "placeholder" and not n.name.startswith("tangents")]
        self.parameters, self.mutated, self.names, self.fused = parameters, mutated, names, fused
        self.tensors: list[Tensor] = []
        self.storage_of: dict[Any, int] = {}  # identity of a fake storage -> index in tensors
        self.of_node: dict[fx.Node, tuple[int, ...]] = {}
        self.ops: list[list[Op]] = [[] for _ in parts]
        self.resident: list[int] = []
        self.tangents: list[int] = []
        self.symbols: dict[str, int] = {}

    def read(self, workspaces: Callable[[Sequence[Call]], Sequence[Inside]]) -> None:
        inputs = {node: i for i, node in enumerate(self.primals)}
        made: dict[fx.Node, tuple[int, ...]] = {}
        for node in self.nodes:
            before = len(self.tensors)
            if node.op == "placeholder":
                is_primal = node in inputs
                kind: Kind = "parameter" if inputs.get(node) in self.parameters else "input"
                label = self.names[inputs[node]] if is_primal and len(self.names) == len(inputs) else ""
                self._storages(node, node.meta.get("val"), kind, label)
                (self.resident if is_primal else self.tangents).extend(range(before, len(self.tensors)))
            elif node.op == "get_attr":
                self._storages(node, node.meta.get("val"), "parameter")
                self.resident.extend(range(before, len(self.tensors)))
            elif node.op == "call_function" and node.target is not getitem:
                self._storages(node, node.meta.get("val"), "activation")
                made[node] = tuple(range(before, len(self.tensors)))
            elif node.op == "call_function":
                self.of_node[node] = self._known(node.meta.get("val"))
        ops = [n for n in made if made[n] or has_effects(n)]
        calls = [self.sizes.call(n) for n in ops]
        changed = [self.primals[i] for i in self.mutated] + self._changed()
        written = {t for node in changed for t in self.of_node[node]}
        for node, call, seen in zip(ops, calls, workspaces(calls), strict=True):
            if not self.fused:  # a compiler that fuses allocates what the result shows
                self._resize(node, made[node], seen.outputs)
            op = self._op(node, call, made[node], seen.workspace, written)
            home = next(k for k, part in enumerate(self.parts) if part.nodes is None or node in part.nodes)
            self.ops[home].append(op)

    def _changed(self) -> list[fx.Node]:
        """Inputs that the graph writes to itself, or returns the new values of, as AOTAutograd describes them."""
        copied = [n.args[0] for n in self.writes]
        by_description = {n.meta.get("desc"): n for n in self.primals}
        described = self.nodes[-1].meta.get("desc") or ()
        returned = [by_description.get(getattr(d, "mutated_input", None)) for d in described]
        return [n for n in [*copied, *returned] if isinstance(n, fx.Node) and n.op == "placeholder"]

    def step(self, title: str) -> Step:
        return Step(
            name=title,
            tensors=tuple(self.tensors),
            graphs=tuple(self._graph(part, tuple(ops)) for part, ops in zip(self.parts, self.ops, strict=True)),
            resident=tuple(self.resident),
            sizes=tuple(sorted(self.symbols.items())),
            fused=self.fused,
            notes=(*self._masks(), *self._estimates()),
            ports=self._ports(),
        )

    def _graph(self, part: _Part, ops: tuple[Op, ...]) -> Graph:
        """A pair gets its inputs from the caller, who holds them. Parts of one graph get theirs from each other."""
        inputs = self.resident if part.phase == "forward" else self.tangents
        outputs = self._outputs(part.outputs)
        if self.whole:
            made = {t for op in ops for t in op.outputs}
            outputs = tuple(t for t in outputs if t in made)
        return Graph(part.name, ops, tuple(inputs), outputs, part.phase, part.unit)

    def _ports(self) -> Ports:
        """Which argument or result of the function each input and output is, as AOTAutograd describes them."""
        returned = self.nodes[-1].args[0]
        described = self.nodes[-1].meta.get("desc") or [None] * len(returned)
        placeholders = [(n.meta.get("desc"), n) for n in self.nodes if n.op == "placeholder"]
        given = {argument_index(d): n for d, n in placeholders}
        tangents = {result_index(getattr(d, "output", None)): n for d, n in placeholders}
        outputs = [(d, n) for d, n in zip(described, returned, strict=True) if isinstance(n, fx.Node)]
        results = {result_index(d): n for d, n in outputs}
        gradients = {argument_index(getattr(d, "grad_of", None)): n for d, n in outputs}
        return Ports(*(self._by_index(found) for found in (given, gradients, results, tangents)))

    def _by_index(self, found: Mapping[int, fx.Node]) -> tuple[int, ...]:
        storages = {i: self.of_node[n][0] for i, n in found.items() if self.of_node.get(n)}
        return tuple(storages.get(i, -1) for i in range(1 + max(storages, default=-1)))

    def _known(self, value: Any) -> tuple[int, ...]:
        keys = map(storage_key, tensors(value))
        return tuple(dict.fromkeys(self.storage_of[k] for k in keys if k in self.storage_of))

    def _storages(self, node: fx.Node, value: Any, kind: Kind, label: str = "") -> None:
        """Give each storage not seen before an entry; a view's storage is that of its base."""
        alias = view_base(node)
        getitems = {n.args[1]: n.name for n in node.users if n.target is getitem}
        many = isinstance(value, (tuple, list))
        found = []
        for k, part in enumerate(value if many else [value]):
            for tensor in tensors(part):
                key = storage_key(tensor)
                if key not in self.storage_of and alias is not None:
                    self.storage_of[key] = self.of_node[alias][0]
                if key not in self.storage_of:
                    self.storage_of[key] = len(self.tensors)
                    name = label or (getitems.get(k, f"{node.name}.{k}") if many else node.name)
                    self.tensors.append(self._tensor(node, name, tensor, kind))
                found.append(self.storage_of[key])
        self.of_node[node] = tuple(dict.fromkeys(found))

    def _resize(self, node: fx.Node, made: Collection[int], sizes: Sequence[int]) -> None:
        """Give the storages that the op makes the sizes that its kernel allocates."""
        for key, size in zip(storage_keys(node), sizes, strict=False):
            t = self.storage_of[key]
            if t in made and self.tensors[t].formula is None:
                known = self.tensors[t]
                self.tensors[t] = dataclasses.replace(known, bytes=size, dense=known.dense and size == known.bytes)

    def _tensor(self, node: fx.Node, name: str, value: torch.Tensor, kind: Kind) -> Tensor:
        size = value.untyped_storage().nbytes()
        if node.op == "placeholder" and _symbols(size) - _symbols(*value.shape, *value.stride()):
            size = _extent(value)  # a view, whose base has sizes of its own that no call tells
        return Tensor(
            name, self.sizes.of(size), kind, tuple(map(self.sizes.of, value.shape)),
            str(value.dtype).removeprefix("torch."), self._formula(size), source_line(node), layer(node),
            dense=self.sizes.of(size) == self.sizes.of(value.numel()) * value.itemsize,
        )  # fmt: skip

    def _formula(self, size: Any) -> Polynomial | None:
        """The size as a polynomial in its symbols, None if it is a number or no polynomial."""
        if not isinstance(size, torch.SymInt):
            return None
        expression = sympy.expand(size.node.expr)
        symbols = sorted(expression.free_symbols, key=str)
        if not symbols or not expression.is_polynomial(*symbols):
            return None
        self.symbols |= {str(s): dict(self.sizes.given).get(str(s)) or symbol_value(size, s) for s in symbols}
        terms = sympy.Poly(expression, *symbols).terms()
        return Polynomial(
            tuple(
                (int(c), tuple((str(s), int(p)) for s, p in zip(symbols, powers, strict=True) if p))
                for powers, c in terms
            )
        )

    def _op(self, node: fx.Node, call: Call, outputs: tuple[int, ...], workspace: int, written: Collection[int]) -> Op:
        inputs = tuple(dict.fromkeys(t for n in node.all_input_nodes for t in self.of_node.get(n, ())))
        seen = tensors((call.args, call.result))
        dtype = next((str(t.dtype).removeprefix("torch.") for t in seen if t.is_floating_point()), "")
        fusion = costs.fusion(call) if self.fused else "extern"
        return Op(
            name=node.name,
            target=str(node.target),
            inputs=inputs,
            outputs=outputs,
            flops=costs.flops(call),
            traffic=costs.traffic(call),
            dtype=dtype,
            fusion=fusion,
            fetches=node.target is FETCH,
            workspace_bytes=workspace if fusion == "extern" else 0,  # what is fused is no longer that op's kernel
            fixed=_fixed(node, inputs, written),
            rng_bytes=_rng_bytes(node, tensors(call.result)),
            source=source_line(node),
            layer=layer(node),
        )

    def _outputs(self, nodes: Sequence[Any]) -> tuple[int, ...]:
        found = (t for n in nodes if isinstance(n, fx.Node) for t in self.of_node.get(n, ()))
        return tuple(t for t in dict.fromkeys(found) if t not in self.resident)

    def _forward(self) -> list[Op]:
        return [op for part, ops in zip(self.parts, self.ops, strict=True) if part.phase == "forward" for op in ops]

    def _estimates(self) -> list[str]:
        """Ops whose memory inside depends on the data."""
        grouped = [op for op in self._forward() if "_grouped_mm" in op.target and op.dtype != "float32"]
        if not grouped:
            return []
        return [
            f"{len(grouped)} grouped products, the first at {grouped[0].source or 'an unknown line'}: the memory "
            "inside depends on which rows go to which group; the most of three ways to group them was assumed"
        ]

    def _masks(self) -> list[str]:
        """Square masks that tracing made real: named, because they can cost more than the step."""
        made = [self.tensors[t] for op in self._forward() for t in op.outputs]
        masks = [t for t in made if t.dtype == "bool" and len(t.shape) > 1 and t.shape[-1] == t.shape[-2]]
        large = sorted((m for m in masks if m.bytes >= LARGE_MASK), key=lambda m: -m.bytes)
        if not large:
            return []
        return [
            f"{len(large)} masks of up to {list(large[0].shape)} and {large[0].bytes / 2**20:.0f} MiB were built, the "
            f"first at {large[0].source or 'an unknown line'}: if attention is causal, is_causal needs none of them"
        ]


def storage_key(tensor: torch.Tensor) -> StorageWeakRef:
    """The identity of the storage behind a tensor."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def storage_keys(node: fx.Node) -> list[StorageWeakRef]:
    """The identity of the storage behind each of a node's results."""
    return [storage_key(t) for t in tensors(node.meta.get("val"))]


def _symbols(*sizes: Any) -> set[sympy.Symbol]:
    return {s for n in sizes if isinstance(n, torch.SymInt) for s in n.node.expr.free_symbols}


def _extent(value: torch.Tensor) -> Any:
    """Bytes from a tensor's first element to its last."""
    last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    return (last + 1) * value.dtype.itemsize


def _fixed(node: fx.Node, inputs: Collection[int], written: Collection[int]) -> str:
    """Why an op must not run twice; empty if it may."""
    target = node.target
    schema = getattr(target, "_schema", None)
    if not isinstance(target, torch._ops.OpOverload):
        return "a higher-order op, whose effects are unknown"
    if schema is not None and schema.is_mutable:
        return "it writes to its inputs"
    if any(t in written for t in inputs):
        return "it reads a buffer that forward changes"
    if target.namespace in ("_c10d_functional", "c10d"):
        return "a collective"
    if name(target) in ("inductor_seeds", "inductor_seed"):
        return "it draws the random seed"
    if any(_unbacked(n) for t in tensors(node.meta.get("val")) for n in t.shape):
        return "its size depends on data"
    return ""


def _unbacked(n: Any) -> bool:
    return isinstance(n, torch.SymInt) and not n.node.has_hint()


def _rng_bytes(node: fx.Node, results: Sequence[torch.Tensor]) -> int:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return 0
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "dropout_p" in names and not given.get("dropout_p", 0.0):
        return 0  # attention is tagged random for its dropout, which is off
    return RNG_STATE_BYTES.get(results[0].device.type if results else "cpu", 16)


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's program that made the node: "modeling.py:210 in forward"."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line, function = frames[-1]
    return f"{os.path.basename(path)}:{line} in {function}"


def layer(node: fx.Node) -> str:
    """The module path: "model.layers.3.mlp"."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return str((node.meta.get("custom") or {}).get(LAYER, ""))
    path = str(list(stack.values())[-1][0])
    return ".".join(p for p in re.findall(r"\w+", path) if p not in ("L", "self", "_modules", "G"))
