"""What a compiled step needs, measured, and beside it what memplan planned.

Peaks are measured by memplan.record on the second step with .grad None before it, in bytes above the parameters and the
batch; the gradients are inside. Seconds are the median of five steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

import memplan
from memplan.backend import memplan_backend
from tests.models import Sample


def measure(sample: Sample, step: Callable[[Any], torch.Tensor]) -> dict[str, float]:
    """Peak above the parameters in bytes, median seconds, and the seconds of the first call."""

    def once() -> float:
        sample.module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step(sample.batch).backward()
        return time.perf_counter() - start

    first = once()
    sample.module.zero_grad(set_to_none=True)
    with memplan.record() as seen:
        step(sample.batch).backward()
    sample.module.zero_grad(set_to_none=True)
    seconds = statistics.median(once() for _ in range(5))
    sample.module.zero_grad(set_to_none=True)
    return {"peak": seen.timeline.peak_above_base, "seconds": seconds, "first_call_seconds": first}


def measure_unplanned(sample: Sample, backend: str) -> dict[str, float]:
    """The step as torch compiles it."""
    torch._dynamo.reset()
    return measure(sample, torch.compile(sample.step, backend=backend))


def measure_planned(sample: Sample, **options: Any) -> dict[str, float]:
    """The step under memplan: the bytes that no plan changes, the peak planned above them, and what was measured."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/plan.json"
        step = torch.compile(sample.step, backend=memplan_backend, options=options | {"out": out})
        figures = measure(sample, step)
        timeline = memplan.Plan.load(out).timeline
    return {"base": timeline.base_bytes, "planned": timeline.peak_above_base} | figures


def time_ratio(sample: Sample, step: Callable[[Any], torch.Tensor], than: Callable[[Any], torch.Tensor]) -> float:
    """Median time of a step over that of another. They take turns, so that a machine's moods meet both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for k in range(2 * (3 + 15)):
        sample.module.zero_grad(set_to_none=True)
        start = time.perf_counter()
        (step, than)[k % 2](sample.batch).backward()
        seconds[k % 2].append(time.perf_counter() - start)
    sample.module.zero_grad(set_to_none=True)
    return statistics.median(seconds[0][3:]) / statistics.median(seconds[1][3:])


def refusal(sample: Sample, **options: Any) -> memplan.DoesNotFit | None:
    """Why the step is refused, if it is."""
    torch._dynamo.reset()
    try:
        torch.compile(sample.step, backend=memplan_backend, options=options)(sample.batch)
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, memplan.DoesNotFit):
            return error.inner_exception
        raise
    return None


def smallest_budget(sample: Sample, inner: str, **options: Any) -> int:
    """The smallest budget that fits, as the refusal of one byte names it."""
    refused = refusal(sample, budget=1, inner=inner, **options)
    assert refused is not None, "one byte was enough"
    return refused.smallest
