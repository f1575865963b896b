"""A tiled step computes what the untiled one does, slice by slice, and its bytes are those that were planned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F
from transformers import LlamaConfig

import memplan
from memplan.backend import memplan_backend
from memplan.passes.calls import view_base
from memplan.passes.tile import forward_of_joint, tile_all
from memplan.runtime import tiled
from memplan.runtime.tiled import runner, slices
from tests.accuracy import exact_gradients, gradients, rms_error
from tests.joint_graphs import joint_of
from tests.models import CASES, Case, Sample, language_model
from tests.planned import frozen_heap

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LANGUAGE = [case for case in CASES if str(case) != "unet"]


def run(graph: fx.GraphModule, inputs: list[Any]) -> list[torch.Tensor | None]:
    tangent = next(n for n in graph.graph.find_nodes(op="placeholder") if n.name.startswith("tangents"))
    return list(fx.Interpreter(graph).run(*inputs[:-1], inputs[-1].to(tangent.meta["val"].dtype)))


def same(a: list[torch.Tensor | None], b: list[torch.Tensor | None], tolerance: float) -> bool:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            scale = float(x.nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1e-30
            if x.dtype != y.dtype or not torch.allclose(x, y, atol=tolerance * scale, rtol=0, equal_nan=True):
                return False
    return True


def tiled_all(graph: fx.GraphModule, rows: int, outputs: int = 1, inner: str = "eager") -> list[str]:
    return [str(o) for o in tile_all(graph, forward_of_joint(outputs), lambda _: rows, inner=inner)]


def loops(graph: fx.GraphModule) -> int:
    return sum(n.target is tiled.OP for n in graph.graph.nodes)


# ---- slices ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(0, 40), st.integers(2, 50), st.booleans())
def test_slices_cover_all_rows_once(sequences: int, length: int, rows: int, one: bool) -> None:
    seen = []
    for (first, count), (start, many) in slices(sequences, length, rows, one=one):
        assert count * many <= max(rows, 1) and count >= 1
        assert count == 1 or (many == length and not one)
        assert many >= 2 or length < 2 or rows < 4  # no single row is left over
        seen += [(s, t) for s in range(first, first + count) for t in range(start, start + many)]
    assert sorted(seen) == [(s, t) for s in range(sequences) for t in range(length)]


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("case", LANGUAGE, ids=str)
def test_models_are_tiled_to_the_same_values(case: Case, inner: str) -> None:
    sample = case.make(dtype=torch.float64)
    graph, inputs = joint_of(sample.step, sample.batch, inner)
    before = run(graph, inputs)
    for rows in (5, 1000):
        tiled_graph = fx.GraphModule(graph, fx.Graph())
        tiled_graph.graph.output(tiled_graph.graph.graph_copy(graph.graph, {})).meta = {}
        notes = tiled_all(tiled_graph, rows)
        assert loops(tiled_graph) >= 1 and any(note.startswith("tiled") for note in notes)
        assert same(before, run(tiled_graph, inputs), 1e-6)  # some parts are float32 whatever the model is
    widths = {sample.module.config.vocab_size}
    if str(case) == "llama":  # neither is anything of its MLPs, forward or backward
        widths.add(sample.module.config.intermediate_size)
    for n in tiled_graph.graph.nodes:
        value = n.meta.get("val")
        made = n.op == "call_function" and n.target is not getitem and view_base(n) is None  # nor a weight
        if made and isinstance(value, torch.Tensor) and value.shape[-1:] and value.shape[-1] in widths:
            assert value.shape[:-1] not in ((2, 16), (32,)), n.format_node()


# ---- losses ---------------------------------------------------------------------------------------------------------

B, T, D, V = 2, 6, 8, 40


class Head(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=bias)
        self.value = nn.Linear(D, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.tanh(self.body(x))
        return h, self.head(h)


ROWS = torch.linspace(-2, 2, B * T * D, dtype=torch.float64).sin().view(B, T, D)
LABELS = (torch.arange(B * T) * 7 % V).view(B, T)
SOME = LABELS.masked_fill(torch.arange(B * T).view(B, T) % 3 == 0, -100)
MASK = (SOME >= 0).double()
OLD = torch.full((B, T), -3.5, dtype=torch.float64)
GAIN = torch.tensor([1.0, -0.7], dtype=torch.float64)


def selected(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, LABELS[..., None]).squeeze(-1)


def clipped(logits: torch.Tensor, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
    ratio = (selected(logits) - OLD).exp()
    return -torch.minimum(ratio * GAIN[:, None], ratio.clamp(1 - low, 1 + high) * GAIN[:, None])


def entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return -(p * logits.log_softmax(-1)).sum(-1)


def k3(logits: torch.Tensor) -> torch.Tensor:
    d = OLD + 0.1 - selected(logits)
    return d.exp() - d - 1


LOSSES: dict[str, Callable[[Head, torch.Tensor, torch.Tensor], Any]] = {
    "cross entropy by hand": lambda m, h, z: -selected(z).mean(),
    "masked mean": lambda m, h, z: -(selected(z) * MASK).sum() / MASK.sum(),
    "temperature": lambda m, h, z: -selected(z / 0.7).mean(),
    "softcap": lambda m, h, z: -selected(30 * torch.tanh(z / 30)).mean(),
    "label smoothing": lambda m, h, z: -(0.9 * selected(z) + 0.1 * z.log_softmax(-1).mean(-1)).mean(),
    "z-loss": lambda m, h, z: -selected(z).mean() + 1e-2 * z.logsumexp(-1).square().mean(),
    "shift after the head": lambda m, h, z: -z[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:, None]).mean(),
    "clipped": lambda m, h, z: clipped(z).mean(),
    "two-sided clip": lambda m, h, z: clipped(z).clamp(max=3.0).mean(),
    "clipped, k3": lambda m, h, z: (clipped(z) + 0.04 * k3(z)).mean(),
    "k2": lambda m, h, z: (clipped(z) + 0.04 * 0.5 * (OLD - selected(z)).square()).mean(),
    "entropy bonus": lambda m, h, z: (clipped(z) - 0.01 * entropy(z)).mean(),
    "sequence ratio": lambda m, h, z: -(((selected(z) - OLD).mean(-1)).exp() * GAIN).mean(),
    "CISPO": lambda m, h, z: -((selected(z) - OLD).exp().clamp(max=1.2).detach() * GAIN[:, None] * selected(z)).mean(),
    "tokens of the batch": lambda m, h, z: (clipped(z) * MASK).sum() / MASK.sum(),
    "mean of each sequence": lambda m, h, z: ((clipped(z) * MASK).sum(-1) / MASK.sum(-1)).mean(),
    "value head": lambda m, h, z: clipped(z).mean() + (m.value(h).squeeze(-1) - 0.3).square().mean(),
    "second loss": lambda m, h, z: -selected(z).mean() - 0.3 * z.log_softmax(-1)[..., 3].mean(),
    "pointwise, of the user": lambda m, h, z: (torch.sigmoid(z) * z.cos()).sum(-1).tanh().mean(),
    "normalised by itself": lambda m, h, z: selected(z).square().sum() / (selected(z).detach().abs().sum() + 1),
    "mean of all": lambda m, h, z: z.softmax(-1).square().mean() + z.mean((0, 1)).square().mean(),
    "centred": lambda m, h, z: (z - z.sum() / 7).softmax(-1).square().sum(-1).mean(),
    "frozen head": lambda m, h, z: -selected(F.linear(h, m.head.weight.detach())).mean(),
    "tied embeddings": lambda m, h, z: -selected(m.head(h + F.embedding(LABELS, m.head.weight))).mean(),
    "torch's cross entropy": lambda m, h, z: F.cross_entropy(z.flatten(0, 1), LABELS.flatten()),
    "ignored labels": lambda m, h, z: F.cross_entropy(z.flatten(0, 1), SOME.flatten()),
    "shifted, and not": lambda m, h, z: (
        -z[:, :-1].log_softmax(-1).gather(-1, LABELS[:, 1:, None]).mean() + 1e-2 * z.logsumexp(-1).square().mean()
    ),
    "logits returned": lambda m, h, z: (-selected(z).mean(), z.detach()),
}  # fmt: skip


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_losses(inner: str) -> None:
    """All are tiled to the same values, but for those named; and of these the reason is said."""
    left = {}
    for what, loss in LOSSES.items():
        torch._dynamo.reset()
        model = Head(bias=what == "temperature").double()

        def step(x: torch.Tensor, model: Head = model, loss: Any = loss) -> Any:
            return loss(model, *model(x))

        graph, inputs = joint_of(step, ROWS, inner)
        outputs = 2 if what == "logits returned" else 1
        before = run(graph, inputs)
        notes = tiled_all(graph, 5, outputs)
        if not loops(graph):
            left[what] = notes
        assert same(before, run(graph, inputs), 1e-12), (what, notes)
    assert set(left) == {"logits returned", "centred", "shifted, and not"}, left
    assert all("not tiled" in note and ": " in note for notes in left.values() for note in notes)
    assert "return the loss" in left["logits returned"][0]


class Squashed(torch.autograd.Function):
    """Somebody's own gradient, which is not proportional to what comes in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g.clamp(-1e-2, 1e-2)


