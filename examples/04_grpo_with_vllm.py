"""GRPO with a vLLM engine in the same process: one copy of the weights, one budget that both share in turn.

    pip install -e . && .ci/install_vllm_cpu python && python examples/04_grpo_with_vllm.py

A step is a rollout with the KV cache on the device, and a planned train step with the optimizer's states there instead.
Prints for each the mean reward, how far the engine's log-probs are from the trainer's, and the memory of both phases
above what the process had before.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from memplan import memory
from memplan.grpo import CharTokenizer, GRPOConfig, make_step, make_tasks, score, token_logprobs
from memplan.runtime.ledger import Ledger
from memplan.runtime.tenants import Reserved, moved_in
from memplan.runtime.vllm import InProcess

MIB = 2**20
CACHE, RUNNING = 64 * MIB, 48 * MIB  # of a rollout: the KV cache, and what the engine takes besides while it generates
TRAINING, SPARE = 112 * MIB, 12 * MIB  # of a step: activations, gradients, optimizer states; of it, what malloc wastes
NEW_TOKENS, LENGTH, GROUP = 16, 64, 8


class Seen(NamedTuple):
    """One step. Bytes: of both phases above the process's own; of the KV cache in rollout and before a step."""

    reward: float
    off_by: float  # nats, the largest of all tokens
    rollout: int
    train: int
    cache: tuple[int, int]
    copied: int  # parameters that are not shared


def train(steps: int) -> Iterator[Seen]:
    """Train a small Llama to spell words backward."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    before = memory.resident()
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        engine = InProcess.start(folder, CACHE, skip_tokenizer_init=True, max_model_len=LENGTH, dtype="float32")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    shared = engine.share(model)  # the engine's weights, and no others
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    ledger = Ledger(engine.fixed + engine.weight_bytes + max(CACHE + RUNNING, TRAINING))
    engine.join(ledger, running=RUNNING)
    ledger.lease("allocator", Reserved(), SPARE, ("train",))
    options = {
        "budget": ledger.budget_for("train", own=("weights",)),
        "inner": "eager",
        "optimizer": optimizer,
    }
    step = torch.compile(make_step(model, GRPOConfig()), backend="memplan", options=options)

    tasks = make_tasks(count=8, max_word_len=8)
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    for number in range(steps):
        with ledger.phase("rollout"):
            found = engine.generate(prompts, n=GROUP, max_tokens=NEW_TOKENS, stop_token_ids=[tokenizer.eos])
            rolling, cache = memory.resident() - before, engine.resident
        rolled = score(tasks, tokenizer, [c.tokens for c in found], [c.logprobs for c in found], length=LENGTH)
        with ledger.phase("train"):
            with torch.no_grad():
                ours = token_logprobs(model, rolled.batch["input_ids"])
            off = (ours - rolled.batch["old_logprobs"]).abs() * rolled.batch["completion_mask"]
            del ours
            away = engine.resident
            ledger.prefetch("rollout")  # the KV cache comes back as backward leaves room
            step(rolled.batch).backward()
            training = memory.resident() - before
            optimizer.step()
            optimizer.zero_grad()
        if number == 0:  # what the first step compiled stays, and the optimizer has its states
            ledger.accept()
            states = moved_in(s for of in optimizer.state.values() for s in of.values())
            ledger.lease("optimizer", states, states.arena.size, ("train",))
        yield Seen(
            float(rolled.rewards.mean()), float(off.max()), rolling, training, (cache, away),
            len(shared.copied),
        )  # fmt: skip
    ledger.close()
    engine.close()


def main(steps: int = 5) -> None:
    for number, seen in enumerate(train(steps)):
        print(
            f"step {number}: reward {seen.reward:.3f}, log-probs within {seen.off_by:.1e}, "
            f"rollout {seen.rollout / MIB:.0f} MiB, training {seen.train / MIB:.0f} MiB"
        )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(*map(int, sys.argv[1:]))
