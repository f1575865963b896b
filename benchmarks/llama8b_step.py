"""Llama-3.1-8B's GRPO step from its config, on the meta device: 8 completions of 20,480 tokens.

    memplan plan benchmarks/llama8b_step.py:make_step --budget 80GB --host-budget 0 --machine h100

Nothing is allocated. The step does not fit without tiles: the logits alone are 84 GB in float32, and the command says
so and exits with 3. Prints nothing itself; `python benchmarks/llama8b_step.py -o FILE` measures the command.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memplan.grpo import GRPOConfig
from memplan.grpo import make_step as grpo_step

ROWS, TOKENS = 8, 20480


def make_model(layers: int = 32, **more: Any) -> LlamaForCausalLM:
    """The model on meta, in bfloat16; `more` goes into its config."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        use_cache=False,
        **more,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def make_batch() -> dict[str, torch.Tensor]:
    """The batch on meta."""
    with torch.device("meta"):
        return {
            "input_ids": torch.empty(ROWS, TOKENS, dtype=torch.int64),
            "completion_mask": torch.empty(ROWS, TOKENS - 1),
            "advantages": torch.empty(ROWS),
            "old_logprobs": torch.empty(ROWS, TOKENS - 1),
        }


def make_step() -> tuple[Callable[[Any], torch.Tensor], Any]:
    """The step and its batch."""
    return grpo_step(make_model(), GRPOConfig()), make_batch()


def main() -> None:
    """Run the command, and write its seconds and its largest resident memory."""
    import resource

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/llama8b_plan.json")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from benchmarks.machine import save

    start = time.perf_counter()
    command = ["plan", f"{__file__}:make_step", "--budget", "80GB", "--host-budget", "0", "--machine", "h100"]
    done = subprocess.run([sys.executable, "-m", "memplan", *command], capture_output=True, text=True)
    figures = {
        "command": " ".join(["memplan", *command[:1], "benchmarks/llama8b_step.py:make_step", *command[2:]]),
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "first_line": (done.stderr or done.stdout).strip().splitlines()[0],
    }
    print(figures)
    save(args.out, figures)


if __name__ == "__main__":
    main()
