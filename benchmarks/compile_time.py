"""How long the first call takes under memplan, beside Inductor alone: planning and compiling, with an empty cache.

    python benchmarks/compile_time.py [--repeat 3] [-o FILE]

The six-layer GRPO step and a 32-layer small Llama, each in a process and with a cache folder of its own, unplanned and
planned in turn. Seconds are those of the first call less the second's; the ratio is of medians. Exit code 1 where
planning makes it more than 1.25 times as long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

from benchmarks.machine import save
from memplan.backend import memplan_backend
from tests.models import Sample, language_model, six_layer

ALLOWED = 1.25
SHARE = 0.8  # of the bytes above the parameters that the step needs unplanned


def deep() -> Sample:
    """32 layers, small in all else."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4
    )
    return language_model(config, torch.float32, completions=2, tokens=64)


MODELS = {"six_layer": six_layer, "32_layers": deep}


def first_call(model: str, budget: int | None) -> float:
    """Seconds of the first call less those of the second, in this process."""
    sample = MODELS[model]()
    if budget is None:
        step = torch.compile(sample.step)
    else:
        step = torch.compile(sample.step, backend=memplan_backend, options={"budget": budget})
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        step(sample.batch).backward()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def in_a_process(model: str, budget: int | None) -> float:
    """first_call with nothing in any cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", model, *([] if budget is None else ["--budget", str(budget)])]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def needed(model: str) -> int:
    """A budget below what save-all needs: so that something is planned."""
    import memplan

    sample = MODELS[model]()
    plan = memplan.plan(sample.step, sample.batch, policy="save-all")
    return plan.step.base_bytes + int(SHARE * (plan.peak - plan.step.base_bytes))


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", default="benchmarks/results/compile_time.json")
    args = parser.parse_args()
    if args.child:
        print(first_call(args.child, args.budget))
        return 0
    rows: dict[str, Any] = {}
    for model in MODELS:
        budget = needed(model)
        alone, planned = [], []
        for _ in range(args.repeat):
            alone.append(in_a_process(model, None))
            planned.append(in_a_process(model, budget))
        ratio = statistics.median(planned) / statistics.median(alone)
        rows[model] = {
            "budget": budget,
            "inductor_seconds": alone,
            "memplan_seconds": planned,
            "ratio": round(ratio, 3),
        }
        print(model, rows[model], flush=True)
    save(args.out, rows)
    return int(any(row["ratio"] > ALLOWED for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
