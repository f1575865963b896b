"""TRL's GRPOTrainer with a vLLM engine in the same process: one copy of the weights, one budget, taken in turn.

    pip install -e ".[test]" && .ci/install_vllm_cpu python && python examples/06_trl_with_vllm.py

Trains a small Llama to write vowels. A step of TRL's is a rollout with the KV cache on the device, and a planned train
step with the optimizer's states there instead. Prints for each the mean reward, and how far the engine's log-probs are
from the trainer's.
"""

import os
import string
import sys
import tempfile
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # TRL imports vLLM, which reads it

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from memplan.grpo.trl import planned
from memplan.runtime.ledger import Ledger
from memplan.runtime.tenants import Reserved
from memplan.runtime.vllm import InProcess

MIB = 2**20
CACHE, RUNNING = 96 * MIB, 24 * MIB  # of a rollout: the KV cache, and what the engine takes besides while it generates
TRAINING, SPARE = 128 * MIB, 24 * MIB  # of a step: activations, gradients, optimizer states; of it, what malloc wastes
NEW_TOKENS, LENGTH, COMPLETIONS = 60, 64, 32


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    alphabet = ["<pad>", "<eos>", *string.ascii_lowercase]
    model = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def vowels(completions: list[str], **_: object) -> list[float]:
    """The reward: how many of the letters are vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def run(steps: int) -> tuple[GRPOTrainer, Ledger, InProcess]:
    """A trainer that has not trained yet, with its ledger and its engine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products
    config = LlamaConfig(
        vocab_size=28, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = InProcess.start(folder, CACHE, max_model_len=LENGTH, max_num_seqs=COMPLETIONS, dtype="float32")
    args: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=COMPLETIONS, num_generations=8, max_steps=steps,
        max_completion_length=NEW_TOKENS, learning_rate=1e-3, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model,
        vowels,
        args=GRPOConfig(**args),
        train_dataset=Dataset.from_dict({"prompt": [string.ascii_lowercase[i : i + 4] for i in range(16)]}),
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)  # of all that is logged main() prints the most telling
    engine.share(model)  # the engine's weights, and no others
    ledger = Ledger(engine.fixed + engine.weight_bytes + max(CACHE + RUNNING, TRAINING))
    engine.join(ledger, running=RUNNING)
    ledger.lease("allocator", Reserved(), SPARE, ("train",))
    planned(trainer, ledger=ledger, engine=engine, inner="eager", limits={"tokens": LENGTH})
    return trainer, ledger, engine


def main(steps: int = 5) -> None:
    trainer, ledger, engine = run(steps)
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            off = entry["sampling/sampling_logp_difference/max"]
            print(f"step {entry['step']}: reward {entry['reward']:.3f}, log-probs within {off:.1e}")
    ledger.close()
    engine.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
