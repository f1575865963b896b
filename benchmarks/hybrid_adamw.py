"""AdamW with moments in bfloat16 and float32: bytes of states, the final loss, and the time of a step.

    python benchmarks/hybrid_adamw.py [--seeds 5] [--steps 300] [-o FILE]

Two problems. "classic": 10 classes of 2,000 points of 256 features, by a hidden layer of 256; a tenth of the labels
are random. "learning": a language model of two layers on sequences of a random Markov chain of 64 symbols. For each
seed torch's AdamW (foreach) and each rule start from the same weights and see the same batches. The loss is that of the
last weights on held-out data; its difference is in % of AdamW's. AdamW with other batches says what chance alone does.
"Loss / 1000" multiplies the loss by that before backward, which changes no update of Adam but eps's, and every
gradient. Bytes are those of the states' storages at the end, in % of AdamW's. Time: steps of each kind in turn, one
thread, medians; ratios to AdamW's foreach.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from memplan.runtime.optim import HybridAdamW
from memplan.runtime.optimizers import states

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
LR = {"classic": 1e-3, "learning": 3e-3}
RULES: dict[str, dict[str, Any]] = {
    "float32": {"share": 0.0},
    "threshold 1e-3": {"threshold": 1e-3},
    "threshold 1e-3, loss / 1000": {"threshold": 1e-3},
    "share 0.84": {"share": 0.84},
    "share 1": {"share": 1.0},
}


@dataclass(frozen=True)
class Problem:
    """`batches(seed, steps)` are inputs and targets; `loss(inputs, targets)`; `held_out`: what the end is judged by."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], torch.Tensor]
    batches: Callable[[int, int], Iterator[Any]]
    held_out: Any


