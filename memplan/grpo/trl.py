"""TRL's GRPOTrainer inside a budget: its log-prob passes run through memplan, all else is TRL's own code.

    trainer = planned(GRPOTrainer(model, reward, args=..., train_dataset=...), budget="24GB")
    trainer.train()

In: a trainer that is not training yet. Out: the same trainer, whose passes over the model (of the policy with
gradients, of old and reference policy without) are compiled with memplan. Losses, metrics, rewards, generation,
adapters, gradient accumulation, autocast, checkpoints and the optimizer are TRL's and untouched: of what a pass makes
they see tensors of a value a token.
What must hold: with head="trl" and inner="eager" losses and weights are TRL's to the bit; a length that comes for the
first time does not make a plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

import memplan
from memplan.errors import MemplanError
from memplan.hf import without_checkpointing

if TYPE_CHECKING:
    from memplan.runtime.ledger import Ledger
    from memplan.runtime.vllm import InProcess

Head = Literal["memplan", "trl"]
Trainer = TypeVar("Trainer")


def planned(
    trainer: Trainer,
    *,
    budget: Any = None,
    head: Head = "memplan",
    ledger: Ledger | None = None,
    engine: InProcess | None = None,
    **options: Any,
) -> Trainer:
    """Let a trl.GRPOTrainer run its passes over the model inside `budget`, and return it.

    budget, options: as in torch.compile(backend="memplan", options={...}); {"limits": {"tokens": 4096}} makes the plan
        for the longest prompt and completion together at once. Otherwise lengths are planned for as they come, in at
        most four plans.
    head: what computes log-probs and entropies from hidden states. "memplan": memplan.linear_logprob, within the plan
        and in tiles of a few MB, with a difference in the last digits; "trl": TRL's own tiles of 32,768 logits a token,
        outside of the plan, which makes room for them.
    ledger, engine: both or neither. The engine's vLLM samples completions (trl_rollouts.py) with the trainer's weights,
        in the ledger's phase "rollout"; all else is in its phase "train", and the budget what that has for it. The
        engine gets leases in the ledger unless it has them; so do the optimizer's states, after its first step.
    The budget is that of the policy's forward and backward; a pass without gradients is compiled and has no plan.
    Gradient checkpointing is switched off: what is computed again is the plan's to decide.
    Raises MemplanError for what is not a GRPOTrainer or one that this cannot plan. In train() a budget that is too
    small is refused with DoesNotFit, whose `smallest` fits what is held by then: with limits, head="memplan" and no
    gradient accumulation before the first step. Otherwise a longer sequence, TRL's head, or a second micro-batch beside
    the first one's gradients may be refused later. A reference model of its own is not in the budget.
    """
    _check(trainer)
    if head not in get_args(Head):
        raise MemplanError(f"head {head!r} is not offered: it is {' or '.join(map(repr, get_args(Head)))}")
    any_trainer: Any = trainer
    ours = _rollouts(budget, ledger, engine)
    if ours is not None:
        budget = ours.joined(trainer, ledger, engine)
    passes = _Passes(_heads(head), memplan.compile(_pass, budget=budget, **options))
    if ours is not None:
        ours.let_generate(trainer, ledger, engine)
    without_checkpointing(any_trainer)
    method = any_trainer._get_per_token_logps_and_entropies

    own_loss = any(_overridden(trainer, name) for name in ("compute_loss", "_compute_loss"))  # may descend entropies

    def get_per_token_logps_and_entropies(model: Any, *args: Any, **kwargs: Any) -> Any:
        trained = own_loss or any_trainer._entropy_bonus_enabled
        return method(lambda **inputs: passes.run(model, inputs, trained), *args, **kwargs)

    any_trainer._get_per_token_logps_and_entropies = get_per_token_logps_and_entropies
    any_trainer.memplan_passes = passes
    return trainer


def _pass(model: Any, inputs: dict[str, Any], entropy_is_trained: bool) -> tuple[Tensor, Tensor | None, Any]:
    """What is compiled: TRL's forward of the model with its head on top."""
    out = model(**inputs)
    entropy = out.entropy
    if entropy is not None and not entropy_is_trained:
        entropy = entropy.detach()  # a metric: its gradient, which would be zeros, is not computed
    return out.log_probs, entropy, out.aux_loss


@dataclass(frozen=True)
class _Passes:
    """The compiled pass, and the names of TRL's module that are others while it runs."""

    names: dict[str, Any]
    compiled: Callable[..., Any]

    def run(self, model: Any, inputs: dict[str, Any], entropy_is_trained: bool) -> SimpleNamespace:
        """What TRL reads of model(**inputs)."""
        for value in inputs.values():
            if isinstance(value, Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 1)
        with _other_names(_module(), self.names):
            log_probs, entropy, aux_loss = self.compiled(model, inputs, entropy_is_trained)
        return SimpleNamespace(log_probs=log_probs, entropy=entropy, aux_loss=aux_loss)