WAYS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "one loss": (lambda z: -selected(z).mean(), "gradient in the same pass"),
    "clipped gradients": (lambda z: -selected(Squashed.apply(z)).mean(), "clamp.default is not known to be prop"),
    "float16": (lambda z: -selected(z.half()).mean(), "float16, which a loss scale keeps"),
    "sequences": (lambda z: (selected(z).mean(-1).exp() * GAIN).mean(), "is not computed row by row"),
    "log-probs": (lambda z: selected(z), "not start from the gradient of one loss"),
    "two losses": (lambda z: (-selected(z).mean(), entropy(z).mean()), "not start from the gradient of one loss"),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it
@pytest.mark.parametrize("what", WAYS)
def test_the_gradient_comes_in_the_same_pass_where_it_is_a_multiple_of_the_loss_s(what: str) -> None:
    loss, way = WAYS[what]
    model = Head().double()
    graph, inputs = joint_of(lambda x: loss(model(x)[1]), ROWS, "eager")
    given = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder") if n.name.startswith("tangents")]
    inputs = [*inputs[:-1], *(torch.full(t.shape, 1.5, dtype=t.dtype) for t in given)]
    before = list(fx.Interpreter(graph).run(*inputs))
    (note,) = tiled_all(graph, 5, len(given))
    assert way in note and loops(graph) == (1 if "same pass" in note else 2)
    assert same(before, list(fx.Interpreter(graph).run(*inputs)), 2e-3 if what == "float16" else 1e-12)


