"""Peak and time of transformers' Trainer, alone and planned: real optimizer steps, the same data and seed for all.

    python benchmarks/hf_trainer.py [--tokens 256] [--steps 6] [-o FILE]

A six-layer Llama with a vocabulary of 32,768, 4 sequences of `tokens` tokens, AdamW. A step is forward, loss, backward,
clipping and optimizer; bytes are the allocator's, by memplan.record, with parameters, gradients, states and batch, and
every step counts but the first, in which a planned one is compiled. The Trainer runs with and without its activation
checkpointing; memplan at shares of its own peak without it, and at the least budget that is accepted, without slices,
where losses and weights must be the Trainer's to the bit, and with tiles="auto". inner="eager", one thread.
A second table is of the ways to fit a model (memplan.fit), at the least budget of each: its loss inside, with and
without its logits returned, and outside of it.
Exit code 1 when a planned peak is over its budget, or a bit is another.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))

import memplan
from benchmarks.machine import save
from memplan.hf import planned

MIB = 2**20
VOCABULARY, ROWS = 32768, 4


class Measured(TrainerCallback):
    """Peak and seconds of each step but the first. Recording takes time: the two are of different steps."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.peaks: list[int] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.recording = None
        if state.global_step % 2:
            self.held = held(given["model"], given["optimizer"]) + self.batch
            self.recording = memplan.record("cpu")
            self.seen = self.recording.__enter__()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recording is not None:
            self.recording.__exit__(None, None, None)
            self.peaks.append(self.held + self.seen.timeline.peak_above_base)
        elif state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.start)


def held(model: nn.Module, optimizer: Any) -> int:
    """Bytes of parameters, buffers that are read, and states."""
    states = [v for of in optimizer.state.values() for v in of.values() if isinstance(v, torch.Tensor)]
    buffers = [b for name, b in model.named_buffers() if "original" not in name]  # a second copy, which no step reads
    return sum(t.nbytes for t in [*model.parameters(), *buffers, *states])


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.train()


def trainer(tokens: int, steps: int, folder: str, checkpointing: bool = False) -> Trainer:
    rows = torch.randint(2, VOCABULARY, (4 * ROWS, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=ROWS, max_steps=steps, seed=0, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-4,
        activation_checkpointing=checkpointing,
    )  # fmt: skip
    dataset = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    return Trainer(language_model(), args=args, train_dataset=dataset)


def measured(made: Trainer, tokens: int) -> dict[str, Any]:
    """What one run takes, its losses, and its weights."""
    seen = Measured(2 * 8 * ROWS * tokens)
    made.add_callback(seen)
    made.train()
    return {
        "peak": max(seen.peaks),
        "seconds": round(statistics.median(seen.seconds), 3),
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "weights": [p.detach().clone() for p in made.model.parameters()],
    }


def least(run: Callable[[int], Any]) -> tuple[int, Any]:
    """The budget that refusals name, until there is none, and what the run at it returns."""
    budget = 1
    for _ in range(8):
        torch._dynamo.reset()
        try:
            return budget, run(budget)
        except memplan.DoesNotFit as refused:
            budget = refused.smallest
    raise AssertionError("every budget that was named was refused")


def fitted_peak(tokens: int, outside: bool, budget: int, **options: Any) -> int:
    """The peak of two steps of a fitted model, without an optimizer, after two that are not measured."""
    model = memplan.fit(language_model(), budget, inner="eager", show=None, **options)
    ids = torch.randint(2, VOCABULARY, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    peak = 0
    for step in range(4):
        model.zero_grad()
        there = held(model, torch.optim.SGD(model.parameters())) + ids.nbytes
        recording = memplan.record("cpu") if step > 1 else None
        seen = recording.__enter__() if recording else None
        if outside:
            logits = model(input_ids=ids, use_cache=False).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            del logits
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if recording and seen:
            recording.__exit__(None, None, None)
            peak = max(peak, there + seen.timeline.peak_above_base)
    return peak


WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "loss inside, tiles": (False, {"tiles": "auto"}),
    "loss inside": (False, {}),
    "loss inside, logits returned too": (False, {"keep": "logits"}),
    "loss outside": (True, {}),
}


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("-o", "--out", default="benchmarks/results/hf_trainer.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(budget: int | None, checkpointing: bool = False, **options: Any) -> dict[str, Any]:
            torch._dynamo.reset()
            made = trainer(args.tokens, args.steps, folder, checkpointing)
            if budget is not None:
                made = planned(made, budget=budget, inner="eager", **options)
            return measured(made, args.tokens)

        def note(name: str, budget: int | None, result: dict[str, Any], like: dict[str, Any] | None = None) -> None:
            weights = result.pop("weights")
            same = None if like is None else all(map(torch.equal, weights, like["weights"]))
            same = same and result["losses"] == like["losses"] if like else same
            found[name] = {"budget": budget, "same": same} | result
            print(f"{name}: {result['peak'] / MIB:.1f} MiB, {result['seconds']} s, same: {same}", flush=True)

        alone = run(None)
        own = alone["peak"]
        note("Trainer", None, dict(alone))
        note("Trainer, activation checkpointing", None, run(None, True), alone)
        note("memplan, 90%", int(0.9 * own), run(int(0.9 * own)), alone)
        note("memplan, least", *least(run), alone)
        note("memplan, tiles, 60%", int(0.6 * own), run(int(0.6 * own), tiles="auto"))
        note("memplan, tiles, least", *least(lambda budget: run(budget, tiles="auto")))
    for result in found.values():
        result["share"] = round(result["peak"] / own, 3)
    ways = {}
    for name, (outside, options) in WAYS.items():
        budget, peak = least(lambda b, outside=outside, o=options: fitted_peak(args.tokens, outside, b, **o))
        ways[name] = {"budget": budget, "peak": peak}
        print(f"fit, {name}: least budget {budget / MIB:.1f} MiB, peak {peak / MIB:.1f} MiB", flush=True)
    save(args.out, {"tokens": args.tokens, "rows": ROWS, "vocabulary": VOCABULARY, "trainer": found, "fit": ways})
    over = any(r["budget"] is not None and r["peak"] > r["budget"] for r in [*found.values(), *ways.values()])
    return int(over or any(r["same"] is False for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())
