"""What an optimizer will hold and what its step allocates, known before its first step.

In: an optimizer. Out: the bytes of its states, and the peak inside `step()` beyond parameters, gradients and states.
A copy of it, over parameters without data (on meta), takes two steps: the first makes the states. What its ops return
is counted, as long as it lives; memory inside single ops is not. The optimizer itself is not touched. One whose step
depends on data says as what it may be run without: `extremes`, options of its groups, of which the first gives the
states and the worst what a step takes (runtime/optim/hybrid_adamw.py).
Of torchao's and bitsandbytes' optimizers the states are known so, and what a step takes is not: torchao compiles its
step, and bitsandbytes' kernels allocate inside. That is measured while they step (stepped.py).
What cannot run without data (a closure, a look at values) is known from the states that are there after the first step.
"""

from __future__ import annotations

import collections
import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import _default_to_fused_or_foreach

from memplan.errors import MemplanError, did_you_mean
from memplan.runtime.alive import instances
from memplan.runtime.storages import nbytes, plain
from memplan.runtime.tally import Tally

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
STATES_ALONE = ("torchao.", "bitsandbytes.")  # of theirs, what a step allocates is not seen on meta
DATA = (torch.Tensor, dict, list, tuple, set)


@dataclass(frozen=True)
class Foreseen:
    """`states`: bytes after the first step. `transient`: bytes beside them at the peak of a step, named `name`, or None
    where that is not known.
    """

    states: int
    transient: int | None
    name: str


def foresee(optimizer: torch.optim.Optimizer, device: str = "") -> Foreseen:
    """What `optimizer` will need where its parameters are (device: or will be). Raises MemplanError for one that cannot
    step without data.
    """
    device = device or next((p.device.type for p in _parameters(optimizer)), "cpu")
    kind = type(optimizer).__name__
    learned = (
        "so what it will hold is not known ahead: leave option 'optimizer' out, and it counts from the call after "
    )
    if getattr(optimizer, "is_paged", False) and device != "cpu":
        raise MemplanError(f"{kind} has pages that CUDA's driver moves, {learned}its first step, without these")
    try:
        ways: Iterable[Mapping[str, Any]] = getattr(optimizer, "extremes", ({},))
        found = [_two_steps(optimizer, device, more) for more in ways]
    except Exception as e:
        why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        raise MemplanError(f"{kind} does not step on parameters without data ({why}), {learned}its first step") from e
    worst = None if any(f.transient is None for f in found) else max(f.transient or 0 for f in found)
    return Foreseen(found[0].states, worst, found[0].name)


def _two_steps(optimizer: torch.optim.Optimizer, device: str, more: Mapping[str, Any]) -> Foreseen:
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
        # A step that compiles itself runs as it is written: what is on meta cannot be compiled.
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, Tally(t for p in _parameters(new) for t in (p, p.grad)) as tally:
            for state in (p for s in states(new) for p in plain(s)):
                tally.count(state.untyped_storage())
            step(new)
        peaks.append(tally.peak)
    # Counters of steps are on the host, but for fused ones.
    on_host = ("cpu",) if fused or device in ("cpu", "meta") else ()
    held = nbytes(states(new), ("meta", *on_host))
    name = f"{type(new).__name__}.step()"
    if type(new).__module__.startswith(STATES_ALONE):
        return Foreseen(held, None, name)
    how = " (fused)" if fused else " (foreach; foreach=False or fused=True takes less)" if several else ""
    return Foreseen(held, 0 if fused else max(0, *(p - held for p in peaks)), name + how)


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
    if _single(made, [parameters]):
        raise MemplanError(
            f"option 'optimizer' makes a {type(made).__name__}, and GlobalOptimManager has options for single "
            "parameters, which what is made for a plan does not have: give the optimizer itself"
        )
    if not isinstance(made, torch.optim.Optimizer):
        raise MemplanError(f"option 'optimizer' made a {type(made).__name__} from parameters, not an optimizer")
    device = parameters[0].device.type
    for group in made.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = device == "cuda"
    return foresee(made, device)


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


@dataclass
class Around:
    """The optimizers of this process. To find them all objects are walked, which takes up to 0.3 s; those that were
    found are kept until `forget`.
    """

    found: list[weakref.ref[torch.optim.Optimizer]] | None = None

    def forget(self) -> None:
        self.found = None

    def of(self, parameters: Iterable[torch.Tensor]) -> list[weakref.ref[torch.optim.Optimizer]]:
        """Those that any of the parameters belongs to."""
        if self.found is None:
            self.found = [weakref.ref(o) for o in instances(torch.optim.Optimizer)]
        wanted = {id(p) for p in parameters}
        alive = ((ref, optimizer) for ref in self.found if (optimizer := ref()) is not None)
        return [ref for ref, optimizer in alive if not wanted.isdisjoint(map(id, _parameters(optimizer)))]


def _hollow(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy without states, hooks and data."""
    memo: dict[int, Any] = {id(optimizer.state): collections.defaultdict(dict)}
    for p in _parameters(optimizer):
        fake = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
        memo[id(p)] = torch.nn.Parameter(fake, p.requires_grad)
        memo[id(p)].grad = torch.empty_like(fake) if p.requires_grad else None
    new = copy.deepcopy(optimizer, memo)
    for name, value in vars(optimizer).items():  # torch copies none of a class's own; what is no data is the same
        if name not in vars(new):
            vars(new)[name] = copy.deepcopy(value, memo) if isinstance(value, DATA) else value
    if hasattr(new, "is_paged"):
        vars(new)["is_paged"] = False  # as it is where parameters are on a CPU
    if options := _single(optimizer, [group["params"] for group in optimizer.param_groups]):
        manager = vars(new)["mng"] = copy.copy(vars(optimizer)["mng"])
        manager.index2config = manager.index2config | options
    for group, old in zip(new.param_groups, optimizer.param_groups, strict=True):
        if group.get("foreach") is None and "foreach" in group and not group.get("fused"):
            group["foreach"] = _default_to_fused_or_foreach(old["params"], False, False)[1]
    return new


def _single(optimizer: Any, groups: Sequence[Sequence[torch.Tensor]]) -> dict[tuple[int, int], Any]:
    """bitsandbytes' options for single parameters, which it knows by their ids: by group and place in it."""
    manager = getattr(optimizer, "mng", None)
    if manager is None:
        return {}
    options = manager.pid2config | {id(getattr(m, name)): o for m, name, o in manager.module_weight_config_triple}
    places = {(g, i): id(p) for g, group in enumerate(groups) for i, p in enumerate(group)}
    return {place: options[key] for place, key in places.items() if key in options}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors among an optimizer's states."""
    held = getattr(optimizer, "state", {})  # what is around others may have none
    return [v for state in held.values() for v in state.values() if isinstance(v, torch.Tensor)]
