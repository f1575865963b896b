"""What the kernels that Inductor generates read and write, and what each cost model says they do.

    python benchmarks/kernel_bytes.py [--models llama,unet] [-o FILE]

Inductor counts the bytes of its own kernels after scheduling (GraphLowering.count_bytes), forward and backward of a
planned step. Beside it the sum over the plan's runs of what each op is priced at: `roofline-v1` and `fused` are ratios
to Inductor's count. Nothing is timed, so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from memplan.ir import COST_MODELS, Plan
from memplan.passes.pricing import priced
from tests.models import CASES

MODELS = {case.name: case.make for case in CASES}


def look(name: str, policy: str) -> dict[str, Any]:
    """One model, planned by one policy."""
    torch._dynamo.reset()
    sample, counted = MODELS[name](), list[int]()
    generate = GraphLowering.compile_to_module

    def counting(lowered: GraphLowering) -> Any:
        made = generate(lowered)
        counted.append(lowered.count_bytes()[0])
        return made

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(GraphLowering, "compile_to_module", counting):
        options: Any = {"policy": policy, "out": f"{folder}/plan.json", "inductor": {"force_disable_caches": True}}
        loss: Any = torch.compile(sample.step, backend=memplan_backend, options=options)(sample.batch)
        loss.backward()
        plan = memplan.Plan.load(f"{folder}/plan.json")
    real = sum(counted[-2:])  # forward and backward of the last plan
    ratios = {cost: round(moved(plan, cost) / real, 3) for cost in COST_MODELS}
    return {"model": name, "policy": policy, "inductor": real} | ratios


def moved(plan: Plan, cost: Any) -> int:
    """Bytes that the plan's runs are priced at."""
    step = priced(plan.step, cost)
    ops = [step.ops[run.op] for runs in plan.runs for run in runs]
    return sum(op.traffic if op.priced is None else op.priced for op in ops)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,gemma2,gpt_neox,unet")
    parser.add_argument("--policies", default="save-all,block-checkpoint")
    parser.add_argument("-o", "--out", default="benchmarks/results/kernel_bytes.json")
    args = parser.parse_args()
    rows = []
    for name in args.models.split(","):
        for policy in args.policies.split(","):
            rows.append(look(name, policy))
            print(rows[-1], flush=True)
    save(args.out, {"rows": rows})


if __name__ == "__main__":
    main()
