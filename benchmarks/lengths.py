"""200 steps whose lengths change from one to the next, inside one budget: how many plans, and does any peak exceed it?

    python benchmarks/lengths.py [--steps 200] [--longest 2048] [--limits] [-o FILE]

A Llama of one layer; lengths are log-uniform from 16 to the longest, in random order, and the budget is 1.05 times the
smallest that the longest length needs. The eager inner compiler runs the plans. Every step runs once to be planned for
and once more to be recorded. Peaks are measured by memplan.record, with parameters and batch. Exit code 1 when a peak
is over the budget, when more than four plans were made, or when Python's objects hold on to tensors: the allocator's
bytes between steps must be the same at the end as after the first ten steps.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from tests.models import Rollout, Sample, language_model

VOCABULARY = 128


def model() -> Sample:
    """The smallest Llama that has every part of one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32768,
    )  # fmt: skip
    return language_model(config, torch.float32, completions=2, tokens=16)


def of_length(tokens: int) -> Rollout:
    """Two completions of `tokens` tokens."""
    return Rollout(torch.randint(VOCABULARY, (2, tokens)), torch.tensor([-1.0, 1.0]), torch.full((2, tokens - 1), -4.8))


def storages() -> int:
    """Bytes of all tensors that Python reaches."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}.values())


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--limits", action="store_true", help="tell memplan the longest length")
    parser.add_argument("-o", "--out", default="benchmarks/results/lengths.json")
    args = parser.parse_args()
    sample, generator = model(), random.Random(0)
    try:
        memplan.plan(sample.step, of_length(args.longest), budget=1, inner="eager")
        raise AssertionError("one byte was enough")
    except memplan.DoesNotFit as refused:
        budget = int(1.05 * refused.smallest)
    plans: list[float] = []
    options: dict[str, Any] = {"budget": budget, "inner": "eager"}
    options["out"] = lambda plan: plans.append(round(plan.overhead, 4))
    if args.limits:
        options["limits"] = {"tokens": args.longest}
    step = torch.compile(sample.step, backend=memplan_backend, options=options)
    parameters = sum(t.nbytes for t in [*sample.module.parameters(), *sample.module.buffers()])
    lengths = [round(16 * (args.longest / 16) ** generator.random()) for _ in range(args.steps - 1)] + [args.longest]
    peaks, slowest, early = [], 0.0, 0
    for i, tokens in enumerate(lengths):
        batch = of_length(tokens)
        start = time.perf_counter()
        step(batch).backward()
        slowest = max(slowest, time.perf_counter() - start)
        sample.module.zero_grad()
        with memplan.record("cpu") as seen:
            step(batch).backward()
        sample.module.zero_grad()
        peaks.append(seen.timeline.peak_above_base + parameters + sum(t.nbytes for t in batch))
        if i in (9, len(lengths) - 1) or i % 20 == 0:
            del seen
            now = storages() - sum(t.nbytes for t in batch)
            early = now if i == 9 else early
            print(f"step {i}: {tokens} tokens, largest peak {max(peaks)} of {budget}, {len(plans)} plans", flush=True)
    figures = {
        "steps": args.steps, "longest": args.longest, "limits": args.limits, "budget": budget,
        "largest_peak": max(peaks), "over_budget": sum(p > budget for p in peaks),
        "plans": len(plans), "plans_extra_time": plans,
        "compiled_by_dynamo": counters["stats"]["unique_graphs"], "slowest_call_seconds": round(slowest, 2),
        "bytes_after_10_steps": early, "bytes_at_the_end": now,
    }  # fmt: skip
    print(figures)
    save(args.out, figures)
    return int(max(peaks) > budget or len(plans) > 4 or now > early)


if __name__ == "__main__":
    sys.exit(main())
