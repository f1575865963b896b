"""memplan.fit: a model whose own calls run inside a budget, in place.

In: a model and a budget. Out: the same model; a call of it with gradients is compiled with memplan and printed as it is
planned, and a call without gradients (evaluation, generation) runs as it did. State dict, parameters, hooks and class
are untouched, and copies of the model are not fitted.
What must hold: a model that is given labels returns the loss alone, so that its logits live inside the plan. As a
result they would be kept whole until backward is over, and their gradient too, if only as zeros. What is left out is
refused by name where it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from memplan.api import plan
from memplan.backend import memplan_backend
from memplan.compiled import Asked, of_its_own, own_errors
from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Budget, Plan
from memplan.options import Options
from memplan.passes.bound import with_bound
from memplan.passes.reasons import with_reasons
from memplan.report.text import shape_dtype
from memplan.units import human

Module = TypeVar("Module", bound=nn.Module)
Show = Callable[[object], object]

NOT_PLANNED = ("inductor", "limits", "out")  # options that say nothing to memplan.plan
DIMENSIONS = {"batch": 0, "tokens": 1}
SCALAR = 8  # bytes: the seed of a gradient

log = logging.getLogger("torch.memplan")


def fit(
    model: Module,
    budget: str | int | float | Budget | None = None,
    *,
    batch: Any = None,
    keep: str | Iterable[str] = (),
    show: Show | None = print,
    **options: Any,
) -> Module:
    """Run the model's training calls inside `budget`, from now on, and return the same model.

    budget, options: as in torch.compile(backend="memplan", options={...}).
    batch: what the model is called with: a dict of keywords, a tuple of arguments, or one tensor. Its plan is made and
        shown at once, on fake tensors, in training mode, and the model is left as it was if it does not fit. Without
        one the first plan is made and shown at the first training call.
    keep: names of outputs that a training call returns beside its loss, such as "logits", at the price of their bytes.
    show: what plans are given to as they are made; None: only the log hears of them.
    A call under no_grad or in inference mode is neither compiled nor planned. A call with gradients whose output has a
    field `loss`, as transformers' models have when they are given labels, returns memplan.fitting.Outputs: the loss,
    and what `keep` names. Any other output is returned whole; what runs after it is measured in the first two steps,
    and counts from the second on.
    Adapters (peft) come first: a model that wraps a fitted one calls it past the plan.
    Raises MemplanError for what cannot be fitted, and DoesNotFit, with the smallest budget that fits, from fit where
    there is a batch, else from the call.
    """
    names = (keep,) if isinstance(keep, str) else tuple(keep)
    _check(model)
    read = Options.read(given := {"budget": budget, **options})
    shown = _Shown(show)
    if batch is not None:
        shown.first(_planned(model, batch, names, {k: v for k, v in given.items() if k not in NOT_PLANNED}))
    backend = Asked(functools.partial(memplan_backend, adopted=shown.adopted))
    compiled = torch.compile(of_its_own(_outputs), backend=backend, options=given)
    dimensions = [DIMENSIONS[name] for name, _ in read.limits]

    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # traced: it belongs to somebody's step
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        _refuse_checkpointing(model)
        for leaf in pytree.tree_leaves((args, kwargs)) if dimensions else ():
            if isinstance(leaf, Tensor) and leaf.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(leaf, dimensions)
        with own_errors():
            out, left_out = compiled(model, names, args, kwargs)
        backend.refuse_unplanned(f"this {type(model).__name__}")
        return out if left_out is None else Outputs(out, names, left_out)

    call.memplan_fitted = True  # type: ignore[attr-defined]
    model._compiled_call_impl = call
    return model


def unfit(model: Module) -> Module:
    """Undo memplan.fit: the model's calls are its own again. Its weights stay as they are trained."""
    if not _fitted(model):
        raise MemplanError(f"this {type(model).__name__} is not fitted: memplan.fit({{model}}, budget=...) comes first")
    del model._compiled_call_impl
    return model


class NotKept(MemplanError, AttributeError):
    """An output that was left out; hasattr finds that it is not there."""


