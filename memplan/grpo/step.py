"""The GRPO train step: a batch of scored completions in, a scalar loss out; the caller runs .backward().

What must hold: it is one graph (no graph breaks), and log-probs of old, reference and new policy come from the same
function, so that equal weights give a ratio of exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memplan.grpo import packing
from memplan.grpo.config import GRPOConfig
from memplan.grpo.logprobs import selected_logprobs, token_entropies
from memplan.grpo.objective import Batch, batch_loss

# Beside what batch_loss reads (objective.py), with N = T - 1:
# input_ids        [B, T] int64: prompt, completion, padding on the right; the model reads the packed row, where
#                  packing.pack has made one
# Entry t of every [B, N] tensor is about token input_ids[:, t + 1].


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-prob of every token given those before it; input_ids [B, T] int64, returns [B, T-1] float32.

    `model` is called as transformers' causal language models are: model(input_ids=..., use_cache=False).logits.
    """
    return selected_logprobs(_logits(model, input_ids), input_ids[:, 1:], temperature, logit_scale, softcap)


def grpo_loss(model: nn.Module, batch: Batch, config: GRPOConfig) -> Tensor:
    """The policy loss with its KL term and entropy bonus, reduced as config.loss_type says: a float32 scalar."""
    packed = packing.IDS in batch
    logits = packing.packed_logits(model, batch) if packed else _logits(model, batch["input_ids"])
    form = config.temperature, config.logit_scale, config.softcap
    logprobs = selected_logprobs(logits, batch[packing.LABELS] if packed else batch["input_ids"][:, 1:], *form)
    entropies = None
    if config.needs_entropies:
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.entropy_bonus != 0):
            entropies = token_entropies(logits, *form)
    if packed:
        logprobs = packing.unpacked(logprobs, batch)
        entropies = None if entropies is None else packing.unpacked(entropies, batch)
    return batch_loss(logprobs, batch, config, entropies)


def batch_logprobs(model: nn.Module, batch: Batch, config: GRPOConfig | None = None) -> Tensor:
    """Log-probs [B, N] of a batch's tokens, packed or not, as its loss computes them: for old and reference policy."""
    config = config or GRPOConfig()
    form = config.temperature, config.logit_scale, config.softcap
    if packing.IDS not in batch:
        return token_logprobs(model, batch["input_ids"], *form)
    logits = packing.packed_logits(model, batch)
    return packing.unpacked(selected_logprobs(logits, batch[packing.LABELS], *form), batch)


def make_step(model: nn.Module, config: GRPOConfig | None = None) -> Callable[[Batch], Tensor]:
    """A plain function step(batch) -> loss, for torch.compile or memplan.plan; .backward() stays with the caller."""
    config = config or GRPOConfig()

    def step(batch: Batch) -> Tensor:
        return grpo_loss(model, batch, config)

    return step


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Of all tokens but the first, [B, T-1, V]."""
    # No attention mask: padding is on the right and attention is causal, so no token that counts sees padding.
    # The last token predicts nothing that is known, so the model does not see it.
    logits: Tensor = model(input_ids=input_ids[:, :-1], attention_mask=None, use_cache=False).logits
    return logits
