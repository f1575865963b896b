"""A tiled step computes what the untiled one does, slice by slice, and its bytes are those that were planned."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from operator import getitem
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from transformers import LlamaConfig

import memplan
from memplan.backend import memplan_backend
from memplan.passes import inductor
from memplan.passes.calls import view_base
from memplan.passes.tile import forward_of_joint, tile_all
from memplan.runtime import tiled
from memplan.runtime.tiled import runner, slices
from tests.accuracy import exact_gradients, gradients, rms_error
from tests.joint_graphs import joint_of
from tests.losses import LOSSES, MIXES, RETURNS_MORE, Head, Loss, Rows, entropy
from tests.models import CASES, Case, Sample, language_model

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


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
ROWS = Rows.make(B, T, D, V)


def joint_of_loss(loss: Loss, rows: Rows, inner: str) -> tuple[fx.GraphModule, list[Any]]:
    """The joint graph of a loss, and inputs, with 1.5 for its results' own gradients."""
    model = Head(D, V).double()
    graph, inputs = joint_of(lambda r: loss(model, r, *model(r.x_BTD)), rows, inner)
    given = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder") if n.name.startswith("tangents")]
    return graph, [*inputs[:-1], *(torch.full(t.shape, 1.5, dtype=t.dtype) for t in given)]


def run_all(graph: fx.GraphModule, inputs: list[Any]) -> list[torch.Tensor | None]:
    return list(fx.Interpreter(graph).run(*inputs))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_losses(inner: str) -> None:
    """All are tiled to the same values, but for those named; and of these the reason is said."""
    left = {}
    for what, loss in LOSSES.items():
        torch._dynamo.reset()
        graph, inputs = joint_of_loss(loss, ROWS, inner)
        before = run_all(graph, inputs)
        notes = tiled_all(graph, 5, 1 + (what in RETURNS_MORE))
        if not loops(graph):
            left[what] = notes
        tolerance = {"float16, scaled": 2e-3, "bfloat16 autocast": 1e-6}.get(what, 1e-12)
        assert same(before, run_all(graph, inputs), tolerance), (what, notes)
        if what not in MIXES:
            assert not [n for n in graph.graph.nodes if wide(n)], (what, notes)
    assert set(left) == set(MIXES), left
    assert all("not tiled" in note and ": " in note for notes in left.values() for note in notes)
    assert "return the loss" in left["logits returned"][0]


def wide(node: fx.Node) -> bool:
    """Whether it makes a number for each row and each word."""
    value = node.meta.get("val")
    made = node.op == "call_function" and node.target is not getitem and view_base(node) is None
    return made and isinstance(value, torch.Tensor) and value.numel() >= B * (T - 1) * V


class Squashed(torch.autograd.Function):
    """Somebody's own gradient, which is not proportional to what comes in."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g.clamp(-1e-2, 1e-2)


@torch.library.custom_op("memplan_tests::cap_backward", mutates_args=())
def cap_backward(g: torch.Tensor) -> torch.Tensor:
    return g.clamp(max=1e-2)


@cap_backward.register_fake
def _(g: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(g)


class Capped(torch.autograd.Function):
    """So is this, of the loss, in an op that has the name of those that are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        found: torch.Tensor = torch.ops.memplan_tests.cap_backward(g)
        return found


