"""Llama-3.1-8B, LoRA of rank 16 on all projections, 8 completions of 20,480 tokens: the least budget on an H100.

    python benchmarks/llama8b_lora.py [-o FILE]
    memplan plan benchmarks/llama8b_lora.py:streamed --tiles 4096 --budget 24GB --host-budget 400GB --machine h100

The model is on the meta device: nothing is allocated or run. The head with its loss and every MLP run in slices of
4,096 rows; activations may leave the device; `resident` keeps the frozen weights on the device, `streamed` fetches
them. Attention is torch's, causal by its own flag: transformers would build a mask of tokens x tokens in every layer.
Budgets include the CUDA context and the reserve against fragmentation; bytes are of the eager inner compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

import memplan
from benchmarks.llama8b_step import make_batch, make_model
from benchmarks.machine import save
from memplan.grpo import GRPOConfig
from memplan.grpo import make_step as grpo_step

RANK, SLICE = 16, 4096
HOST = "400GB"


class LoRA(nn.Module):
    """A frozen product with a trained one of low rank beside it (Hu et al. 2021), or alone while it is not `on`."""

    on = True

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(RANK, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.empty(base.out_features, RANK, dtype=base.weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x)
        return out + (x @ self.down.t()) @ self.up.t() if self.on else out


def adapted(layers: int) -> LlamaForCausalLM:
    """The model on meta, in bfloat16, with adapters on all projections of its layers."""
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    model = make_model(layers, attn_implementation="causal").requires_grad_(False)
    with torch.device("meta"):
        for owner in list(model.model.layers.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, LoRA(child))
    return model


def resident(layers: int = 32, *, stream: bool = False) -> tuple[Callable[[Any], torch.Tensor], Any]:
    """The step and its batch."""
    model = adapted(layers)
    if stream:
        memplan.stream(model)
    return grpo_step(model, GRPOConfig()), make_batch()


def streamed() -> tuple[Callable[[Any], torch.Tensor], Any]:
    """The step with its frozen weights off the device."""
    return resident(stream=True)


def least(layers: int, **options: Any) -> dict[str, Any]:
    """The smallest budget of a step, and how the plan inside it spends bytes and time."""
    start = time.perf_counter()
    step, batch = resident(layers, stream=options.pop("stream"))
    given = {"machine": "h100", "inner": "eager", "tiles": SLICE, **options}
    try:
        memplan.plan(step, batch, budget=1, **given)
        raise AssertionError("one byte was enough")
    except memplan.DoesNotFit as refused:
        smallest = refused.smallest
    seconds = time.perf_counter() - start
    plan = memplan.plan(step, batch, budget=smallest, **given)
    top = plan.timeline.alive()[0]
    return {
        "budget": smallest,
        "planned_peak": plan.peak,
        "weights_and_batch": plan.step.base_bytes,
        "off_device": plan.timeline.host_peak,
        "overhead": plan.overhead,
        "stalled_seconds": plan.timeline.stalled,
        "largest_at_the_peak": f"{top.name} {list(top.shape)} {top.dtype}, {top.bytes} bytes",
        "planning_seconds": round(seconds, 1),
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("-o", "--out", default="benchmarks/results/llama8b_lora.json")
    args = parser.parse_args()
    rows = {}
    for name, options in (
        ("resident, nothing off the device", {"stream": False, "host_budget": 0}),
        ("resident", {"stream": False, "host_budget": HOST}),
        ("streamed", {"stream": True, "host_budget": HOST}),
    ):
        rows[name] = least(args.layers, **options)
        print(name, rows[name], flush=True)
    save(args.out, {"layers": args.layers, "rows": rows})


if __name__ == "__main__":
    main()
