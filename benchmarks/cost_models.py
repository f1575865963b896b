"""Which cost model tells how long a step takes: predicted and measured, under both inner compilers.

    python benchmarks/cost_models.py [--machine FILE] [-o FILE]

All on one thread; measured seconds are the process's own on the CPU, so that what else the machine does is not in them.
The machine is calibrated first, unless its file is given. Each model runs as save-all has it, with its blocks
recomputed, and with its cheap ops alone recomputed, in turns. `ratio` is predicted over measured seconds of the first,
medians; `overhead` is by how much the others are slower, in %, as measured and by each cost model.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import GPTNeoXConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from memplan.calibrate import calibrate
from memplan.ir import COST_MODELS, Budget, Decisions, Machine, Plan, Recompute, Step
from memplan.machines import machine
from memplan.passes.pipeline import evaluate
from memplan.passes.policies import Policy, name_of
from memplan.passes.pricing import priced
from tests.models import Sample, language_model, six_layer, unet


@dataclasses.dataclass(frozen=True)
class Cheap:
    """What takes no more arithmetic than memory traffic runs again."""

    name: str = "cheap"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        cheap = [op for op in step.forward.ops if op.flops <= op.traffic and not op.fixed]
        return {t: Recompute() for op in cheap for t in op.outputs if t in step.saveable}


POLICIES: tuple[str | Policy, ...] = ("save-all", "block-checkpoint", Cheap())


def gpt_neox() -> Sample:
    """LayerNorm, GELU and biases: more pointwise work beside its products than a Llama has."""
    config = GPTNeoXConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    return language_model(config, torch.float32, completions=4, tokens=256)


MODELS: dict[str, Callable[[], Sample]] = {
    "six_layer": six_layer,
    "gpt_neox": gpt_neox,
    "unet": partial(unet, images=8, size=128),
}


def compiled(sample: Sample, target: Machine, inner: str, policy: str | Policy) -> tuple[Callable[[Any], Any], Plan]:
    """A planned step, and its plan."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"machine": target, "inner": inner, "policy": policy, "out": f"{folder}/plan.json"}
        step = torch.compile(sample.step, backend=memplan_backend, options=options)
        for _ in range(2):
            step(sample.batch).backward()
        return step, memplan.Plan.load(f"{folder}/plan.json")


def predicted(plan: Plan, cost: Any) -> float:
    """Seconds of the plan's runs under a cost model."""
    step, decisions = priced(plan.step, cost), dict(plan.decisions)
    return evaluate(step, decisions, plan.budget, plan.machine, plan.inner, plan.policy).timeline.seconds


def measured(sample: Sample, steps: list[Callable[[Any], Any]], rounds: int) -> list[float]:
    """Median seconds of each step; they take turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for own, step in zip(seconds, steps, strict=True):
            sample.module.zero_grad(set_to_none=True)
            start = time.process_time()
            step(sample.batch).backward()
            own.append(time.process_time() - start)
    return [statistics.median(own) for own in seconds]


def look(name: str, target: Machine, inner: str, rounds: int) -> dict[str, Any]:
    """One model under one inner compiler."""
    torch._dynamo.reset()
    sample = MODELS[name]()
    made = [compiled(sample, target, inner, policy) for policy in POLICIES]
    real = measured(sample, [step for step, _ in made], rounds)
    row: dict[str, Any] = {
        "model": name,
        "inner": inner,
        "measured": real,
        "overhead": {"measured": _overheads(real)},
    }
    for cost in COST_MODELS if inner == "inductor" else COST_MODELS[:1]:
        found = [predicted(plan, cost) for _, plan in made]
        row["overhead"][cost] = _overheads(found)
        row[cost] = {"seconds": found, "ratio": found[0] / real[0]}
    return row


def _overheads(seconds: list[float]) -> dict[str, float]:
    names = [name_of(policy) for policy in POLICIES]
    return {name: round(100 * (s / seconds[0] - 1), 1) for name, s in zip(names[1:], seconds[1:], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("-o", "--out", default="benchmarks/results/cost_models.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.machine:
        found = machine(args.machine)
    else:
        with mock.patch("memplan.calibrate.clock.perf_counter", time.process_time):
            found = calibrate("cpu", progress=print).machine
    print(found)
    rows = []
    for name in args.models.split(","):
        for inner in ("eager", "inductor"):
            rows.append(look(name, found, inner, args.rounds))
            print(rows[-1], flush=True)
    save(args.out, {"calibrated": dataclasses.asdict(found), "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
