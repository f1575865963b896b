"""An LM head with log-probs of given tokens becomes linear_logprob, whatever the loss: same values, planned bytes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import memplan
from memplan.backend import memplan_backend
from memplan.grpo.logprobs import selected_logprobs, token_entropies
from memplan.passes import selected
from memplan.passes.calls import Call
from memplan.passes.fused_head import BACKWARD, FORWARD
from memplan.passes.tile import forward_of_joint, tile_all
from memplan.passes.workspaces import run_alone
from memplan.runtime.kernels.linear_logprob import work
from tests.accuracy import exact_gradients, gradients, rms_error
from tests.losses import LOSSES, RETURNS_MORE, Head, Loss, Rows, flat
from tests.torch_cpu.test_tile import ROWS, D, V, compiled, joint_of_loss, model, run_all, same, wide

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

MORE: dict[str, Loss] = {
    "memplan": lambda m, r, h, z: r.mean(-selected_logprobs(z, r.labels_BT, 0.7, 1.3, 20.0)),
    "memplan, entropies": lambda m, r, h, z: r.mean(-selected_logprobs(z, r.labels_BT) - 0.01 * token_entropies(z)),
    "logsumexp": lambda m, r, h, z: r.mean(
        z.logsumexp(-1) - z.gather(-1, r.labels_BT[..., None]).squeeze(-1) + 0.1 * z.logsumexp(-1).detach()
    ),
    "shift before the head": lambda m, r, h, z: F.cross_entropy(flat(m.head(h[:, :-1])), flat(r.labels_BT[:, 1:])),
    # what a few random numbers might not show
    "clamped": lambda m, r, h, z: -r.selected(z.clamp(-80, 80)).mean(),
    "min-p": lambda m, r, h, z: -r.selected(z.where(z >= z.amax(-1, keepdim=True) - 90, -1e9)).mean(),
    "one token": lambda m, r, h, z: -(r.selected(z) + z[..., 5]).mean(),
    "other labels": lambda m, r, h, z: (
        -r.selected(z).mean() - z.log_softmax(-1).gather(-1, 0 * r.labels_BT[..., None]).mean()
    ),
    "a temperature of each row": lambda m, r, h, z: -r.selected(z * r.old_BT[..., None]).mean(),
}
NOT = {  # what is said of those that stay what they were
    "label smoothing": "also read by",
    "z-loss": "its gradient does not follow from that of log-probs",
    "full KL": "2 products",
    "second head": "2 products",
    "two terms of one head": "also read by select at losses.py",
    "pointwise, of the user": "no log-prob",
    "mean of all": "no log-prob",
    "shifted, and not": "rows that the loop does not run over",
    "centred over all rows": "no log-prob",
    "logits returned": "return the loss",
    "clamped": " at test_fused_head.py",
    "min-p": "ge at test_fused_head.py",
    "one token": "also read by select",
    "other labels": "also read by gather",
    "a temperature of each row": "no log-prob",
}


def fused(graph: fx.GraphModule, outputs: int = 1, way: str = "auto") -> list[str]:
    found = tile_all(graph, forward_of_joint(outputs), lambda _: None, way_of=lambda _: way, widest=True)
    return [str(o) for o in found]


def ops(graph: fx.GraphModule) -> int:
    return sum(n.target in (FORWARD, BACKWARD) for n in graph.graph.nodes)


DECOMPOSED = ("cross entropy", "bias", "softcap", "shift after the head", "k3", "entropy bonus", "frozen head",
              "bfloat16 autocast", "z-loss", "two terms of one head", *MORE)  # fmt: skip


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_losses(inner: str) -> None:
    """Each becomes the op, to the same values, or says why not."""
    losses = {**LOSSES, **MORE}
    for what in losses if inner == "eager" else DECOMPOSED:
        loss = losses[what]
        torch._dynamo.reset()
        graph, inputs = joint_of_loss(loss, ROWS, inner)
        before = run_all(graph, inputs)
        (note,) = fused(graph, 1 + (what in RETURNS_MORE))
        assert (NOT.get(what, "tiled by linear_logprob")) in note, (what, note)
        assert ops(graph) == (0 if what in NOT else 1 if what == "frozen head" else 2), what
        tolerance = {"float16, scaled": 2e-3, "bfloat16 autocast": 1e-6}.get(what, 1e-12)
        assert same(before, run_all(graph, inputs), tolerance), (what, note)
        if what not in NOT:
            assert not [n for n in graph.graph.nodes if wide(n)], what


@pytest.mark.parametrize("way", ["rows", "vocab", "vectors"])
def test_ways_of_a_frozen_head_with_entropies(way: str) -> None:
    def loss(m: Head, r: Rows, h: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return MORE["memplan, entropies"](m, r, h, F.linear(h, m.head.weight.detach()))  # type: ignore[no-any-return]

    graph, inputs = joint_of_loss(loss, ROWS, "eager")
    before = run_all(graph, inputs)
    assert "tiled by linear_logprob" in fused(graph, way=way)[0]
    assert ops(graph) == 2 - (way == "vectors") and same(before, run_all(graph, inputs), 1e-12)


def test_vectors_are_for_frozen_heads() -> None:
    graph, _ = joint_of_loss(LOSSES["DAPO"], ROWS, "eager")
    assert "'vectors' is for a frozen head" in fused(graph, way="vectors")[0] and not ops(graph)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo does it
def test_a_wrong_gradient_is_seen() -> None:
    """Forward is a log-prob, and backward is somebody's own."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return g * 1.001

    graph, _ = joint_of_loss(lambda m, r, h, z: -r.selected(Doubled.apply(z)).mean(), ROWS, "eager")
    assert "its gradient does not follow" in fused(graph)[0] and not ops(graph)


