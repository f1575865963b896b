"""LoRA beside a vLLM engine: how far its log-probs are from the trainer's, and what adapters cost in a rollout.

    python benchmarks/lora.py [--steps 5] [-o FILE]

On the CPU; needs vLLM (.ci/install_vllm_cpu) and PEFT. Six small models, adapters of rank 8 and 16, rslora or not, on
all linear layers or on q and v; after each step of their optimizer, temperatures 1 and 0.7. Seconds are of 16
completions of 64 tokens by a six-layer Llama, rank 16 on all linear layers, medians of rounds in turn with and
without adapters; and the same with vLLM's own LoRA, which has a copy of them. Exit code 1 where log-probs differ by
1e-5 nats or more.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import save
from memplan.grpo import token_logprobs
from memplan.runtime.vllm import InProcess

MODELS = {"llama": False, "qwen2": False, "qwen2, tied": True, "qwen3": False, "mistral": False, "gemma": True}
SMALL = {
    "vocab_size": 131, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
SPECIAL = {"max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
LARGER = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
ROUNDS = 9
MIB = 2**20


def started(config: Any, **options: Any) -> tuple[InProcess, Any]:
    """An engine, and a model of the same random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    usual = {"skip_tokenizer_init": True, "max_model_len": 128, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return InProcess.start(folder, 64 * MIB, **usual, **options), model


def agreement(name: str, tied: bool, steps: int) -> dict[str, float]:
    """Nats between engine and trainer, the largest of all tokens, by adapter."""
    config = AutoConfig.for_model(name.partition(",")[0], **SMALL, **SPECIAL, tie_word_embeddings=tied)
    engine, base = started(config)
    prompts, found = [[3, 4, 5, 6 + k] for k in range(4)], dict[str, float]()
    for r, rslora, targets in itertools.product((8, 16), (False, True), ("all-linear", ["q_proj", "v_proj"])):
        made = LoraConfig(r=r, use_rslora=rslora, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(base, made).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if engine.share(model).copied:
            raise SystemExit(f"{name}: weights are copied")
        worst = 0.0
        for _ in range(steps):
            for temperature in (1.0, 0.7):
                for c in engine.generate(prompts, max_tokens=16, ignore_eos=True, temperature=temperature):
                    ids = torch.tensor([[*prompts[c.prompt], *c.tokens]])
                    with torch.no_grad():
                        ours = token_logprobs(model, ids, temperature)[0, len(prompts[0]) - 1 :]
                    worst = max(worst, float((ours - torch.tensor(c.logprobs)).abs().max()))
            model(input_ids=torch.tensor(prompts), labels=torch.tensor(prompts)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[f"r={r}, {'rslora, ' if rslora else ''}{targets if targets == 'all-linear' else 'q and v'}"] = worst
        base = model.unload()
    engine.close()
    return found


def seconds() -> dict[str, float]:
    """Of a rollout, median: with adapters and without."""
    config = AutoConfig.for_model("llama", **LARGER, **SPECIAL)
    prompts = [[3, 4, 5, 6 + k] for k in range(16)]
    how: dict[str, Any] = {"max_tokens": 64, "ignore_eos": True, "seed": 1}
    engine, base = started(config)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).eval()

    def without() -> None:
        with model.disable_adapter():
            engine.generate(prompts, **how)

    engine.share(model)
    ours = in_turn(lambda: engine.generate(prompts, **how), without)
    engine.close()

    theirs, _ = started(config, enable_lora=True, max_lora_rank=16)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)

        def run(request: Any) -> None:
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            how_asked = SamplingParams(**how, logprobs=0, detokenize=False)
            theirs.llm.generate(asked, how_asked, lora_request=request, use_tqdm=False)

        own = in_turn(lambda: run(LoRARequest("adapter", 1, folder)), lambda: run(None))
    theirs.close()
    return {"adapters": ours[0], "disabled": ours[1], "vllm_lora": own[0], "vllm_lora_without": own[1]}


def in_turn(*runs: Callable[[], object]) -> list[float]:
    """Median seconds of each, after one round."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
        for run, of in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            of.append(time.perf_counter() - start)
    return [statistics.median(of[1:]) for of in taken]


def main() -> int:
    """Run, print, write; 1 if engine and trainer differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("-o", "--out", default="benchmarks/results/lora.json")
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)  # products are small: two threads wait for each other
    off_by = {name: agreement(name, tied, asked.steps) for name, tied in MODELS.items()}
    worst = max(value for of in off_by.values() for value in of.values())
    rollout = seconds()
    print(f"{sum(map(len, off_by.values()))} cases of {asked.steps} steps: within {worst:.1e} nats", rollout, sep="\n")
    save(asked.out, {"steps": asked.steps, "off_by_nats": worst, "off_by": off_by, "rollout_seconds": rollout})
    return 1 if worst >= 1e-5 else 0


if __name__ == "__main__":
    sys.exit(main())
