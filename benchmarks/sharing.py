"""Sharing of weights between adjacent layers: how many bytes under which error, and what it does to the loss.

    python benchmarks/sharing.py [--seeds 3] [--steps 300] [--tune 50] [-o FILE] [--plot FILE]

The model is a Llama of 4 layers of width 128, trained here to spell words backward (memplan.grpo.tasks); its loss is
that of the answer's characters, on 500 words it has not seen. Weights are those trained, or random as they start.
"least": the error that the best orthogonal Q of any form, with its scale, leaves: the mean and the least over pairs of
adjacent layers and the sides of Q. "forms": the same of pairs of one kind and of a query with the next layer's key, as
stored; what the best matrix of low rank leaves in the bytes of Q; and the bytes that pairs under an error save, in % of
the model's. "losses": pairs are merged at the least tolerance that saves so many percent, then all is trained for
`tune` steps more; beside it the model untouched, with the same weights left out (zeros), and with them as products of
low rank in the bytes of their Qs. "planted": a model whose odd layers are such images of the even ones, to see that
they are found. "memory": of a step with AdamW, as planned, at the least budget that fits, and as it runs eager.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import memplan
from benchmarks.machine import save
from memplan.grpo.tasks import CharTokenizer, make_tasks
from memplan.sharing import Blocks, Householder, Report, share_lossy, survey
from memplan.sharing.forms import Form
from memplan.sharing.pairs import best_pairs
from memplan.sharing.report import Pair
from memplan.sharing.share import held

FORMS: dict[str, Form] = {"Householder(8)": Householder(8), "Blocks(32)": Blocks(32), "Blocks()": Blocks()}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PAIRS = [*zip(KINDS, KINDS, strict=True), ("q_proj", "k_proj")]
GOALS = (10, 30)  # % saved; 30 is the article's claim
GRID = [i / 50 for i in range(1, 51)]
LENGTH, BATCH, RATE, TUNE_RATE = 20, 32, 2e-3, 5e-4
Words = tuple[torch.Tensor, torch.Tensor]


def words(count: int, seed: int) -> Words:
    """Tokens and labels [count, LENGTH]: a word, and what is asked: itself backward, and the end."""
    tokens = CharTokenizer()
    rows = []
    for task in make_tasks("spell_backward", count, seed, min_word_len=3, max_word_len=9):
        word, answer = (tokens.encode(text) for text in (task.prompt.rsplit(": ", 1)[1], task.answer))
        ids = [*word, *answer, tokens.eos]
        padding = LENGTH - len(ids)
        rows.append((ids + [tokens.pad] * padding, [-100] * len(word) + ids[len(word) :] + [-100] * padding))
    ids, labels = torch.tensor(rows).unbind(1)
    return ids, labels


def held_out(train: Words) -> Words:
    """500 words that are not among those."""
    seen = set(map(tuple, train[0].tolist()))
    ids, labels = words(800, seed=10**6)
    new = [i for i, row in enumerate(ids.tolist()) if tuple(row) not in seen][:500]
    return ids[new], labels[new]


def llama(layers: int = 4) -> LlamaForCausalLM:
    sizes = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=CharTokenizer().vocab_size, use_cache=False, **sizes))


def train(model: nn.Module, data: Words, steps: int, rate: float, seed: int) -> None:
    """AdamW, a rate that rises over 20 steps and falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(data[0]), (BATCH,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        model(input_ids=data[0][rows], labels=data[1][rows]).loss.backward()
        optimizer.step()


@torch.no_grad()
def loss_of(model: nn.Module, data: Words) -> float:
    return float(model(input_ids=data[0], labels=data[1]).loss)


def percent_saved(pairs: tuple[Pair, ...], tolerance: float, size: int) -> float:
    """Of the model's bytes, by the best choice of pairs."""
    under = [pair for pair in pairs if pair.error is not None and pair.error <= tolerance]
    return 100 * sum(pair.saved for pair in best_pairs(under)) / size


def tolerance_for(report: Report, goal: float) -> float | None:
    """The least that saves so many percent; None: none does."""
    errors = sorted({pair.error for pair in report.pairs if pair.error is not None})
    return next((e for e in errors if percent_saved(report.pairs, e, report.before) >= goal), None)


def low_rank_error(model: nn.Module, pair: Pair) -> float:
    """What the best U V in the bytes of the pair's Q leaves of the target."""
    squares = torch.linalg.svdvals(model.get_parameter(pair.target).detach().double()).square()
    return float((squares[rank_of(pair) :].sum() / squares.sum()).sqrt())


def rank_of(pair: Pair) -> int:
    return pair.stored // (4 * sum(pair.shape))


def least_errors(model: nn.Module) -> dict[str, list[float]]:
    """The mean and the smallest, over pairs and sides, by shapes and kinds."""
    pairs = survey(model, form=Blocks(), kinds=[("*", "*")]).pairs

    def kind(name: str) -> str:
        return name.split(".")[-2]

    groups: dict[str, Callable[[Pair], bool]] = {
        "128 x 128, of one kind": lambda p: p.shape == (128, 128) and kind(p.source) == kind(p.target),
        "query and key": lambda p: {kind(p.source), kind(p.target)} == {"q_proj", "k_proj"},
        "128 x 128, of any kinds": lambda p: p.shape == (128, 128),
        "128 x 352, of one kind": lambda p: p.shape != (128, 128) and kind(p.source) == kind(p.target),
    }
    found = {name: [p.least for p in pairs if p.least is not None and of(p)] for name, of in groups.items()}
    return {name: [statistics.mean(least), min(least)] for name, least in found.items()}


def errors(model: nn.Module, form: Form) -> dict[str, Any]:
    """The mean and the least of a form's errors, beside those of low rank; bytes by tolerance; the goals."""
    report = survey(model, form=form, kinds=PAIRS)
    fitted = [pair for pair in report.pairs if pair.error is not None]
    found = [pair.error for pair in fitted if pair.error is not None]
    return {
        "pairs": len(found),
        "error": [statistics.mean(found), min(found)],
        "low_rank": statistics.mean(low_rank_error(model, pair) for pair in fitted),
        "saved": [percent_saved(report.pairs, t, report.before) for t in GRID],
        "most": percent_saved(report.pairs, 1.0, report.before),
        "tolerance": {str(goal): tolerance_for(report, goal) for goal in GOALS},
    }


class Nothing(nn.Module):
    """A linear layer of zeros."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.rows)


def left_out(model: nn.Module, report: Report) -> None:
    """The targets of the pairs as zeros."""
    for pair in report.merged:
        owner, _, name = pair.target.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(owner), name, Nothing(pair.shape[0]))


def with_low_rank(model: nn.Module, report: Report) -> None:
    """The targets of the pairs as products of two, in the bytes of their Qs."""
    for pair in report.merged:
        owner, _, name = pair.target.removesuffix(".weight").rpartition(".")
        u, s, vh = torch.linalg.svd(model.get_parameter(pair.target).detach(), full_matrices=False)
        r = rank_of(pair)
        down, up = (nn.Linear(*shape, bias=False) for shape in ((pair.shape[1], r), (r, pair.shape[0])))
        down.weight.data, up.weight.data = vh[:r].clone(), u[:, :r] * s[:r]
        setattr(model.get_submodule(owner), name, nn.Sequential(down, up))


def losses(model: nn.Module, found: dict[str, Any], data: Words, test: Words, tune: int, seed: int) -> dict[str, Any]:
    """Of every form and goal that is reached: merged, then trained on; and what it is compared with."""
    rows: dict[str, Any] = {}

    def row(name: str, other: nn.Module, tolerance: float | None = None) -> None:
        percent = 100 * (1 - held(other) / held(model))
        after = loss_of(other, test)
        train(other, data, tune, TUNE_RATE, seed + 100)
        rows[name] = {"tolerance": tolerance, "saved": percent, "after": after, "tuned": loss_of(other, test)}
        print(f"  {name:32} saved {percent:5.1f} %  loss {after:.4f} -> {rows[name]['tuned']:.4f}", flush=True)

    row("untouched", copy.deepcopy(model))
    for name, form in FORMS.items():
        for goal in GOALS:
            if (tolerance := found[name]["tolerance"][str(goal)]) is None:
                continue
            other = copy.deepcopy(model)
            report = share_lossy(other, form=form, tolerance=tolerance, kinds=PAIRS)
            row(f"{name}, {goal} %", other, tolerance)
            left_out(other := copy.deepcopy(model), report)
            row(f"{name}, {goal} %, left out", other)
            if goal == GOALS[-1]:
                with_low_rank(other := copy.deepcopy(model), report)
                row(f"{name}, {goal} %, low rank", other)
    return rows


def planted(seed: int) -> dict[str, float]:
    """Odd layers are images of the even ones by 8 reflections, and noise of 1 %: merged under a tolerance of 2 %."""
    torch.manual_seed(seed)
    model = llama()
    weights = [(name, p.data) for name, p in model.named_parameters() if name.split(".")[-2] in KINDS]
    for name, target in weights:
        if ".layers.1." in name or ".layers.3." in name:
            number = int(name.split(".")[2])
            source = model.get_parameter(name.replace(f".{number}.", f".{number - 1}.")).data
            q = Householder(8).blank(len(source), source.dtype, source.device)
            torch.nn.init.normal_(q.vectors)
            image = q(source).detach()
            target.copy_(image + 0.01 * image.square().mean().sqrt() * torch.randn_like(image))
    report = share_lossy(model, form=Householder(8), tolerance=0.02)
    return {"merged": len(report.merged), "saved": 100 * (1 - report.after / report.before)}


def memory(rounds: int = 9) -> dict[str, Any]:
    """A step of 512 tokens: parameters, these with AdamW's states, the least budget that fits; eager peak and time."""
    tokens = torch.arange(512).remainder(97)[None]
    models = {"whole": llama(), "Blocks()": llama()}
    share_lossy(models["Blocks()"], form=Blocks(), tolerance=0.99)
    figures: dict[str, Any] = {}

    def step_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: model(input_ids=ids, labels=ids).loss

    for name, model in models.items():
        plan = memplan.plan(step_of(model), tokens, inner="eager", optimizer="adamw")
        try:
            memplan.plan(step_of(model), tokens, inner="eager", optimizer="adamw", budget=1000)
            raise AssertionError("1000 bytes are enough")
        except memplan.DoesNotFit as e:
            smallest = e.smallest
        with memplan.record("cpu") as seen:
            step_of(model)(tokens).backward()
        base = plan.step.base_bytes
        figures[name] = {
            "parameters": held(model), "base": base, "smallest": smallest,
            "eager": base + seen.timeline.peak_above_base,
        }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            step_of(model)(tokens).backward()
            taken[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}
    for name in models:
        figures[name] |= {"seconds": medians[name], "ratio": medians[name] / medians["whole"]}
    print(figures, flush=True)
    return figures


def study(seed: int, data: Words, test: Words, steps: int, tune: int) -> dict[str, Any]:
    """All figures of one seed."""
    torch.manual_seed(seed)
    model = llama()
    figures: dict[str, Any] = {}
    for weights in ("random", "trained"):
        if weights == "trained":
            train(model, data, steps, RATE, seed)
        figures[weights] = {
            "loss": loss_of(model, test),
            "least": least_errors(model),
            "forms": {name: errors(model, form) for name, form in FORMS.items()},
        }
        shown = {name: [f"{e:.3f}" for e in of["error"]] for name, of in figures[weights]["forms"].items()}
        print(f"seed {seed}, {weights}: loss {figures[weights]['loss']:.4f}, errors {shown}", flush=True)
    figures["losses"] = losses(model, figures["trained"]["forms"], data, test, tune, seed)
    figures["planted"] = planted(seed)
    print(f"  planted: {figures['planted']}", flush=True)
    return figures


def draw(figures: dict[str, Any], path: str) -> None:
    """Bytes saved by error; losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = figures["runs"]
    for name, colour in zip(FORMS, ("C0", "C1", "C2"), strict=True):
        for weights, style in (("random", ":"), ("trained", "-")):
            rows = zip(*(run[weights]["forms"][name]["saved"] for run in runs), strict=True)
            left.plot(GRID, [statistics.median(row) for row in rows], style, color=colour, label=f"{name}, {weights}")
    left.axhline(30, color="0.5", linewidth=1)
    left.text(0.02, 30.5, "claimed: 30 %", color="0.4")
    left.set(title="bytes that pairs under an error save, %", xlabel="relative error of merged weights", xlim=(0, 1))
    left.legend(fontsize=9)
    names = list(runs[0]["losses"])
    for key, colour, label in (("after", "C3", "merged"), ("tuned", "C0", "and trained on")):
        values = [[run["losses"][name][key] for run in runs if name in run["losses"]] for name in names]
        for y, row in enumerate(values):
            right.plot(row, [y] * len(row), "o", color=colour, alpha=0.7, label=label if y == 0 else None)
    before = statistics.median(run["trained"]["loss"] for run in runs)
    right.axvline(before, color="0.5", linewidth=1)
    right.set(title="loss; line: before", xscale="log", yticks=range(len(names)), yticklabels=names)
    right.invert_yaxis()
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)  # below: points are everywhere
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def main() -> int:
    """Run, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune", type=int, default=50)
    parser.add_argument("-o", "--out", default="benchmarks/results/sharing.json")
    parser.add_argument("--plot", default="docs/sharing.png")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    data = words(8000, seed=0)
    test = held_out(data)
    figures = {
        "seeds": asked.seeds, "steps": asked.steps, "tune": asked.tune, "batch": BATCH, "threads": 1,
        "words": [len(data[0]), len(test[0])], "parameters": held(llama()), "grid": GRID,
        "runs": [study(seed, data, test, asked.steps, asked.tune) for seed in range(asked.seeds)],
        "memory": memory(),
    }  # fmt: skip
    save(asked.out, figures | {"seconds": time.perf_counter() - began})
    draw(figures, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
