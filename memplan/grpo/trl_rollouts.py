"""TRL's rollouts by memplan's vLLM engine: trainer and engine in one process, one copy of the weights, one budget.

    trainer = planned(GRPOTrainer(...), ledger=ledger, engine=engine)      # see trl.py

In: a GRPOTrainer, an engine that has its model's weights, and the ledger in which the engine has its leases. Out: the
trainer, which asks this in place of TRL's own engine for completions, as TRL does in its mode "colocate".
What must hold: the KV cache is on the device while completions are sampled, and at no other time; the optimizer's
states, from its first step on, at all other times. What TRL reads of completions is what its own engine would say:
log-probs of the tokens in the distribution that they were sampled from. What is drawn follows from the trainer's seed,
its step and whether it evaluates: a run that goes on from a checkpoint draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from memplan.errors import MemplanError
from memplan.runtime import optimizers
from memplan.runtime.ledger import PHASES, Ledger
from memplan.runtime.storages import nbytes
from memplan.runtime.tenants import Resident, moved_in
from memplan.runtime.vllm import InProcess

if TYPE_CHECKING:
    from memplan.ir import Budget

log = logging.getLogger("memplan.grpo")


class Rollouts:
    """Stands where TRL has its VLLMGeneration: `llm`, `sync_weights` and `generate` are what TRL asks of it."""

    def __init__(self, trainer: Any, ledger: Ledger, engine: InProcess) -> None:
        self.llm, self.ledger = engine.llm, ledger
        self._engine, self._trainer, self._graphs = engine, trainer, _graphs()
        self._at, self._again = (-1, False), 0  # the last rollout's step and mode, and how many had the same

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
        self._engine.seed(self._number())
        try:
            with self.ledger.phase("rollout"), profiler or contextlib.nullcontext():
                found = self._engine.generate(prompts, **_sampling(self._trainer))
        finally:  # whatever happened: the optimizer's states are on the host, and a step would be of zeros
            with self.ledger.phase("train"):
                pass  # and what it needs stays
        tokens = [list(one.tokens) for one in found]
        logprobs = [[[None if math.isnan(p) else p] for p in one.logprobs] for one in found]
        return prompts, tokens, logprobs, [[[token] for token in of] for of in tokens]

    def _number(self) -> int:
        """What this rollout's draws follow from."""
        at = self._trainer.state.global_step, self._trainer.model.training
        self._at, self._again = at, self._again + 1 if at == self._at else 0
        return random.Random(f"{self._trainer.args.seed} {at} {self._again}").getrandbits(32)

    def _settle(self) -> None:
        """What was compiled since the last rollout stays in memory, and is nobody's."""
        if (graphs := _graphs()) != self._graphs:
            self.ledger.accept()
            self._graphs = graphs


class StatesLeave(TrainerCallback):
    """When an optimizer has states, of its first step or of a checkpoint, they get a lease, and are on the host in
    rollouts from then on. Those that cannot move, as they share storages, have one for all phases.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._leased: tuple[Sequence[Tensor], Any] = (), None  # the states, and the tenant that they are

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._look(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._look(optimizer)

    def _look(self, optimizer: Any) -> None:
        tensors, (leased, tenant) = optimizers.states(optimizer), self._leased
        known = len(tensors) == len(leased) and all(map(operator.is_, tensors, leased))
        if not tensors or (known and self.ledger.tenant("optimizer") is tenant):
            return
        self.ledger.accept()
        if "optimizer" in self.ledger.leases:  # of another train(), or of states that a checkpoint has replaced
            self.ledger.end("optimizer")
        self._lease(tensors)
        self._leased = optimizers.states(optimizer), self.ledger.tenant("optimizer")

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
    _check(trainer, ledger, engine)
    shared = engine.share(trainer.accelerator.unwrap_model(trainer.model))
    if shared.copied:
        name, why = next(iter(shared.copied.items()))
        log.warning(
            "%d parameters are copied to the engine before each rollout, and there twice: %s, %s",
            len(shared.copied), name, why,
        )  # fmt: skip
    if ledger.tenant("kv_cache") is None:
        engine.join(ledger)
    else:
        ledger.accept()  # what the trainer had of its weights before they were shared is gone
    own = {"weights", "copied", "optimizer"}  # which a plan counts itself
    return ledger.budget_for("train", own & set(ledger.needed("train")))


def let_generate(trainer: Any, ledger: Ledger, engine: InProcess) -> None:
    """Have the trainer's completions sampled by an engine that has joined, in phases of the ledger."""
    trainer.use_vllm, trainer.vllm_mode, trainer._last_loaded_step = True, "colocate", -1
    trainer.vllm_generation = Rollouts(trainer, ledger, engine)
    trainer.add_callback(StatesLeave(ledger))


def _check(trainer: Any, ledger: Any, engine: Any) -> None:
    for name, value, kind in (("ledger", ledger, Ledger), ("engine", engine, InProcess)):
        if not isinstance(value, kind):
            raise MemplanError(f"{name}= is {value!r}: it takes a memplan.runtime {kind.__name__}")
    if ledger.tenant("kv_cache") not in (None, engine):
        raise MemplanError(
            "the ledger has leases of another engine: ledger.end() those of its weights, engine_fixed and kv_cache, or "
            "take another ledger"
        )
    args = trainer.args
    longest = engine.llm.llm_engine.vllm_config.model_config.max_model_len
    if trainer.max_completion_length >= longest:
        raise MemplanError(
            f"max_completion_length {trainer.max_completion_length} leaves no room for a prompt: the engine has "
            f"{longest} tokens for both, its max_model_len"
        )
    if trainer.rollout_func is not None:
        raise MemplanError(
            "rollout_func generates as it likes, and the engine only in its phase: leave one of them out"
        )
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
