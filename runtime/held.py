"""What a training process holds beside a step's own tensors: gradients and optimizer states.

In: the parameters of a step. Out: bytes by kind. Gradients appear with the first backward and optimizer states with the
first optimizer step, long after the step was compiled, so both are looked at before every run.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence

import torch

from memplan.ir import Kind

Held = tuple[tuple[Kind, int], ...]


def held(
    parameters: Iterable[torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    arguments: Iterable[object] = (),
) -> Held:
    """Bytes of the parameters' .grad and of the optimizers' states; kinds without any are left out. States that are
    among the arguments of a step are its own, and not counted here.
    """
    own = {id(a) for a in arguments}
    grads = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    states = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and id(value) not in own
    )
    found: Held = (("gradient", grads), ("optimizer_state", states))
    return tuple((kind, size) for kind, size in found if size)


def optimizers_of(parameters: Sequence[torch.Tensor]) -> list[weakref.ref[torch.optim.Optimizer]]:
    """The optimizers of this process that any of the parameters belongs to."""
    wanted = {id(p) for p in parameters}
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return [weakref.ref(o) for o in alive if any(id(p) in wanted for group in o.param_groups for p in group["params"])]