def test_a_region_that_agrees_by_halves_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: with another formula nothing is found."""
    right = selected._formulas
    monkeypatch.setattr(selected, "_formulas", lambda z, t: {k: v * (1 + 1e-7) for k, v in right(z, t).items()})
    graph, _ = joint_of_loss(LOSSES["DAPO"], ROWS, "eager")
    assert "no log-prob" in fused(graph)[0]


# ---- from one end to the other --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_planned_is_measured(inner: str, made: list[memplan.Plan]) -> None:
    """And gradients are as good as those of the untiled step."""
    sample = model(layers=1)
    exact = exact_gradients(sample, model(torch.float64, layers=1))
    untiled = rms_error(gradients(compiled(sample, inner=inner), sample), exact)
    torch._dynamo.reset()
    step = compiled(sample, inner=inner, tiles={"lm_head": "vocab"})
    assert rms_error(gradients(step, sample), exact) <= 1.1 * untiled
    sample.module.zero_grad()
    gc.collect()
    with memplan.record("cpu") as seen:
        step(sample.batch).backward()
    assert made[-1].peak - made[-1].step.base_bytes == seen.timeline.peak_above_base
    (note,) = [note for note in made[-1].step.notes if note.startswith("tiled")]
    assert "linear_logprob" in note and "vocabulary tiles" in note and "modeling_llama.py" in note


def test_one_graph_with_its_backward(made: list[memplan.Plan]) -> None:
    sample = model(layers=1)
    exact = exact_gradients(sample, model(torch.float64, layers=1))

    def step(batch: Any) -> torch.Tensor:
        loss = sample.step(batch)
        loss.backward()
        return loss.detach()

    run = memplan.compile(step, inner="eager", tiles={"lm_head": "auto"})
    run(sample.batch)
    found = [p.grad.double() for p in sample.module.parameters() if p.grad is not None]
    sample.module.zero_grad()
    assert any("linear_logprob" in note for note in made[-1].step.notes)
    untiled = rms_error(gradients(compiled(sample, inner="eager"), sample), exact)
    assert rms_error(found, exact) <= 1.1 * untiled


def test_auto_takes_it_where_it_must(made: list[memplan.Plan]) -> None:
    """In less memory than slices of the graph's own nodes need."""
    sample = model(layers=1)

    def smallest(**options: Any) -> int:
        with pytest.raises(memplan.DoesNotFit) as error:
            memplan.plan(sample.step, sample.batch, inner="eager", budget=1, **options)
        return error.value.smallest

    least = smallest(tiles="auto")
    plan = memplan.plan(sample.step, sample.batch, inner="eager", budget=least, tiles="auto")
    assert any("linear_logprob" in note for note in plan.step.notes)
    assert plan.fits and least <= min(smallest(tiles=64), smallest())


def test_auto_says_why_it_is_not_taken() -> None:
    head = Head(D, V)

    def step(r: Rows) -> torch.Tensor:
        return F.cross_entropy(flat(head(r.x_BTD)[1]), flat(r.labels_BT), label_smoothing=0.1)

    rows = Rows.make(2, 80, D, V, dtype=torch.float32)
    plan = memplan.plan(step, rows, inner="eager", tiles="auto")
    assert any(n.startswith("not linear_logprob, losses.py:") and "also read by" in n for n in plan.step.notes)


def test_pins_of_no_head() -> None:
    sample = model(layers=1)
    with pytest.raises(memplan.MemplanError, match=r"'layers.0.mlp', which cannot run in slices: it is not linear_log"):
        memplan.plan(sample.step, sample.batch, inner="eager", tiles={"layers.0.mlp": "vocab"})
    with pytest.raises(memplan.MemplanError, match="option 'tiles' is 'vocabulary' for 'lm_head'"):
        memplan.plan(sample.step, sample.batch, tiles={"lm_head": "vocabulary"})


def test_lengths_that_change() -> None:
    head = Head(D, V)

    def loss(x: torch.Tensor) -> torch.Tensor:
        labels = (x.sum(-1) > 0).long()
        return -head(x)[1].log_softmax(-1).gather(-1, labels[..., None]).mean()

    options = {"inner": "eager", "tiles": {"head": "auto"}}
    step = torch.compile(loss, backend=memplan_backend, options=options, dynamic=True)
    for length in (6, 13, 9):
        x = Rows.make(2, length, D, V).x_BTD.float()
        results = []
        for f in (step, loss):
            head.zero_grad()
            f(x).backward()
            results.append([p.grad for p in (head.body.weight, head.head.weight)])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["rows", "vocab", "vectors"])
def test_memory_inside_is_known_without_running(way: str, dtype: torch.dtype) -> None:
    """That of other machines, beside what is measured on this one."""
    hidden, weight = torch.empty(1100, 64, dtype=dtype), torch.empty(5000, 64, dtype=dtype)
    labels = torch.empty(1100, dtype=torch.int64)
    args = (hidden, weight, labels, None, None, None, 1.0, 1.0, 5.0, dtype, False, way)
    found = torch.ops.memplan.linear_logprob.default(*(torch.zeros_like(a) if torch.is_tensor(a) else a for a in args))
    calls = [Call(FORWARD, args, {}, found)]
    if way != "vectors":
        more = (found[0], None, *args[:6], *found[:3], 1.0, 1.0, 5.0, dtype, way, [True, True, False])
        calls.append(Call(BACKWARD, more, {}, (hidden, weight, torch.empty(0))))
    for call, measured in zip(calls, run_alone(calls), strict=True):
        told = work.of(call.target, call.args)
        assert told is not None and abs(told.workspace() - measured.workspace) <= 0.04 * measured.workspace
