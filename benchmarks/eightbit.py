"""Optimizers of fewer bytes inside a budget: torchao's and bitsandbytes', beside AdamW and HybridAdamW.

    python benchmarks/eightbit.py [--rows 256] [-o FILE]

A net of 8 matrices of 512 x 512 and a head of 4096 x 512, in float32, no biases: 4.2 million values, half of them in
one parameter. For each optimizer a step is planned with all the room there is (`inner="eager"`) and runs four times, so
that what `step()` takes is known; then it is planned at the least budget that is accepted. States: foreseen before the
first step, and what the allocator has for them, with tables and learning rates. Step: what the plan says that
`optimizer.step()` takes beside its states, and what the recorder sees. Peak: of a whole step, with parameters, states
and the batch, at the least budget. One thread; bytes do not depend on it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import torch
import torchao.optim
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit
from memplan.ir import Plan
from memplan.runtime.optim import HybridAdamW

MIB = 2**20
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "HybridAdamW, share 0.84": lambda p: HybridAdamW(p, share=0.84),
    "torchao AdamW8bit": torchao.optim.AdamW8bit,
    "torchao AdamW4bit": torchao.optim.AdamW4bit,
    "torchao AdamWFp8": torchao.optim.AdamWFp8,
    "bitsandbytes AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "bitsandbytes Lion8bit": bitsandbytes.optim.Lion8bit,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (m for _ in range(8) for m in (nn.Linear(512, 512, bias=False), nn.Tanh()))
    return nn.Sequential(*layers, nn.Linear(512, 4096, bias=False))


def planned(net: nn.Module, budget: int, report: list[Plan]) -> Callable[[torch.Tensor], torch.Tensor]:
    options = {"budget": budget, "inner": "eager", "out": report.append}
    return torch.compile(lambda x: net(x).square().mean(), backend=memplan_backend, options=options)


def recorded(function: Callable[[], Any]) -> tuple[int, int]:
    """The peak above what was there, and what is left."""
    gc.collect()
    with memplan.record("cpu") as seen:
        function()
    timeline = seen.timeline
    return timeline.peak_above_base, timeline.totals[-1] - timeline.base_bytes


def alone(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], net: nn.Module) -> tuple[int, int]:
    """Bytes of the states of another one like it, and the peak of its second step beside them."""
    parameters = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    for p in parameters:
        p.grad = torch.ones_like(p)
    made = []

    def first() -> None:
        made.append(make(parameters))
        made[0].step()

    _, states = recorded(first)
    peak, left = recorded(made[0].step)
    return states, peak - left


def refused(step: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> int:
    """The least budget that its refusal names."""
    try:
        step(batch)
    except torch._dynamo.exc.BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, DoesNotFit):
            return failed.inner_exception.smallest
        raise
    raise AssertionError("a budget of one byte was accepted")


def measure(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], rows: int) -> dict[str, int]:
    net, batch = network(), torch.randn(rows, 512)
    optimizer = make(net.parameters())
    plans: list[Plan] = []
    step = planned(net, 10**10, plans)

    def train() -> None:
        step(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batch).backward()
    foreseen = dict(plans[0].step.held.kinds).get("optimizer_state", 0)
    optimizer.step()
    for _ in range(3):
        train()
    states, taken = alone(make, net)
    least = refused(planned(net, 1, plans), batch)
    step = planned(net, least, plans)
    train()
    whole, _ = recorded(train)
    there = sum(p.nbytes for p in net.parameters()) + states + batch.nbytes
    return {
        "states foreseen": foreseen,
        "states": states,
        "step planned": max((gap.bytes for gap in plans[-1].step.held.gaps), default=0),
        "step": taken,
        "least budget": least,
        "peak": whole + there,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("-o", "--out", default=Path(__file__).parent / "results" / "eightbit.json")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    values = sum(p.numel() for p in network().parameters())
    found = {}
    for name, make in OPTIMIZERS.items():
        torch._dynamo.reset()
        found[name] = measure(make, given.rows)
        print(f"{name:25}", *(f"{key} {size / MIB:.2f}" for key, size in found[name].items()), flush=True)
    versions = {m.__name__: m.__version__ for m in (torchao, bitsandbytes)}
    save(given.out, {"rows": given.rows, "values": values, "versions": versions, "bytes": found})


if __name__ == "__main__":
    main()
