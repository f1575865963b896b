"""Peak and time of TRL's GRPO step, its own and planned: TRL's real trainer, and the same data for all.

    python benchmarks/trl_step.py [--tokens 128] [--steps 4] [-o FILE]

A six-layer Llama with a vocabulary of 32,768, groups of four completions of `tokens` tokens. What is measured is a
training step without generation: loss, backward; bytes are the allocator's, by memplan.record, with parameters,
gradients and the states of AdamW. TRL is run with and without its activation checkpointing, on which it is by default;
memplan at a budget of a share of TRL's own peak without it, and at the least budget accepted. `inner="eager"`.
Exit code 1 when a planned peak is over its budget.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))

import memplan
from benchmarks.machine import save
from memplan.grpo.trl import planned

MIB = 2**20
VOCABULARY, GROUP, PROMPT = 32768, 4, 16


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def trainer(tokens: int, steps: int, folder: str, checkpointing: bool) -> GRPOTrainer:
    """Completions are drawn, not generated, which takes most of the time and is not measured."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=GROUP, num_generations=GROUP, max_steps=steps, seed=0,
        max_completion_length=tokens - PROMPT, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=checkpointing, logging_steps=1, learning_rate=1e-4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    prompts = [
        " ".join(f"w{i}" for i in torch.randint(2, 999, (PROMPT - n % 2,), generator=generator)) for n in range(8)
    ]

    def draw(prompts: list[str], trainer: Any) -> dict[str, Any]:
        drawn = [torch.randint(2, VOCABULARY, (tokens - PROMPT,), generator=generator).tolist() for _ in prompts]
        return {
            "prompt_ids": trainer.processing_class(text=prompts)["input_ids"],
            "completion_ids": drawn,
            "logprobs": [[0.0] * len(c) for c in drawn],
        }

    return GRPOTrainer(
        AutoModelForCausalLM.from_config(config),
        lambda completion_ids, **_: [float(c[0] % 7) for c in completion_ids],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
        rollout_func=draw,
    )


def measured(made: GRPOTrainer) -> dict[str, Any]:
    """Peak of the last step, and the median seconds of those between the second and it."""
    seconds, peaks = list[float](), list[int]()
    step, total = made.training_step, made.args.max_steps

    def held() -> int:
        states = [v for of in made.optimizer.state.values() for v in of.values() if isinstance(v, torch.Tensor)]
        parameters = list(made.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return sum(t.nbytes for t in [*parameters, *gradients, *states])

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = step(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if len(seconds) < total - 1:
            return timed(*args, **kwargs)
        before = held()
        with memplan.record("cpu") as seen:
            result = step(*args, **kwargs)
        peaks.append(before + seen.timeline.peak_above_base)
        return result

    made.training_step = recorded
    made.train()
    norms = [entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry]
    return {
        "peak": peaks[-1],
        "seconds": round(statistics.median(seconds[2:]), 3),
        "gradient_norms": norms,
        "held": held(),
    }


def least(make: Callable[[], GRPOTrainer]) -> tuple[int, dict[str, Any]]:
    """The budget that the errors name, until there is none."""
    budget = 1
    for _ in range(6):
        try:
            return budget, measured(planned(make(), budget=budget, inner="eager"))
        except memplan.DoesNotFit as refused:
            torch._dynamo.reset()
            budget = refused.smallest
    raise AssertionError("every budget that was named was refused")


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("-o", "--out", default="benchmarks/results/trl_step.json")
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:

        def make(checkpointing: bool = False) -> GRPOTrainer:
            torch._dynamo.reset()
            return trainer(args.tokens, args.steps, folder, checkpointing)

        def note(name: str, budget: int | None, result: dict[str, Any]) -> None:
            found[name] = {"budget": budget} | result
            norms = result["gradient_norms"]
            print(f"{name}: {result['peak'] / MIB:.1f} MiB, {result['seconds']} s, norms {norms}", flush=True)

        note("trl", None, measured(make()))
        note("trl, activation checkpointing", None, measured(make(True)))
        own = found["trl"]["peak"]
        budget = int(0.4 * own)
        note("memplan, 40 % of trl", budget, measured(planned(make(), budget=budget, inner="eager")))
        note("memplan, least", *least(make))
    for result in found.values():
        result["share"] = round(result["peak"] / own, 3)
    save(args.out, {"tokens": args.tokens, "group": GROUP, "vocabulary": VOCABULARY, "found": found})
    return int(any(r["budget"] is not None and r["peak"] > r["budget"] for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())