WAYS: dict[str, tuple[Loss, str]] = {
    "one loss": (LOSSES["DAPO"], "gradient in the same pass"),
    "their own": (lambda m, r, h, z: -r.selected(Squashed.apply(z)).mean(), "clamp.default is not known to be prop"),
    "their own op": (lambda m, r, h, z: Capped.apply(-r.selected(z).mean()), "cap_backward.default is not known"),
    "float16": (LOSSES["float16, scaled"], "float16, which a loss scale keeps"),
    "sequences": (LOSSES["GSPO"], "is not computed row by row"),
    "log-probs": (LOSSES["log-probs alone"], "not start from the gradient of one loss"),
    "two losses": (lambda m, r, h, z: (r.selected(z).mean(), entropy(z).mean()), "not start from the gradient of one"),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it
@pytest.mark.parametrize("what", WAYS)
def test_the_gradient_comes_in_the_same_pass_where_it_is_a_multiple_of_the_loss_s(what: str) -> None:
    loss, way = WAYS[what]
    graph, inputs = joint_of_loss(loss, ROWS, "eager")
    before = run_all(graph, inputs)
    (note,) = tiled_all(graph, 5, 1 + (what == "two losses"))
    assert way in note and loops(graph) == (1 if "same pass" in note else 2)
    assert same(before, run_all(graph, inputs), 2e-3 if what == "float16" else 1e-12)


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("k3", D),
        ("ignore_index", 1000),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("k3", 1000), ("ignore_index", D), ("GSPO", D), ("GSPO", 1000))
        ),
    ],
)
def test_compiled_slices(what: str, rows: int) -> None:
    """As many rows as the model is wide, and a remainder; or all of them. Then other lengths, with the same code."""
    bodies = set()
    for length in (2 * D, 2 * D + 3, D + 5):
        torch._dynamo.reset()
        graph, inputs = joint_of_loss(LOSSES[what], Rows.make(B, length, D, V), "inductor")
        before = run_all(graph, inputs)
        tiled_all(graph, rows, inner="inductor")
        assert same(before, run_all(graph, inputs), 1e-12)
        bodies |= {n.args[2] for n in graph.graph.nodes if n.target is tiled.OP}
    made = [codes for body in bodies for codes in runner(body).made.values()]
    assert made and all(len(codes) <= 2 for codes in made)  # for the first strides, and for any


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    rows = replace(ROWS, x_BTD=ROWS.x_BTD.clone(), gain_B=ROWS.gain_B.clone())
    rows.x_BTD[1, 2, 3] = float("nan")
    rows.gain_B[0] = bad
    graph, inputs = joint_of_loss(LOSSES["DAPO"], rows, "eager")
    inputs = [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
    next(i for i in inputs if i.shape == (V, D))[3, 2] = bad
    before = run_all(graph, inputs)
    assert not torch.isfinite(before[0]).all()  # type: ignore[arg-type]
    tiled_all(graph, 5)
    assert loops(graph) == 1 and same(before, run_all(graph, inputs), 1e-12)


EXTREMES = {
    "no row counts": lambda: replace(ROWS, mask_BT=ROWS.mask_BT * 0, some_BT=ROWS.some_BT * 0 - 100),
    "one token": lambda: Rows.make(3, 1, D, V),
    "one sequence": lambda: Rows.make(1, 9, D, V),
    "two words": lambda: Rows.make(B, T, D, 2),
}


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme: str, inner: str) -> None:
    """Tiled, or left as it is: the same as untiled, nan for nan."""
    rows = EXTREMES[extreme]()
    for what in ("ignore_index", "GRPO"):
        torch._dynamo.reset()
        model = Head(D, 2 if extreme == "two words" else V).double()
        graph, inputs = joint_of(lambda r, m=model, w=what: LOSSES[w](m, r, *m(r.x_BTD)), rows, inner)
        before = run(graph, inputs)
        tiled_all(graph, 2)
        assert same(before, run(graph, inputs), 1e-12)


def test_labels_out_of_range() -> None:
    """The error is that of the untiled step."""
    rows = replace(ROWS, labels_BT=ROWS.labels_BT + V)
    graph, inputs = joint_of_loss(LOSSES["GRPO"], rows, "eager")
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of bounds") as error:
            run_all(graph, inputs)
        messages.append(str(error.value).splitlines()[0])
        tiled_all(graph, 5)
    assert loops(graph) and messages[0] == messages[1]


