"""What an optimizer will hold and what its step allocates, known before its first step.

In: an optimizer. Out: the bytes of its states, and the peak inside `step()` beyond parameters, gradients and states.
A copy of it, over parameters without data (on meta), takes two steps: the first makes the states. What its ops return
is counted, as long as it lives; memory inside single ops is not. The optimizer itself is not touched. One whose step
depends on data says as what it may be run without: `extremes`, options of its groups, of which the first gives the
states and the worst what a step takes (runtime/optim/hybrid_adamw.py).
What cannot run without data (a closure, a look at values) is known from the states that are there after the first step.
"""

from __future__ import annotations

import collections
import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from memplan.errors import MemplanError, did_you_mean
from memplan.runtime.tally import Tally

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Foreseen:
    """`states`: bytes after the first step. `transient`: bytes beside them at the peak of a step, named `name`."""

    states: int
    transient: int
    name: str


def foresee(optimizer: torch.optim.Optimizer) -> Foreseen:
    """What `optimizer` will need. Raises MemplanError for one that cannot step without data."""
    kind = type(optimizer).__name__
    try:
        ways: Iterable[Mapping[str, Any]] = getattr(optimizer, "extremes", ({},))
        found = [_two_steps(optimizer, more) for more in ways]
    except Exception as e:
        raise MemplanError(
            f"{kind} does not step on parameters without data ({type(e).__name__}: {e}), so what it will hold is not "
            "known ahead: leave option 'optimizer' out, and it counts from the call after its first step"
        ) from e
    return Foreseen(found[0].states, max(f.transient for f in found), found[0].name)


def _two_steps(optimizer: torch.optim.Optimizer, more: Mapping[str, Any]) -> Foreseen:
    """What two steps of a copy need, whose groups have these options too."""
    new = _hollow(optimizer)
    fused = any(group.get("fused") for group in new.param_groups)
    several = any(group.get("foreach") for group in new.param_groups)
    for group in new.param_groups:
        group.update(more)
        if fused:  # its kernels allocate nothing, and do not run on meta
            group.update(fused=False, foreach=False)
    step, peaks = inspect.unwrap(type(new).step), []
    for _ in range(2):
        with torch.no_grad(), Tally(t for p in _parameters(new) for t in (p, p.grad)) as tally:
            for state in states(new):
                tally.count(state.untyped_storage())
            step(new)
        peaks.append(tally.peak)
    held = _bytes(states(new))
    how = " (fused)" if fused else " (foreach; foreach=False or fused=True takes less)" if several else ""
    return Foreseen(held, 0 if fused else max(0, *(p - held for p in peaks)), f"{type(new).__name__}.step(){how}")


def declared(given: Any, parameters: Sequence[torch.Tensor]) -> Foreseen:
    """What an optimizer declared ahead needs for these parameters: torch.optim's name of it, or what makes it from
    parameters, or itself. Raises MemplanError.
    """
    if isinstance(given, torch.optim.Optimizer):
        return foresee(given)
    if hasattr(given, "param_groups"):
        raise MemplanError(
            f"option 'optimizer' is a {type(given).__name__}, which is around an optimizer: give the one inside it"
        )
    hollow = [torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters if p.requires_grad]
    if not hollow:
        return Foreseen(0, 0, "no optimizer")
    make = torch_optimizer(given) if isinstance(given, str) else given
    try:
        made = make(hollow)
    except Exception as e:
        raise MemplanError(f"option 'optimizer' cannot be made from the step's parameters: {e}") from e
    if not isinstance(made, torch.optim.Optimizer):
        raise MemplanError(f"option 'optimizer' made a {type(made).__name__} from parameters, not an optimizer")
    device = parameters[0].device.type
    for group in made.param_groups:
        if group.get("foreach") is None and not group.get("fused"):
            group["foreach"] = device == "cuda"
    return foresee(made)


def torch_optimizer(name: str) -> Make:
    """The class of torch.optim with this name, in any case. Raises MemplanError."""
    known = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise MemplanError(
            f"option 'optimizer' is {name!r}, and torch.optim has no such class{did_you_mean(name.lower(), known)}: "
            "give one of its names, or the optimizer, or a function that makes it from parameters"
        )
    return known[name.lower()]


def optimizers_of(parameters: Iterable[torch.Tensor]) -> list[weakref.ref[torch.optim.Optimizer]]:
    """The optimizers of this process that any of the parameters belongs to."""
    wanted = {id(p) for p in parameters}
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
    return [weakref.ref(o) for o in alive if any(id(p) in wanted for group in o.param_groups for p in group["params"])]


def _hollow(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy without states, hooks and data."""
    memo: dict[int, Any] = {id(optimizer.state): collections.defaultdict(dict)}
    for p in _parameters(optimizer):
        fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
        memo[id(p)] = torch.nn.Parameter(fake, p.requires_grad)
        memo[id(p)].grad = torch.empty_like(fake) if p.requires_grad else None
    new = copy.deepcopy(optimizer, memo)
    for group, old in zip(new.param_groups, optimizer.param_groups, strict=True):
        if group.get("foreach") is None and "foreach" in group and not group.get("fused"):
            group["foreach"] = _default_to_fused_or_foreach(old["params"], False, False)[1]
    return new


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors among an optimizer's states."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