class Outputs(dict[str, Any]):
    """What a training call of a fitted model returns: `loss`, and what `keep` names.

    It is read as transformers' outputs are, by attribute, key or position.
    """

    def __init__(self, kept: Mapping[str, Any], asked: tuple[str, ...] = (), left_out: tuple[str, ...] = ()) -> None:
        super().__init__(kept)
        self._left_out = left_out
        for name in asked:
            if name not in self:
                raise MemplanError(
                    f"keep names {name!r}, which the model did not return: it has {', '.join((*kept, *left_out))}"
                    f"{did_you_mean(name, left_out)}"
                )

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if not name.startswith("_") and name in self._left_out:
            self._refuse(repr(name))
        raise AttributeError(f"the model's output has no {name!r}")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        if key != 0 and self._left_out:
            self._refuse(f"position {key}")
        return tuple(self.values())[key]

    def __missing__(self, key: str) -> NoReturn:
        if key in self._left_out:
            self._refuse(repr(key))
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict, but that what was left out is refused."""
        return self[key] if key in self or key in self._left_out else default

    def _refuse(self, what: str) -> NoReturn:
        raise NotKept(
            f"{what} of the output is not there: a training call of a fitted model returns its loss alone, and leaves "
            f"out {', '.join(self._left_out)}; keep what you need, memplan.fit(model, keep={self._left_out[0]!r}), or "
            "call the model under torch.no_grad(), where it returns everything"
        )


def _outputs(model: nn.Module, keep: tuple[str, ...], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What is compiled: the output, or of one with a loss what is kept of it and the names of what is not."""
    out = model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
    loss = out.get("loss") if isinstance(out, dict) else None
    if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        return out, None
    kept = {name: out[name] for name in out if name == "loss" or name in keep}
    return kept, tuple(name for name in out if name not in kept)


# ---- looking first --------------------------------------------------------------------------------------------------


def _planned(model: nn.Module, batch: Any, keep: tuple[str, ...], options: Mapping[str, Any]) -> Plan:
    """The plan for one batch."""
    single = not isinstance(batch, (Mapping, tuple, list))
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (((batch,) if single else tuple(batch)), {})

    def step(args: Any, kwargs: Any) -> Any:
        out, left_out = _outputs(model, keep, args, kwargs)
        if left_out is not None:
            Outputs(out, keep, left_out)  # refuses what keep names and is not there
        leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        return leaves[0] if len(leaves) == 1 else leaves

    step.__name__ = type(model).__name__
    with _in_training(model), torch.enable_grad():
        return plan(step, args, kwargs, **options)


@contextlib.contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """transformers loads models in evaluation mode; parts that are, of one that trains, are meant to be."""
    modes = {} if model.training else {module: module.training for module in model.modules()}
    if modes:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Shown:
    """Shows plans as they are made, but not again what the first one promised."""

    def __init__(self, show: Show | None) -> None:
        self.show = show
        self.promised = 0  # bytes: the peak of the plan that was shown before there was a call

    def first(self, made: Plan) -> None:
        self.promised = made.peak
        self._tell(made)

    def adopted(self, made: Plan) -> None:
        kept, self.promised = made.peak <= self.promised, 0
        if not kept:
            self._tell(with_bound(with_reasons(made)).with_others() if self.show is not None else made)

    def _tell(self, made: Plan) -> None:
        notes = _crossing(made)
        for note in notes if self.show is None else ():
            log.warning("%s", note)
        if self.show is not None:
            self.show(dataclasses.replace(made, notes=(*made.notes, *notes)))


def _crossing(made: Plan) -> list[str]:
    """What leaves the last graph with a gradient to come back, but for a loss."""
    back = next((g for g in made.step.graphs if g.phase == "backward"), None)
    large = [t for t in (made.step.tensors[i] for i in (back.inputs if back else ())) if t.bytes > SCALAR]
    if not large:
        return []
    what = ", ".join(f"{shape_dtype(t.shape, t.dtype)} ({human(t.bytes)})" for t in large)
    return [
        f"{what} leaves the graph for code outside of it, and stays whole until its gradient, as large, is back: where "
        "that is the model's output, give the model its labels, or memplan.compile a function that returns the loss, "
        "and it is inside the plan"
    ]


# ---- what is refused ------------------------------------------------------------------------------------------------


def _fitted(model: nn.Module) -> bool:
    return hasattr(model._compiled_call_impl, "memplan_fitted")


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        what = f"{model.__name__}, a class" if isinstance(model, type) else f"a {type(model).__name__}"
        raise MemplanError(
            f"fit was given {what}: it takes a torch.nn.Module; memplan.compile takes a function that returns a loss"
        )
    name = type(model).__name__
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise MemplanError(f"this {name} is the result of torch.compile: fit the model that was given to it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise MemplanError(f"a {name} copies gradients that no plan knows of: fit a model on one device")
    if _fitted(model):
        raise MemplanError(f"this {name} is fitted already: memplan.unfit(model) first, for another budget or options")
    if model._compiled_call_impl is not None:
        raise MemplanError(f"this {name} was compiled by model.compile(): leave that out, fit compiles it")
    if not any(p.requires_grad for p in model.parameters()):
        raise MemplanError(f"no parameter of this {name} requires a gradient: there is no training to plan")
    _refuse_checkpointing(model)


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        new, old = "activation_checkpointing_disable", "gradient_checkpointing_disable"
        raise MemplanError(
            f"this {type(model).__name__} has gradient checkpointing on, and what is computed again is the plan's to "
            f"decide: call model.{new if hasattr(model, new) else old}(), and leave it out of a trainer's arguments"
        )
