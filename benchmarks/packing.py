"""Tokens that a model computes for samples of several lengths: padded, packed, and with prompts that groups share.

    python benchmarks/packing.py [-o FILE]

Samples are groups of 8 completions of reasoning-gym's prompts, characters for tokens; the lengths of completions are
drawn from a log-normal distribution whose mean is that of the prompts, as no model here answers at length. Batches have
4,096 tokens, and 1,024, with groups split: sdpa on a CPU computes all pairs of a row, masked or not. `saved` is against
rows drawn at random and padded to the longest of them, in batches as large as always fit. Seconds are of an epoch's
forward and backward passes, eager, on one core, the median of three; `off_by` is the largest difference of a log-prob
from the padded batch's, in nats.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from memplan.grpo import CharTokenizer, Collate, GRPOConfig, TokenBatches, batch_logprobs, grpo_loss, make_tasks

TASKS, EACH, GROUP, SPREAD = ("chain_sum", "gcd", "spell_backward", "simple_equations"), 4, 8, 0.6
TOKENS = (4096, 1024)
TOKENIZER = CharTokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/packing.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = samples()
    lengths = [len(s["prompt"]) + len(s["completion"]) for s in rows]
    figures = {"samples": len(rows), "tokens": sum(lengths), "prompts": sum(len(s["prompt"]) for s in rows)}
    save(
        args.out,
        figures | {"group": GROUP, "ways": {str(tokens): compared(rows, lengths, tokens) for tokens in TOKENS}},
    )


def compared(rows: list[dict[str, Any]], lengths: list[int], tokens: int) -> dict[str, Any]:
    """Of batches of so many tokens."""
    model, found = small(), dict[str, dict[str, Any]]()
    how: dict[str, Any] = {"group": GROUP, "large_group": "split"}
    prompts = [len(s["prompt"]) for s in rows]
    for name, batches, collate in (
        ("padded", at_random(lengths, tokens), Collate(tokens, packed=False)),
        ("padded, sorted", TokenBatches(lengths, tokens, packed=False, **how), Collate(tokens, packed=False)),
        ("packed", TokenBatches(lengths, tokens, **how), Collate(tokens)),
        ("packed, shared prompts", TokenBatches(lengths, tokens, prompts=prompts, **how),
         Collate(tokens, shared_prompts=True)),
    ):  # fmt: skip
        made = [collate([rows[i] for i in batch]) for batch in batches]
        computed = sum(batch.get("packed_ids", batch["input_ids"]).numel() for batch in made)
        here = found[name] = {"batches": len(made), "computed": computed, "seconds": seconds(model, made)}
        if name.startswith("packed"):
            here["off_by"] = max(off_by(model, batch) for batch in made)
        here["saved"] = 1 - computed / found["padded"]["computed"]
        here["time"] = here["seconds"] / found["padded"]["seconds"]
        print(f"{tokens:5} {name:>24}: {computed:6} tokens, {here['saved']:6.1%} saved, time {here['time']:.2f}")
    return found


def samples() -> list[dict[str, Any]]:
    draw, made = random.Random(0), []
    for name in TASKS:
        for task in make_tasks(name, EACH):
            prompt = TOKENIZER.encode(task.prompt)
            for _ in range(GROUP):
                size = max(1, min(round(len(prompt) * draw.lognormvariate(-(SPREAD**2) / 2, SPREAD)), 1024))
                completion = [draw.randrange(2, TOKENIZER.vocab_size) for _ in range(size)]
                old = [-4.6] * size
                made.append(
                    {"prompt": prompt, "completion": completion, "old_logprobs": old, "advantage": draw.gauss(0, 1)}
                )
    return made


def at_random(lengths: list[int], tokens: int) -> list[list[int]]:
    """As many rows in each batch as fit at the largest length, in any order."""
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    rows = tokens // max(lengths)
    return [order[k : k + rows] for k in range(0, len(order), rows)]


def small() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=max(TOKENS),
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def seconds(model: Any, batches: list[Any]) -> float:
    found = []
    for _ in range(3):
        started = time.perf_counter()
        for batch in batches:
            model.zero_grad()
            grpo_loss(model, batch, GRPOConfig()).backward()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def off_by(model: Any, batch: Any) -> float:
    padded = {name: value for name, value in batch.items() if not name.startswith("packed")}
    with torch.no_grad():
        pair = [batch_logprobs(model, b) * batch["completion_mask"] for b in (batch, padded)]
    return float((pair[0] - pair[1]).abs().max())


if __name__ == "__main__":
    main()
