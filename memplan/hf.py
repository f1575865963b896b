"""transformers' Trainer inside a budget: its forward, loss and backward run through memplan, all else is its own code.

    trainer = planned(Trainer(model, args=..., train_dataset=...), budget="24GB")
    trainer.train()

In: a trainer that is not training yet. Out: the same trainer, whose compute_loss is compiled with memplan where it is
called with gradients: model, label smoothing, compute_loss_func and a subclass's own compute_loss, so that of logits
nothing leaves the plan. Batches, gradient accumulation, autocast, clipping, optimizer, evaluation, checkpoints and
callbacks are the trainer's and untouched.
What must hold: with inner="eager" losses and weights are the trainer's to the bit, as those of torch's aot_eager are:
not with grouped-query attention, whose gradients it adds up in another order.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

import memplan
from memplan.compiled import of_its_own
from memplan.errors import MemplanError
from memplan.here import this_machine
from memplan.ir import Budget
from memplan.options import Options, read_budget

Trainer = TypeVar("Trainer")

DIMENSIONS = {"batch": 0, "tokens": 1}
SCALARS = 1024  # bytes: a loss divided, its gradient, the sum that is logged

log = logging.getLogger("torch.memplan")


def planned(trainer: Trainer, *, budget: Any = None, **options: Any) -> Trainer:
    """Let a transformers.Trainer compute its losses, and their gradients, inside `budget`, and return it.

    budget, options: as in torch.compile(backend="memplan", options={...}); {"limits": {"tokens": 4096}} makes the plan
        for the longest sequence at once. Otherwise lengths are planned for as they come, in at most four plans.
    The budget is that of forward, loss, backward and optimizer, with parameters, gradients, states and the batch; of
    an accumulated step the micro-batches that wait for their turn are beside it. Evaluation and prediction run as they
    did. Gradient checkpointing is switched off: what is computed again is the plan's to decide.
    Raises MemplanError for what is not a Trainer, or one that this cannot plan. In train() a budget that is too small
    is refused with DoesNotFit, whose `smallest` fits what is held by then: before the first step, but with gradient
    accumulation, where the second micro-batch meets the first one's gradients, and of a compute_loss of one's own that
    Dynamo splits, which is planned as a whole at its second call.
    """
    _check(trainer)
    any_trainer: Any = trainer
    compute_loss = any_trainer.compute_loss
    compiled = memplan.compile(of_its_own(_loss), budget=_room(any_trainer, budget, options), **options)
    dimensions = [DIMENSIONS[name] for name in options.get("limits") or ()]
    watch = _watch()

    def planned_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return compute_loss(model, inputs, *args, **kwargs)
        watch.asked = True
        for value in inputs.values() if dimensions else ():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, dimensions)
        with warnings.catch_warnings():  # args.n_gpu asks, each time, whether torch can be imported
            warnings.filterwarnings("ignore", "Dynamo detected a call to a .functools.lru_cache", UserWarning)
            return compiled(compute_loss, model, inputs, args, kwargs)

    without_checkpointing(any_trainer)
    any_trainer.compute_loss = planned_loss
    any_trainer.add_callback(watch)
    any_trainer.memplan_planned = True
    return trainer


def _watch() -> Any:
    """A callback that looks whether the trainer's steps come through its compute_loss, which says so in `asked`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        asked = False

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.asked:
                raise MemplanError(
                    "nothing of this trainer's step was planned: its training_step does not call compute_loss, which "
                    "is what planned() compiles; let it, or memplan.fit the model"
                )

    return Watch()


def _room(trainer: Any, budget: Any, options: Mapping[str, Any]) -> Budget:
    """The budget, less what the trainer makes of a loss outside of the plan."""
    read = Options.read({"budget": budget, **options}, os.environ)
    whole = read_budget(read.budget, read.machine or this_machine(trainer.args.device.type))
    return dataclasses.replace(whole, others=(*whole.others, ("the trainer's scalars", SCALARS)))


def _loss(compute_loss: Callable[..., Any], model: Any, inputs: Any, args: Any, kwargs: Any) -> Any:
    """What is compiled."""
    return compute_loss(model, inputs, *args, **kwargs)


def without_checkpointing(trainer: Any) -> None:
    """Switch it off: in a trainer's arguments, by which train() switches it on, and where its model has it already."""
    names = [n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(trainer.args, n)]
    on = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    if not on and not any(getattr(trainer.args, name) for name in names):
        return
    log.warning("%s is switched off: what is computed again is the plan's to decide", names[0])
    for name in names:  # a new name and its alias, in transformers 5.24
        setattr(trainer.args, name, False)
    if on:
        getattr(trainer.model, f"{names[0]}_disable")()
    for module in trainer.model.modules():  # what lets inputs require gradients for it, which Dynamo cannot trace
        for key, hook in list(module._forward_hooks.items()):  # transformers forgets all of them but the last
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]


def _check(trainer: Any) -> None:
    """Refuse what would not be planned, or not be right."""
    try:
        from transformers import Trainer
    except ImportError as error:
        raise MemplanError(f"transformers' Trainer cannot be imported ({error}): pip install accelerate") from None
    if not isinstance(trainer, Trainer):
        what = f"{trainer.__name__}, a class" if isinstance(trainer, type) else f"a {type(trainer).__name__}"
        raise MemplanError(f"planned() was given {what}: it takes a transformers.Trainer, made and not training yet")
    if any(cls.__name__ == "GRPOTrainer" for cls in type(trainer).__mro__):
        raise MemplanError(f"a {type(trainer).__name__} is planned by memplan.grpo.trl.planned, which knows its passes")
    if hasattr(trainer, "memplan_planned"):
        raise MemplanError("this trainer is planned already: make another one for another budget or other options")
    if getattr(trainer.model, "_compiled_call_impl", None) is not None or hasattr(trainer.model, "_orig_mod"):
        raise MemplanError(
            "the model is compiled already, by memplan.fit or torch.compile, and planned() compiles its loss with it: "
            "leave one of them out"
        )
    for name, why in {
        "torch_compile": "compiles the model on its own: leave it out, memplan compiles the loss with it",
        "use_liger_kernel": "replaces layers by kernels that memplan cannot look into: leave it out",
    }.items():
        if getattr(trainer.args, name, False):
            raise MemplanError(f"{name}=True {why}")
    if trainer.accelerator.num_processes > 1 or trainer.args.n_gpu > 1:
        raise MemplanError(
            f"this trainer has {trainer.accelerator.num_processes} processes and {trainer.args.n_gpu} GPUs in this "
            "one: a plan is for one device, so train on one"
        )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise MemplanError(f"{name.split('_')[1]} moves parameters where no plan knows of them: leave it out")