def classic(seed: int) -> Problem:
    """A hidden layer of 256, tanh, 10 classes; labels by a random net, a tenth of them random."""
    torch.manual_seed(1000 + seed)
    teacher = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10))
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3)
        x = torch.randn(4000, 256)
        y = teacher(x).argmax(1)
    y = torch.where(torch.rand(4000) < 0.1, torch.randint(10, (4000,)), y)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))

    def batches(order: int, steps: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(order)
        for _ in range(steps):
            rows = torch.randint(2000, (64,), generator=generator)
            yield x[rows], y[rows]

    return Problem(model, lambda net, b: F.cross_entropy(net(b[0]), b[1]), batches, (x[2000:], y[2000:]))


class Tiny(nn.Module):
    """A causal language model: embedding, two blocks of attention and MLP of width 64, head."""

    def __init__(self, vocabulary: int = 64, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(32, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(2)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [batch, length] -> logits [batch, length, vocabulary]"""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for of in self.layers:
            q, k, v = (
                t.unflatten(-1, (4, -1)).transpose(1, 2) for t in of["qkv"](of["norm"](x)).chunk(3, dim=-1)
            )  # fmt: skip
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + of["out"](y.transpose(1, 2).flatten(2))
            x = x + of["down"](F.gelu(of["up"](of["norm2"](x))))
        return self.head(self.norm(x))


def learning(seed: int) -> Problem:
    """Each symbol follows the one before by a random table, peaked."""
    torch.manual_seed(2000 + seed)
    table = torch.softmax(3 * torch.randn(64, 64), dim=1)
    model = Tiny()

    def sample(generator: torch.Generator, count: int) -> torch.Tensor:
        tokens = torch.randint(64, (count, 1), generator=generator)
        while tokens.shape[1] < 33:
            next_one = torch.multinomial(table[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, next_one], dim=1)
        return tokens

    def batches(order: int, steps: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(order)
        for _ in range(steps):
            yield sample(generator, 16)

    def loss(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Problem(model, loss, batches, sample(torch.Generator().manual_seed(10**6 + seed), 512))


def trained(
    problem: Problem, start: dict[str, torch.Tensor], make: Make, order: int, steps: int, scale: float = 1.0
) -> tuple[float, int]:
    """The loss at the end, and bytes of states."""
    problem.model.load_state_dict(start)
    optimizer = make(problem.model.parameters())
    for batch in problem.batches(order, steps):
        optimizer.zero_grad()
        (scale * problem.loss(problem.model, batch)).backward()
        optimizer.step()
    with torch.no_grad():
        end = problem.loss(problem.model, problem.held_out).item()
    return end, sum(t.untyped_storage().nbytes() for t in states(optimizer))


def study(name: str, make: Callable[[int], Problem], seeds: int, steps: int) -> dict[str, Any]:
    """Differences of the last loss and bytes, in % of AdamW's, for each rule and seed."""
    rows: dict[str, dict[str, list[float]]] = {}
    losses = []
    for seed in range(seeds):
        problem = make(seed)
        start = {key: value.clone() for key, value in problem.model.state_dict().items()}

        def adamw(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=LR[name], foreach=True)

        loss, size = trained(problem, start, adamw, seed, steps)
        losses.append(loss)
        others: dict[str, tuple[Make, int]] = {"AdamW, other batches": (adamw, seed + 10**5)}
        for rule, options in RULES.items():
            others[rule] = (functools.partial(HybridAdamW, lr=LR[name], every=20, seed=seed, **options), seed)
        for rule, (maker, order) in others.items():
            other, held = trained(problem, start, maker, order, steps, 1e-3 if "/ 1000" in rule else 1.0)
            row = rows.setdefault(rule, {"loss_percent": [], "bytes_percent": []})
            row["loss_percent"].append(100 * (other / loss - 1))
            row["bytes_percent"].append(100 * (held / size - 1))
        print(name, seed, f"{loss:.4f}", {r: f"{v['loss_percent'][-1]:+.3f} %" for r, v in rows.items()}, flush=True)
    return {"loss": losses, "adamw_bytes": size, "rules": rows}


def times(rounds: int) -> dict[str, Any]:
    """Seconds of a step, and ratios to AdamW's, for shapes as they come in models."""
    shapes = {
        "8 of 1024 x 1024": [(1024, 1024)] * 8,
        "a language model's, 8.3 million values": [(8000, 512)] + [(512, 512)] * 16 + [(512,)] * 16,
        "80 tensors, 166 thousand values": [(64, 64), (64,)] * 40,
    }
    found = {}
    for name, sizes in shapes.items():
        kinds: dict[str, torch.optim.Optimizer] = {}
        for kind in ("AdamW", *(rule for rule in RULES if rule.startswith(("share", "float32")))):
            torch.manual_seed(0)
            ps = [nn.Parameter(torch.randn(size)) for size in sizes]
            for p in ps:
                blocks = torch.rand(-(-p.numel() // 256)).repeat_interleave(256)[: p.numel()]
                p.grad = 1e-3 * torch.randn_like(p) * blocks.view_as(p)
            kinds[kind] = torch.optim.AdamW(ps, foreach=True) if kind == "AdamW" else HybridAdamW(ps, **RULES[kind])
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds + 2):
            for kind, optimizer in kinds.items():
                began = time.perf_counter()
                optimizer.step()
                taken[kind].append(time.perf_counter() - began)
        medians = {kind: statistics.median(seconds[2:]) for kind, seconds in taken.items()}
        found[name] = {k: {"seconds": s, "ratio": s / medians["AdamW"]} for k, s in medians.items()}
        print(name, {k: f"{v['ratio']:.2f}" for k, v in found[name].items()}, flush=True)
    return found


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-o", "--out", default="benchmarks/results/hybrid_adamw.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    problems = {"classic": classic, "learning": learning}
    figures = {name: study(name, make, asked.seeds, asked.steps) for name, make in problems.items()}
    save(
        asked.out,
        {
            "steps": asked.steps, "seeds": asked.seeds, "rounds": asked.rounds, "threads": 1,
            "problems": figures, "times": times(asked.rounds),
        },
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
