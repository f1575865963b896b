"""How far gradients are from what exact arithmetic gives: for tests and benchmarks.

`exact_gradients` runs all of a step in float64 on the very same values, also what a model computes in float32 whatever
its dtype (norms, softmax, the loss). So the errors are those of the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

from tests.models import Sample


class _Double(TorchFunctionMode):
    """Casts to float32 are casts to float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return function(*args, **kwargs)


def values(sample: Sample) -> list[torch.Tensor]:
    """All that its loss depends on."""
    return [*sample.module.parameters(), *sample.module.buffers(), *sample.batch]


def gradients(step: Callable[[Any], torch.Tensor], sample: Sample) -> list[torch.Tensor]:
    """Those of the parameters, in float64."""
    sample.module.zero_grad()
    step(sample.batch).backward()
    return [p.grad.double() for p in sample.module.parameters()]


def exact_gradients(sample: Sample, reference: Sample) -> list[torch.Tensor]:
    """The sample's gradients as `reference` finds them: the same model made in float64, which is given its values."""
    with torch.no_grad():
        for into, value in zip(values(reference), values(sample), strict=True):
            into.copy_(value)
    if hasattr(reference.module, "set_experts_implementation"):
        reference.module.set_experts_implementation("eager")  # torch has no grouped product in float64
    with _Double():
        return gradients(reference.step, reference)


def rms_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Over all gradients together, relative to the exact ones."""
    wrong = sum(((a - b) ** 2).sum() for a, b in zip(found, exact, strict=True))
    return float((wrong / sum((b**2).sum() for b in exact)).sqrt())