# ---- the head -------------------------------------------------------------------------------------------------------


class _LinearLogprob:
    """Stands where TRL has its autograd.Function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """hidden [N, D], weight [V, D], bias [V], labels [N] -> log-probs [N], and entropies [N] if asked for."""
        if others := set(outputs) - {"log_probs", "entropy"}:
            raise MemplanError(f'TRL asks its head for {sorted(others)}: pass head="trl", which has them')
        given: dict[str, Any] = dict(bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
        if "entropy" not in outputs:
            return memplan.linear_logprob(hidden, weight, labels, **given), None, None, None, None
        log_probs, entropy = memplan.linear_logprob(hidden, weight, labels, entropy=True, **given)
        return log_probs, entropy, None, None, None


def _heads(head: Head) -> dict[str, Any]:
    """Names of trl.trainer.utils and what they stand for while a pass runs."""
    if missing := {"_ChunkedLogProbFunction", "_use_triton"} - set(vars(_module())):
        raise MemplanError(
            f"trl.trainer.utils has no {sorted(missing)[0]}, so memplan cannot tell where TRL computes its log-probs: "
            "use TRL 1.16"
        )
    if head == "memplan":  # all rows, so that the number of those that count makes no new shape
        return {"_ChunkedLogProbFunction": _LinearLogprob, "_use_triton": _no}
    disable: Any = torch.compiler.disable
    apply = disable(_module()._ChunkedLogProbFunction.apply, reason="TRL's head is not in the plan")
    return {"_ChunkedLogProbFunction": SimpleNamespace(apply=apply)}


def _no(device: torch.device) -> bool:
    return False


def _module() -> ModuleType:
    import trl.trainer.utils

    module: ModuleType = trl.trainer.utils
    return module


@contextlib.contextmanager
def _other_names(module: ModuleType, names: dict[str, Any]) -> Iterator[None]:
    """TRL looks its head up on each call; other trainers of this process find their own again."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)


# ---- the trainer ----------------------------------------------------------------------------------------------------


def _rollouts(budget: Any, ledger: Any, engine: Any) -> Any:
    """The module for rollouts by an engine, which imports transformers; None: TRL's own."""
    if (ledger is None) != (engine is None):
        raise MemplanError(
            "ledger= and engine= go together: the engine's cache and the trainer have the device in turn"
        )
    if ledger is None:
        return None
    if budget is not None:
        raise MemplanError(f"budget={budget!r} cannot be given beside ledger=: the budget is the ledger's")
    from memplan.grpo import trl_rollouts

    return trl_rollouts


def _overridden(trainer: Any, name: str) -> bool:
    """Is a method not TRL's own?"""
    from trl import GRPOTrainer

    return getattr(getattr(trainer, name), "__func__", None) is not getattr(GRPOTrainer, name)


def _check(trainer: Any) -> None:
    """Refuse what would not be planned, or not be right."""
    try:
        from trl import GRPOTrainer
    except ImportError as error:
        raise MemplanError(f"TRL cannot be imported ({error}): pip install 'trl>=1.16'") from None
    if not isinstance(trainer, GRPOTrainer):
        what = f"{trainer.__name__}, a class" if isinstance(trainer, type) else f"a {type(trainer).__name__}"
        raise MemplanError(f"planned() was given {what}: it takes a trl.GRPOTrainer, made and not training yet")
    if hasattr(trainer, "memplan_passes"):
        raise MemplanError("this trainer is planned already: make another one for another budget or other options")
    if _overridden(trainer, "_get_per_token_logps_and_entropies"):
        raise MemplanError(
            f"{type(trainer).__name__} has its own _get_per_token_logps_and_entropies, and memplan plans TRL's: leave "
            "one of them out"
        )
    name = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    if trainer._is_vlm or getattr(trainer.model.config, "vision_config", None) is not None:
        raise MemplanError(
            f"{name} is a vision model, whose passes memplan.grpo.trl does not plan yet: train its text model, or "
            "leave planned() out"
        )
    if trainer.args.use_liger_kernel:
        raise MemplanError(
            "use_liger_kernel=True replaces layers by kernels that memplan cannot look into: leave it out, memplan "
            "computes log-probs in tiles itself"
        )
    if trainer.args.torch_compile:
        raise MemplanError("torch_compile=True compiles the model on its own: leave it out, memplan compiles the pass")
    if trainer.accelerator.num_processes > 1:
        raise MemplanError(
            f"this trainer has {trainer.accelerator.num_processes} processes: a plan is for one device, so train in one"
        )
