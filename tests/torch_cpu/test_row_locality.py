"""What is said to keep rows apart does: change one row of the seed, and nothing but that row changes. What is said to
sum over rows does: changes of two rows add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from memplan.passes.calls import name, tensors
from memplan.passes.layouts import Axis, Layout, shape_of
from memplan.passes.row_locality import Region, grow
from tests.joint_graphs import joint_of
from tests.models import CASES, Case

aten = torch.ops.aten
B, T, D, V = 2, 5, 4, 6
ROWS = {"B": B, "T": T}


def traced(f: Callable[..., Any], inputs: list[torch.Tensor], symbolic: bool = True) -> fx.GraphModule:
    graph: fx.GraphModule = make_fx(f, tracing_mode="symbolic" if symbolic else "fake")(*inputs)
    return graph


def region_of(graph: fx.GraphModule, dims: tuple[str | None, ...] = ("B", "T", None)) -> Region:
    """Grown from the first input, whose dimensions are these axes."""
    seed = next(iter(graph.graph.find_nodes(op="placeholder")))
    shape = shape_of(seed.meta["val"])
    return grow(seed, tuple((Axis(a, n),) if a else (n,) for a, n in zip(dims, shape, strict=True)))


class Run(fx.Interpreter):
    """All values of a graph, with some given."""

    def __init__(self, graph: fx.GraphModule, given: Mapping[fx.Node, Any]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.given, self.values = given, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder" or n not in self.given:
            self.values[n] = super().run_node(n)  # of a placeholder: it takes the next input
        self.values[n] = self.given.get(n, self.values.get(n))
        return self.values[n]


def values(graph: fx.GraphModule, inputs: list[Any], given: Mapping[fx.Node, Any] = {}) -> dict[fx.Node, Any]:
    torch.manual_seed(0)
    run = Run(graph, given)
    run.run(*inputs)
    return run.values


def at_row(value: torch.Tensor, layout: Layout, row: Mapping[str, int], sizes: Callable[[Any], int]) -> torch.Tensor:
    """Where the elements of one row are, as a mask."""
    factors = [factor for dim in layout for factor in dim]
    mask = torch.ones([sizes(f.size if isinstance(f, Axis) else f) for f in factors], dtype=torch.bool)
    for d, factor in enumerate(factors):
        if isinstance(factor, Axis):
            here = torch.arange(mask.shape[d]) + sizes(factor.start) == row[factor.name]
            mask &= here.view([-1 if k == d else 1 for k in range(len(factors))])
    return mask.reshape(value.shape)


def check(
    graph: fx.GraphModule, inputs: list[Any], region: Region, seed: fx.Node, rows: list[Mapping[str, int]]
) -> None:
    """Both claims, for two rows. Ends and what follows from them alone stay as they were."""
    symbols: dict[Any, int] = {}
    for n, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        fake = n.meta.get("val")
        pairs = zip(shape_of(fake), value.shape, strict=True) if isinstance(value, torch.Tensor) else ()
        symbols |= {size: real for size, real in pairs if size.free_symbols}

    def sizes(size: Any) -> int:
        return int(size.xreplace(symbols))

    before = values(graph, inputs)
    held = {end: before[end] for end in region.ends}
    changed = []
    for chosen in ([rows[0]], [rows[1]], rows):
        seeds = before[seed].clone()
        for row in chosen:
            mask = at_row(seeds, region.keeps[seed], row, sizes)
            seeds[mask] = seeds[mask] * 0.7 + 0.1
        changed.append(values(graph, inputs, held | {seed: seeds}))
    for node, layout in region.keeps.items():
        a, b = tensors(before[node])[0], tensors(changed[0][node])[0]
        others = ~at_row(a, layout, rows[0], sizes)
        assert torch.equal(a[others].nan_to_num(7.0), b[others].nan_to_num(7.0)), node.format_node()
    sums = [node for node, end in region.ends.items() if end.kind == "reduces"]
    for node in sums:
        results = []
        for now in (before, *changed):
            args = fx.map_arg((node.args, node.kwargs), lambda n, now=now: now[n])
            results.append(tensors(node.target(*args[0], **args[1]))[0].double())  # type: ignore[operator]
        a, one, two, both = results
        assert torch.allclose(one + two, a + both, atol=1e-5), node.format_node()


HIDDEN = torch.linspace(-1, 1, B * T * D).sin().view(B, T, D)
LABELS = torch.arange(B * T).view(B, T) % V
HEAD = torch.linspace(-1, 1, V * D).cos().view(V, D)
GAIN = torch.linspace(-1, 1, B)


def logits(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (h.reshape(-1, D) @ w.t()).view(h.shape[0], h.shape[1], -1)


KEEPS: dict[str, Callable[..., torch.Tensor]] = {
    "elementwise, with a number": lambda h, w, y, a: (h * 2).exp().clamp(0, 3),
    "elementwise, with a weight": lambda h, w, y, a: h * w[0],
    "one number for each batch": lambda h, w, y, a: h * a[:, None, None],
    "the rows of another tensor": lambda h, w, y, a: torch.where(y[..., None] > 2, h, -h),
    "cast": lambda h, w, y, a: h.to(torch.bfloat16).float(),
    "norm": lambda h, w, y, a: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5),
    "layer norm": lambda h, w, y, a: F.layer_norm(h, (D,)),
    "product": lambda h, w, y, a: logits(h, w),
    "product with a bias": lambda h, w, y, a: torch.addmm(w[:, 0], h.reshape(-1, D), w.t()),
    "product, rows last": lambda h, w, y, a: w @ h.reshape(-1, D).t(),
    "batched product": lambda h, w, y, a: h @ w.t().expand(B, D, V),
    "softmax": lambda h, w, y, a: logits(h, w).log_softmax(-1),
    "gather": lambda h, w, y, a: logits(h, w).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1),
    "the shift of language models": lambda h, w, y, a: logits(h, w)[:, :-1].gather(-1, y[:, 1:, None]),
    "shift to the other side": lambda h, w, y, a: logits(h, w)[:, 1:].softmax(-1),
    "split in features": lambda h, w, y, a: h.chunk(2, -1)[1].tanh(),
    "one feature put among zeros": lambda h, w, y, a: aten.select_backward(h[..., 1], list(h.shape), 2, 3),
    "one feature put in": lambda h, w, y, a: torch.select_scatter(h, h[..., 1] * 2, -1, 3),
    "joined in features": lambda h, w, y, a: torch.cat([h, h + 1], -1),
    "heads": lambda h, w, y, a: h.view(B, -1, 2, 2).transpose(1, 2).tanh().transpose(1, 2).reshape(B, -1, D),
    "entropy": lambda h, w, y, a: torch.special.entr(logits(h, w).softmax(-1)).sum(-1),
    "top of the features": lambda h, w, y, a: logits(h, w).topk(2, -1).values,
    "sorted features": lambda h, w, y, a: logits(h, w).sort(-1).values,
    "maximum of two": lambda h, w, y, a: torch.max(h, h * 2),
    "rows look up": lambda h, w, y, a: F.embedding((h.sum(-1) > 0).long(), w),
}  # fmt: skip

ENDS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "sum over tokens": ("reduces", lambda h, w, y, a: h.sum(1)),
    "sum of all": ("reduces", lambda h, w, y, a: h.sum()),
    "mean of all": ("reduces", lambda h, w, y, a: h.mean()),
    "gradient of a weight": ("reduces", lambda h, w, y, a: h.reshape(-1, D).t() @ h.reshape(-1, D)),
    "gradient of an embedding": ("reduces", lambda h, w, y, a: aten.embedding_dense_backward(h, y, V, -1, False)),
    "maximum over tokens": ("whole", lambda h, w, y, a: h.amax(1)),
    "softmax over tokens": ("mixes", lambda h, w, y, a: h.softmax(1)),
    "running sum": ("mixes", lambda h, w, y, a: h.cumsum(1)),
    "tokens with tokens": ("mixes", lambda h, w, y, a: h @ h.transpose(1, 2)),
    "attention": ("mixes", lambda h, w, y, a: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])),
    "tokens reversed": ("mixes", lambda h, w, y, a: h.flip(1)),
    "tokens chosen": ("mixes", lambda h, w, y, a: h[:, torch.tensor([0, 0, 1])]),
    "every second token": ("mixes", lambda h, w, y, a: h[:, ::2]),
    "neighbours": ("mixes", lambda h, w, y, a: h[:, 1:] - h[:, :-1]),
    "the last token": ("mixes", lambda h, w, y, a: h[:, -1]),
    "tokens joined": ("mixes", lambda h, w, y, a: torch.cat([h, h], 1)),
    "rows cut up": ("mixes", lambda h, w, y, a: h.reshape(B * 2, -1)),
    "tokens before batch": ("mixes", lambda h, w, y, a: h.transpose(0, 1).reshape(B, -1, D) + h),
    "dropout": ("mixes", lambda h, w, y, a: F.dropout(h, 0.5)),
}  # fmt: skip

INPUTS = [HIDDEN, HEAD, LABELS, GAIN]
PAIR: list[Mapping[str, int]] = [{"B": 1, "T": 2}, {"B": 0, "T": 3}]


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("what", KEEPS)
def test_keeps(what: str, symbolic: bool) -> None:
    if symbolic and what == "heads":
        return  # whether a symbol divides by the number of heads is not known
    graph = traced(KEEPS[what], INPUTS, symbolic)
    region = region_of(graph)
    result = graph.graph.output_node().all_input_nodes[0]
    assert result in region.keeps, region
    check(graph, INPUTS, region, next(iter(graph.graph.nodes)), PAIR)


@pytest.mark.parametrize("symbolic", [True, False])
@pytest.mark.parametrize("what", ENDS)
def test_ends(what: str, symbolic: bool) -> None:
    kind, f = ENDS[what]
    graph = traced(f, INPUTS, symbolic)
    region = region_of(graph)
    assert [end.kind for end in region.ends.values()][:1] == [kind], region
    assert all(end.reason for end in region.ends.values())
    check(graph, INPUTS, region, next(iter(graph.graph.nodes)), PAIR)


def test_batch_alone_goes_further() -> None:
    """Attention over tokens keeps sequences apart."""
    graph = traced(ENDS["attention"][1], INPUTS, symbolic=False)
    region = region_of(graph, ("B", None, None))
    assert not region.ends
    check(graph, INPUTS, region, next(iter(graph.graph.nodes)), [{"B": 0}, {"B": 1}])


def test_one_sequence() -> None:
    """A batch of one, whose axis has no size to tell it by."""
    inputs = [HIDDEN[:1], HEAD, LABELS[:1], GAIN[:1]]
    graph = traced(KEEPS["the shift of language models"], inputs, symbolic=False)
    region = region_of(graph)
    assert graph.graph.output_node().all_input_nodes[0] in region.keeps, region
    check(graph, inputs, region, next(iter(graph.graph.nodes)), [{"B": 0, "T": 2}, {"B": 0, "T": 3}])


def test_turns() -> None:
    """What depends on a sum over rows waits for all of them."""

    def whitened(h: torch.Tensor) -> torch.Tensor:
        x = h.exp()
        return (x - x.mean()) * x

    graph = traced(whitened, [HIDDEN])
    region = region_of(graph)
    by_op = {name(n.target): region.turn[n] for n in region.keeps if n.op == "call_function"}
    assert by_op["exp"] == 0 and by_op["sub"] == by_op["mul"] == 1
    check(graph, [HIDDEN], region, next(iter(graph.graph.nodes)), PAIR)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("case", [c for c in CASES if "net" not in str(c).lower()], ids=str)
def test_the_head_of_real_models(case: Case, inner: str, fresh_dynamo: None) -> None:
    """Between the last hidden states and the gradients of weights, forward and backward, all that is as wide as the
    vocabulary keeps rows apart, or depends on the labels alone.
    """
    sample = case.make()
    graph, inputs = joint_of(sample.step, sample.batch, inner)
    inputs[-1] = inputs[-1].float()
    vocabulary, width = 128, 32
    product = next(
        n for n in graph.graph.nodes if name(n.target) == "mm" and tuple(n.meta["val"].shape) == (width, vocabulary)
    )
    seed: Any = product.args[0].args[0]
    assert name(product.args[0].target) in ("view", "_unsafe_view", "reshape")
    shape = shape_of(seed.meta["val"])
    region = grow(seed, ((Axis("B", shape[0]),), (Axis("T", shape[1]),), (shape[2],)))
    nodes = list(graph.graph.nodes)
    gradient = next(n for n in region.ends if name(n.target) == "mm" and vocabulary in n.meta["val"].shape)
    assert region.ends[gradient].kind == "reduces"
    between = nodes[nodes.index(product) : nodes.index(gradient)]
    wide = [
        n
        for n in between
        if any(t.dim() > 1 and vocabulary in t.shape and width not in t.shape for t in tensors(n.meta["val"]))
    ]
    outside = {name(n.target) for n in wide if n not in region.keeps}
    assert len(wide) >= 6 and outside <= {"eq", "full", "view"}, (outside, region)
    assert max(region.turn.values()) >= 1  # the loss is a mean over rows
    check(graph, inputs, region, seed, PAIR)
