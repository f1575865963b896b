"""TRL's GRPOTrainer inside a budget: one line more.

    pip install -e ".[test]" && python examples/05_trl.py

Trains a small Llama to write vowels, first by TRL alone and then planned, and prints for each the measured peak of the
last step's loss and backward, above what the process held before it.
"""

import string
import tempfile
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import memplan
from memplan.grpo.trl import planned

BUDGET = "10MB"  # with parameters, gradients and AdamW's states


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    alphabet = ["<pad>", "<eos>", *string.ascii_lowercase]
    model = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def vowels(completions: list[str], **_: object) -> list[float]:
    """The reward: how many of the letters are vowels."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


class Measured(GRPOTrainer):
    """TRL's trainer, which records the last of its steps, and no generation."""

    peak = 0

    def training_step(self, model, inputs, num_items_in_batch):
        inputs = self._prepare_inputs(inputs)
        self._prepare_inputs, prepare = lambda given: given, self._prepare_inputs
        try:
            if self.state.global_step < self.args.max_steps - 1:
                return super().training_step(model, inputs, num_items_in_batch)
            with memplan.record() as seen:
                loss = super().training_step(model, inputs, num_items_in_batch)
            self.peak = seen.timeline.peak_above_base
            return loss
        finally:
            self._prepare_inputs = prepare


def trainer(folder: str, steps: int) -> Measured:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small products
    config = LlamaConfig(
        vocab_size=28, hidden_size=128, intermediate_size=352, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=8, num_generations=8, max_completion_length=32, max_steps=steps,
        learning_rate=3e-3, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    prompts = [string.ascii_lowercase[i : i + 4] for i in range(16)]
    return Measured(
        AutoModelForCausalLM.from_config(config),
        vowels,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )


def main(steps: int = 4) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # names of transformers' own that TRL still uses
    with tempfile.TemporaryDirectory() as folder:
        for name in ("TRL alone", f"inside {BUDGET}"):
            made = trainer(folder, steps)
            if name != "TRL alone":
                planned(made, budget=BUDGET, inner="eager", limits={"tokens": 36})
            made.train()
            rewards = [entry["reward"] for entry in made.state.log_history if "reward" in entry]
            print(f"{name:>12}: peak {made.peak / 1e6:.2f} MB, reward {rewards[0]:.3f} to {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