# ---- from one end to the other --------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32, layers: int = 1) -> Sample:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=176, num_hidden_layers=layers, num_attention_heads=4
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
    with memplan.record("cpu") as seen:
        step(sample.batch).backward()
    planned = made[-1].peak - made[-1].step.base_bytes
    assert abs(planned - seen.timeline.peak_above_base) <= 0.005 * planned
    assert any("tiled by 32 rows" in note for note in made[-1].step.notes)


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [
        pytest.param(torch.float32, "eager", id="float32-eager"),
        pytest.param(torch.bfloat16, "eager", id="bfloat16-eager"),
        pytest.param(torch.float32, "inductor", id="float32-inductor"),
        pytest.param(torch.bfloat16, "inductor", id="bfloat16-inductor", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_as_good_as_untiled_ones(dtype: torch.dtype, inner: str) -> None:
    sample = model(dtype)
    exact = exact_gradients(sample, model(torch.float64))
    untiled = rms_error(gradients(compiled(sample, inner=inner), sample), exact)
    torch._dynamo.reset()
    assert rms_error(gradients(compiled(sample, inner=inner, tiles=24), sample), exact) <= 1.1 * untiled


def test_auto_tiles_where_it_must(made: list[memplan.Plan]) -> None:
    sample = model(layers=2)
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


@pytest.mark.parametrize(
    "what", ["GRPO", "GSPO", "full KL", "value head", "log-probs returned", "normalised by itself"]
)
def test_losses_are_planned(what: str, made: list[memplan.Plan]) -> None:
    head, rows = Head(D, V), Rows.make(B, T, D, V, dtype=torch.float32)
    found = []
    for tiles in (5, None):
        torch._dynamo.reset()
        head.zero_grad()
        options = {"inner": "eager", "tiles": tiles}
        step = torch.compile(
            lambda: LOSSES[what](head, rows, *head(rows.x_BTD)), backend=memplan_backend, options=options
        )
        loss = step()
        (loss[0] if what in RETURNS_MORE else loss).backward()
        found.append([p.grad for p in head.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert any(note.startswith("tiled by 5 rows") for note in made[0].step.notes)


def test_pins(made: list[memplan.Plan]) -> None:
    sample = model(layers=2)
    compiled(sample, inner="eager", tiles={"lm_head": 32, "layers.1.mlp": 64})(sample.batch)
    notes = [note for note in made[-1].step.notes if note.startswith("tiled")]
    assert ["by 32 rows, 2.359 MB -> 262.1 KB, gradient in the same pass" in note for note in notes] == [True, False]
    assert "by 64 rows, " in notes[1] and "(x" not in notes[1]  # the other layer stays as it is
    assert "'heat', and no region is there" in refusal(sample, {"heat": 32})
    assert "lm_head)" in refusal(sample, {"heat": 32}) and "layers.1.mlp.gate_proj)" in refusal(sample, {"heat": 32})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_pin_of_a_step_in_two_graphs(made: list[memplan.Plan]) -> None:
    """The graph that has the place tiles it, and the other one does not mind."""
    head, rows = Head(D, V), Rows.make(B, T, D, V, dtype=torch.float32)

    def step() -> torch.Tensor:
        h = torch.tanh(head.body(rows.x_BTD))
        torch._dynamo.graph_break()
        return -rows.selected(head.head(h)).mean()

    for _ in range(2):
        torch.compile(step, backend=memplan_backend, options={"inner": "eager", "tiles": {"head": 4}})().backward()
    assert any(note.startswith("tiled by 4 rows") for plan in made for note in plan.step.notes)


@pytest.mark.slow
def test_generated_code_takes_what_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor keeps the plan's order, so its smallest plan's bytes are known before code is generated."""
    found: list[tuple[int, int]] = []
    generate = inductor._compile

    def listening(*args: Any, **more: Any) -> Any:
        made, predicted = generate(*args, **more)
        if not more["reorder"]:
            found.append((made.plan.peak - made.plan.step.base_bytes, predicted - made.plan.step.base_bytes))
        return made, predicted

    monkeypatch.setattr(inductor, "_compile", listening)
    sample = model(layers=4)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="does not fit"):
        compiled(sample, tiles=32, budget=1)(sample.batch)
    generated, predicted = found[0]
    assert generated <= 1.02 * predicted


def test_a_pin_where_rows_mix() -> None:
    head = Head(D, V)

    def step(x: torch.Tensor) -> torch.Tensor:
        z = head(x)[1]
        return (z - z.sum() / 7).softmax(-1).square().mean()

    options = {"inner": "eager", "tiles": {"head": 4}}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error:
        torch.compile(step, backend=memplan_backend, options=options)(ROWS.x_BTD.float())
    assert "'head', which cannot run in slices: rows mix at test_tile.py:" in str(error.value)
    assert " in step: it sums over rows (sequences, tokens), and rows need the result" in str(error.value)


@pytest.mark.parametrize("tiles", [8, "auto"])
def test_what_is_not_tiled_is_said(tiles: int | str, made: list[memplan.Plan]) -> None:
    """The logits are what the compiled function returns; and a model without products of rows."""
    head = Head(D, V)
    step = torch.compile(lambda x: head(x)[1], backend=memplan_backend, options={"inner": "eager", "tiles": tiles})
    step(ROWS.x_BTD.float().repeat(1, 20, 1)).mean().backward()
    assert any("compute the loss where it is made" in note for note in made[-1].step.notes)
    unet = CASES[-1].make()
    torch.compile(unet.step, backend=memplan_backend, options={"inner": "eager", "tiles": tiles})(unet.batch)
    assert any("not tiled: no product" in note for note in made[-1].step.notes)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
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
        with memplan.record("cpu") as seen:
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
    head = Head(D, V)

    def loss(x: torch.Tensor) -> torch.Tensor:
        labels = (x.sum(-1) > 0).long()
        return -head(x)[1].log_softmax(-1).gather(-1, labels[..., None]).mean()

    step = torch.compile(loss, backend=memplan_backend, options={"inner": "eager", "tiles": 4}, dynamic=True)
    for length in (6, 13, 9):
        x = Rows.make(B, length, D, V).x_BTD.float()
        results = []
        for f in (step, loss):
            head.zero_grad()
            f(x).backward()
            results.append([p.grad for p in (head.body.weight, head.head.weight)])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
    assert made and all(any("tiled by 4 rows" in note for note in plan.step.notes) for plan in made)