@pytest.mark.parametrize("rows", [D, 1000])
@pytest.mark.parametrize("what", ["clipped, k3", "torch's cross entropy", "sequence ratio"])
def test_compiled_slices(what: str, rows: int) -> None:
    """As many rows as the model is wide, and a remainder; or all of them. Then other lengths, with the same code."""
    model, tiles = Head().double(), []
    for length in (2 * D, 2 * D + 3, D + 5):
        x = torch.linspace(-2, 2, B * length * D, dtype=torch.float64).sin().view(B, length, D)
        labels = (torch.arange(B * length) * 7 % V).view(B, length)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "LABELS", labels)
            patch.setitem(globals(), "OLD", torch.full((B, length), -3.5, dtype=torch.float64))
            torch._dynamo.reset()
            graph, inputs = joint_of(lambda x: LOSSES[what](model, *model(x)), x, "inductor")
        before = run(graph, inputs)
        tiled_all(graph, rows, inner="inductor")
        assert same(before, run(graph, inputs), 1e-12)
        tiles += [n.args[2] for n in graph.graph.nodes if n.target is tiled.OP]
    codes = [codes for body in set(tiles) for codes in runner(body).made.values()]
    assert codes and all(len(some) <= 2 for some in codes)  # for the first strides, and for any


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    model, x = Head().double(), ROWS.clone()
    x[1, 2, 3] = float("nan")
    with torch.no_grad():
        model.head.weight[3, 2] = bad
    graph, inputs = joint_of(lambda x: -selected(model(x)[1]).mean(), x, "eager")
    before = run(graph, inputs)
    assert not torch.isfinite(before[0]).all()  # type: ignore[arg-type]
    tiled_all(graph, 5)
    assert loops(graph) == 1 and same(before, run(graph, inputs), 1e-12)


# ---- from one end to the other --------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> Sample:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4
    )
    return language_model(config, dtype, completions=3, tokens=96)


def compiled(sample: Sample, **options: Any) -> Callable[[Any], torch.Tensor]:
    return torch.compile(sample.step, backend=memplan_backend, options=options)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_planned_is_measured(inner: str, made: list[memplan.Plan]) -> None:
    sample = model()
    step = compiled(sample, inner=inner, tiles=32)
    step(sample.batch).backward()
    sample.module.zero_grad()
    gc.collect()
    with frozen_heap(), memplan.record("cpu") as seen:
        step(sample.batch).backward()
    planned = made[-1].peak - made[-1].step.base_bytes
    assert abs(planned - seen.timeline.peak_above_base) <= 0.005 * planned
    assert any("tiled by 32 rows" in note for note in made[-1].step.notes)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_as_good_as_untiled_ones(dtype: torch.dtype, inner: str) -> None:
    sample = model(dtype)
    exact = exact_gradients(sample, model(torch.float64))
    untiled = rms_error(gradients(compiled(sample, inner=inner), sample), exact)
    torch._dynamo.reset()
    assert rms_error(gradients(compiled(sample, inner=inner, tiles=24), sample), exact) <= 1.1 * untiled


def test_auto_tiles_where_it_must(made: list[memplan.Plan]) -> None:
    sample = model()
    compiled(sample, inner="eager", tiles="auto")(sample.batch)
    assert not any(note.startswith("tiled") for note in made[-1].step.notes)
    with pytest.raises(memplan.DoesNotFit) as untiled:
        memplan.plan(sample.step, sample.batch, inner="eager", budget=1)
    budget = untiled.value.smallest - 200_000
    torch._dynamo.reset()
    step = compiled(sample, inner="eager", tiles="auto", budget=budget)
    step(sample.batch).backward()
    assert made[-1].fits and any(note.startswith("tiled") for note in made[-1].step.notes)
    planned = memplan.plan(sample.step, sample.batch, inner="eager", budget=budget, tiles="auto", machine="cpu")
    assert planned.fits and any(note.startswith("tiled") for note in planned.step.notes)


