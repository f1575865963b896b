"""What real trainers write: a step with two graph breaks, and one graph with two micro-batches and its optimizer.

    python benchmarks/real_steps.py [--inner inductor|eager] [--budgets 6] [-o FILE]

A four-layer Llama and a GRPO loss. "two breaks": the step is split before the head and before the loss, and backward
is called outside. "one graph": two micro-batches, their backward, and a momentum optimizer of foreach ops, through
memplan.compile. Budgets lie between the least that is accepted and what the unplanned step needs. Peaks are measured by
memplan.record at two calls after the plan of the whole step, in bytes with parameters, states and batch. Exit code 1
when a peak is over its budget, or, under eager, when what the step leaves behind differs in one bit from the unplanned.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests.models, which is not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from tests.models import language_model

Step = Callable[[Any], torch.Tensor]


class TwoBreaks:
    """A model whose body, head and loss are three graphs, planned as one from the second call on."""

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
        )
        self.sample = language_model(config, torch.float32, completions=4, tokens=128)
        self.parameters = list(self.sample.module.parameters())
        self.held: list[torch.Tensor] = []  # states of the optimizer
        self.split()

    def split(self) -> None:
        for part in (self.sample.module.model, self.sample.module.lm_head):
            part.forward = _then_break(part.forward)

    def unplanned(self, backend: str) -> Step:
        return torch.compile(self.sample.step, backend=backend)

    def planned(self, options: dict[str, Any]) -> Step:
        return torch.compile(self.sample.step, backend=memplan_backend, options=options)

    def run(self, step: Step) -> None:
        self.sample.module.zero_grad()
        step(self.sample.batch).backward()

    def outcome(self) -> list[Any]:
        return [p.grad for p in self.parameters]


def _then_break(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        torch._dynamo.graph_break()
        return out

    return run


class OneGraph(TwoBreaks):
    """Two micro-batches, their backward, and the optimizer."""

    def split(self) -> None:
        self.held = [torch.zeros_like(p) for p in self.parameters]

    def step(self, batch: Any) -> torch.Tensor:
        total = torch.zeros(())
        for half in (slice(0, 2), slice(2, 4)):
            loss = self.sample.step(type(batch)(*(t[half] for t in batch))) / 2
            loss.backward()
            total = total + loss.detach()
        with torch.no_grad():
            torch._foreach_mul_(self.held, 0.9)
            torch._foreach_add_(self.held, [p.grad for p in self.parameters])
            torch._foreach_add_(self.parameters, self.held, alpha=-0.1)
        for p in self.parameters:
            p.grad = None
        return total

    def unplanned(self, backend: str) -> Step:
        compiled = torch.compile(self.step, backend=backend, fullgraph=True)

        def run(batch: Any) -> torch.Tensor:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return compiled(batch)

        return run

    def planned(self, options: dict[str, Any]) -> Step:
        return memplan.compile(self.step, fullgraph=True, **options)

    def run(self, step: Step) -> None:
        step(self.sample.batch)

    def outcome(self) -> list[Any]:
        return [p.detach().clone() for p in self.parameters]


def peak(job: TwoBreaks, step: Step) -> int:
    """Of one call, with all that is there before it."""
    job.sample.module.zero_grad()
    gc.collect()
    with memplan.record("cpu") as seen:
        job.run(step)
    # transformers keeps a second copy of the rotary frequencies, which no step reads
    buffers = [b for name, b in job.sample.module.named_buffers() if "original" not in name]
    there = [*job.parameters, *buffers, *job.held, *job.sample.batch]
    resident = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}.values())
    return seen.timeline.peak_above_base + resident


def least(kind: type[TwoBreaks], inner: str) -> int:
    """The budget that refusals ask for, until there is none."""
    budget = 10**6
    while True:
        torch._dynamo.reset()
        job = kind()
        step = job.planned({"inner": inner, "budget": budget})
        try:
            job.run(step)
            job.run(step)
            return budget
        except (BackendCompilerFailed, memplan.DoesNotFit) as e:
            refused = e if isinstance(e, memplan.DoesNotFit) else e.inner_exception
            if not isinstance(refused, memplan.DoesNotFit):
                raise
            budget = refused.smallest


def measure(kind: type[TwoBreaks], inner: str, budgets: int) -> tuple[dict[str, Any], bool]:
    """The figures of one kind of step, and whether its promises hold."""
    backend = "inductor" if inner == "inductor" else "aot_eager"
    job = kind()
    step = job.unplanned(backend)
    job.run(step)
    reference = job.outcome()
    needs, smallest = peak(job, step), least(kind, inner)
    rows, good = [], True
    for k in range(budgets):
        budget = needs - (needs - smallest) * k // max(1, budgets - 1)
        torch._dynamo.reset()
        counters.clear()
        job = kind()
        step = job.planned({"inner": inner, "budget": budget})
        job.run(step)
        same = all(torch.equal(a, b) for a, b in zip(reference, job.outcome(), strict=True))
        job.run(step)  # the plan of the whole step
        peaks = [peak(job, step) for _ in range(2)]
        rows.append({"budget": budget, "peaks": peaks, "recompiles": counters["memplan"]["recompiles"], "same": same})
        good = good and max(peaks) <= budget and (same or inner == "inductor")
        print(kind.__name__, rows[-1], flush=True)
    return {"unplanned": needs, "least_budget": smallest, "rows": rows}, good


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--budgets", type=int, default=6)
    parser.add_argument("-o", "--out", default="benchmarks/results/real_steps_{inner}.json")
    args = parser.parse_args()
    found = {kind.__name__: measure(kind, args.inner, args.budgets) for kind in (TwoBreaks, OneGraph)}
    save(args.out.format(inner=args.inner), {"inner": args.inner} | {name: f for name, (f, _) in found.items()})
    return int(not all(good for _, good in found.values()))


if __name__ == "__main__":
    sys.exit(main())
