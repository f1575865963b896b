"""Run a GRPO step inside a budget: one argument of torch.compile.

    pip install -e . && python examples/01_compile.py

Prints the loss and the measured peak of the step, unplanned and planned.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import memplan
from memplan.grpo import CharTokenizer, GRPOConfig, make_step, make_tasks, rollout

BUDGET = "@@"


def main() -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    model = AutoModelForCausalLM.from_config(config)
    batch = rollout(model, make_tasks(count=2), tokenizer, group_size=4).batch
    step = make_step(model, GRPOConfig())

    unplanned = torch.compile(step, backend="aot_eager")
    planned = torch.compile(step, backend="memplan", options={"budget": BUDGET, "inner": "eager"})
    for name, compiled in {"unplanned": unplanned, f"inside {BUDGET}": planned}.items():
        for _ in range(2):  # the first call compiles, the second is what a training run repeats
            model.zero_grad()
            with memplan.record() as seen:
                loss = compiled(batch)
                loss.backward()
        print(f"{name:>14}: loss {loss.item():+.6f}, peak {seen.timeline.peak / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