def refusal(sample: Sample, tiles: dict[str, int]) -> str:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        compiled(sample, inner="eager", tiles=tiles)(sample.batch)
    assert isinstance(error.value.inner_exception, memplan.MemplanError)
    return str(error.value.inner_exception)


def test_pins(made: list[memplan.Plan]) -> None:
    sample = model()
    compiled(sample, inner="eager", tiles={"lm_head": 32, "layers.1.mlp": 64})(sample.batch)
    notes = [note for note in made[-1].step.notes if note.startswith("tiled")]
    assert ["by 32 rows, 2.359 MB -> 262.1 KB, gradient in the same pass" in note for note in notes] == [True, False]
    assert "by 64 rows, " in notes[1] and "(x" not in notes[1]  # the other layer stays as it is
    assert "'heat', and no region is there" in refusal(sample, {"heat": 32})
    assert "lm_head)" in refusal(sample, {"heat": 32}) and "layers.1.mlp.gate_proj)" in refusal(sample, {"heat": 32})


def test_a_pin_where_rows_mix() -> None:
    head = Head()

    def step(x: torch.Tensor) -> torch.Tensor:
        z = head(x)[1]
        return (z - z.sum() / 7).softmax(-1).square().mean()

    options = {"inner": "eager", "tiles": {"head": 4}}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        torch.compile(step, backend=memplan_backend, options=options)(ROWS.float())
    assert "'head', which cannot run in slices: rows mix at test_tile.py:" in str(error.value)
    assert " in step: it sums over rows (sequences, tokens), and rows need the result" in str(error.value)


@pytest.mark.parametrize("tiles", [8, "auto"])
def test_what_is_not_tiled_is_said(tiles: int | str, made: list[memplan.Plan]) -> None:
    """The logits are what the compiled function returns; and a model without products of rows."""
    head = Head()
    step = torch.compile(lambda x: head(x)[1], backend=memplan_backend, options={"inner": "eager", "tiles": tiles})
    step(ROWS.float().repeat(1, 20, 1)).mean().backward()
    assert any("compute the loss where it is made" in note for note in made[-1].step.notes)
    unet = CASES[-1].make()
    torch.compile(unet.step, backend=memplan_backend, options={"inner": "eager", "tiles": tiles})(unet.batch)
    assert any("not tiled: no product" in note for note in made[-1].step.notes)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_graphs_with_backward_inside(inner: str, made: list[memplan.Plan]) -> None:
    """Two micro-batches and their backwards in one graph: as good as untiled, and planned is measured."""
    sample = model()
    exact = [2 * g for g in exact_gradients(sample, model(torch.float64))]

    def step(batch: Any) -> torch.Tensor:
        sample.step(batch).backward()
        loss = sample.step(batch)
        loss.backward()
        return loss.detach()

    def found(**options: Any) -> tuple[float, int]:
        torch._dynamo.reset()
        run = memplan.compile(step, inner=inner, **options)
        run(sample.batch)
        sample.module.zero_grad()
        gc.collect()
        with frozen_heap(), memplan.record("cpu") as seen:
            run(sample.batch)
        error = rms_error([p.grad.double() for p in sample.module.parameters()], exact)
        sample.module.zero_grad()
        return error, seen.timeline.peak_above_base

    untiled, whole = found()
    tiled_error, peak = found(tiles=32)
    assert tiled_error <= 1.1 * untiled and peak < whole
    plan = made[-1]
    assert sum(("tiled by 32 rows" in note and "same pass" in note) for note in plan.step.notes) == 1
    assert abs(plan.peak - plan.step.base_bytes - peak) <= 0.005 * peak


def test_lengths_that_change(made: list[memplan.Plan]) -> None:
    """One graph for all lengths, sliced as they come."""
    head = Head()

    def loss(x: torch.Tensor) -> torch.Tensor:
        labels = (x.sum(-1) > 0).long()
        return -head(x)[1].log_softmax(-1).gather(-1, labels[..., None]).mean()

    step = torch.compile(loss, backend=memplan_backend, options={"inner": "eager", "tiles": 4}, dynamic=True)
    for length in (6, 13, 9):
        x = torch.linspace(-2, 2, B * length * D).sin().view(B, length, D)
        results = []
        for f in (step, loss):
            head.zero_grad()
            f(x).backward()
            results.append([p.grad for p in (head.body.weight, head.head.weight)])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
    assert made and all(any("tiled by 4 rows" in note for note in plan.step.notes) for plan in made)
