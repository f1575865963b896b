"""TRL's rollouts by memplan's vLLM engine: trainer and engine in one process, one copy of the weights, one budget.

    trainer = planned(GRPOTrainer(...), ledger=ledger, engine=engine)      # see trl.py

In: a GRPOTrainer, an engine that has its model's weights, and the ledger in which the engine has its leases. Out: the
trainer, which asks this in place of TRL's own engine for completions, as TRL does in its mode "colocate".
What must hold: the KV cache is on the device while completions are sampled, and at no other time; the optimizer's
states, from its first step on, at all other times. What TRL reads of completions is what its own engine would say:
log-probs of the tokens in the distribution that they were sampled from.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from memplan.errors import MemplanError
from memplan.runtime import optimizers
from memplan.runtime.ledger import PHASES
from memplan.runtime.storages import nbytes
from memplan.runtime.tenants import Resident, moved_in

if TYPE_CHECKING:
    from memplan.ir import Budget
    from memplan.runtime.ledger import Ledger
    from memplan.runtime.vllm import InProcess

log = logging.getLogger("memplan.grpo")


class Rollouts:
    """Stands where TRL has its VLLMGeneration: `llm`, `sync_weights` and `generate` are what TRL asks of it."""

    def __init__(self, trainer: Any, ledger: Ledger, engine: InProcess) -> None:
        self.llm, self.ledger = engine.llm, ledger
        self._engine, self._trainer, self._graphs = engine, trainer, _graphs()

    def sync_weights(self) -> None:
        """Nothing: the engine has the trainer's weights, and sees by itself that they have changed."""

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float | None]]], list[list[list[int]]]]:
        """Token ids of prompts and, one for each of them, of completions; log-probs of these, [prompt][token][0], and
        their ids once more. A prompt is there once for each of its completions. images: None, or [None, ...].
        """
        if images is not None and any(given is not None for given in images):
            raise MemplanError("memplan's engine takes no images: leave engine= out")
        self._settle()
        with self.ledger.phase("rollout"), profiler or contextlib.nullcontext():
            found = self._engine.generate(prompts, **_sampling(self._trainer))
        with self.ledger.phase("train"):
            pass  # and what it needs stays
        tokens = [list(one.tokens) for one in found]
        logprobs = [[[None if math.isnan(p) else p] for p in one.logprobs] for one in found]
        return prompts, tokens, logprobs, [[[token] for token in of] for of in tokens]

    def _settle(self) -> None:
        """What was compiled since the last rollout stays in memory, and is nobody's."""
        if (graphs := _graphs()) != self._graphs:
            self.ledger.accept()
            self._graphs = graphs


class StatesLeave(TrainerCallback):
    """After the first step of an optimizer: its states get a lease, and are on the host in rollouts from then on.
    Those that cannot move, as they share storages, have one for all phases.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self._seen = ledger, None

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        tensors = optimizers.states(optimizer)
        if optimizer is self._seen or not tensors:
            return
        self._seen = optimizer
        self.ledger.accept()
        if "optimizer" in self.ledger.leases:  # of another train()
            self.ledger.end("optimizer")
        self._lease(tensors)

    def _lease(self, tensors: Sequence[Tensor]) -> None:
        try:
            states = moved_in(tensors)
        except MemplanError as error:
            log.warning("the optimizer's states stay on the device in rollouts: %s", error)
            there = Resident(nbytes(tensors, {t.device.type for t in tensors}))
            self.ledger.lease("optimizer", there, there.resident, PHASES)
        else:
            self.ledger.lease("optimizer", states, states.arena.size, ("train",))


def joined(trainer: Any, ledger: Ledger, engine: InProcess) -> Budget:
    """Share the trainer's weights with the engine and lease what that has, unless it has leases by then: the budget of
    the trainer's passes. Raises MemplanError for what cannot be so.
    """
    _check(trainer)
    engine.share(trainer.accelerator.unwrap_model(trainer.model))
    if "kv_cache" not in ledger.leases:
        engine.join(ledger)
    own = {"weights", "optimizer"}  # which a plan counts itself
    return ledger.budget_for("train", own & set(ledger.needed("train")))


def let_generate(trainer: Any, ledger: Ledger, engine: InProcess) -> None:
    """Have the trainer's completions sampled by an engine that has joined, in phases of the ledger."""
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "colocate", -1
    trainer.vllm_generation = Rollouts(trainer, ledger, engine)
    trainer.add_callback(StatesLeave(ledger))


def _check(trainer: Any) -> None:
    args = trainer.args
    if trainer.use_vllm:
        raise MemplanError("use_vllm=True has TRL start an engine of its own: leave it out, engine= is what generates")
    if args.vllm_structured_outputs_regex is not None:
        raise MemplanError(
            "vllm_structured_outputs_regex needs a tokenizer in the engine, and memplan's has none: leave it out"
        )
    every = args.steps_per_generation * trainer.num_iterations
    if every % args.gradient_accumulation_steps:
        raise MemplanError(
            f"completions are for {every} micro-batches, and gradients are added up over "
            f"{args.gradient_accumulation_steps}: they would be on the device in rollouts; make steps_per_generation a "
            "multiple of gradient_accumulation_steps"
        )
    mode = args.vllm_importance_sampling_mode
    if trainer.loss_type == "vespo" and args.vllm_importance_sampling_correction and not mode.startswith("token_"):
        raise MemplanError(
            f"vllm_importance_sampling_mode {mode!r} does not go with loss_type 'vespo': 'token_truncate' and "
            "'token_mask' do"
        )


def _sampling(trainer: Any) -> dict[str, Any]:
    """What TRL gives its own engine, one completion a prompt; its engine's tokenizer knows where a completion ends."""
    return {
        "n": 1,
        "repetition_penalty": trainer.repetition_penalty,
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p or 0.0,
        "max_tokens": trainer.max_completion_length,
        "stop_token_ids": trainer.eos_token_ids,
    } | (trainer.args.generation_kwargs or {})


def _graphs() -> int:
    """How many Dynamo has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
