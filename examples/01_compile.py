"""Run a GRPO step inside a budget: one argument of torch.compile.

    pip install -e . && python examples/01_compile.py

Prints the measured peak of the step, plain and planned, and the norm of the gradient, which stays the same.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import memplan
from memplan.grpo import CharTokenizer, GRPOConfig, make_step, make_tasks, rollout

BUDGET = "5MB"


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

    planned = torch.compile(step, backend="memplan", options={"budget": BUDGET, "inner": "eager"})
    for name, run in {"plain": step, f"inside {BUDGET}": planned}.items():
        run(batch).backward()  # the first call compiles
        model.zero_grad()
        with memplan.record() as seen:
            run(batch).backward()
        norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()
        print(f"{name:>12}: peak {seen.timeline.peak / 1e6:.2f} MB, gradient norm {norm:.9f}")


if __name__ == "__main__":
    main()
