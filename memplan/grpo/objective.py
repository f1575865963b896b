"""The loss of a batch from log-probs: the table of losses and their options, put together.

What must hold: what is masked has no influence, even inf or nan; it is one graph, and nothing waits for the device.
tests/torch_cpu/test_grpo_trl.py compares value and gradient with TRL 1.16.0 over the product of the options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.grpo.config import GRPOConfig
from memplan.grpo.corrections import off_policy_mask, sampler_ratio, top_entropy_mask
from memplan.grpo.kl import kl_estimate
from memplan.grpo.losses import cispo_loss, clipped_loss, policy_ratio, sapo_loss, sequence_ratio, vespo_loss
from memplan.grpo.reductions import mean_entropy, reduce_loss

# completion_mask    [B, N] float32: 1 where the token belongs to the completion
# advantages         [B] float32
# old_logprobs       [B, N] float32
# ref_logprobs       [B, N] float32, only if beta > 0
# sampler_logprobs   [B, N] float32, nan where unknown; only for sampler_correction, and for the off-policy mask, which
#                    takes old_logprobs where they are not there
# completion_tokens  a scalar, only for dapo, cispo and vespo: completion tokens of the whole generation batch over all
#                    ranks. Losses of its parts then add up to that of the whole. Where gradients are averaged over
#                    ranks or micro-batches, divide it by their number. A tensor costs no recompilation, a number may.
Batch = dict[str, Tensor]


def batch_loss(logprobs: Tensor, batch: Batch, config: GRPOConfig, entropies: Tensor | None = None) -> Tensor:
    """Policy loss plus beta times KL less the entropy bonus: a scalar in the dtype of `logprobs`.

    logprobs [B, N], float32 at least; entropies [B, N] in nats if config.needs_entropies. Masks and the sampler's
    correction weigh the policy loss alone, not the KL term. Raises MemplanError naming what the batch lacks.
    """
    counts = batch["completion_mask"] > 0
    mask = counts.to(logprobs.dtype)
    # A token that does not count has log-prob 0 under every policy: nothing it held reaches a value or a gradient.
    logprobs = torch.where(counts, logprobs, 0.0)
    old = torch.where(counts, _needed(batch, "old_logprobs"), 0.0)
    advantages = _needed(batch, "advantages")
    acting = mask  # on which tokens the policy loss and the entropy bonus act
    if config.needs_entropies:
        if entropies is None:
            raise MemplanError("entropy_bonus and top_entropy need entropies, [B, N]: pass token_entropies(logits)")
        if config.top_entropy < 1:
            acting = top_entropy_mask(entropies, mask, config.top_entropy).to(logprobs.dtype)

    per_token = _policy_loss(logprobs, old, mask, advantages, batch, config)
    if config.top_entropy < 1:
        per_token = per_token * acting
    if config.beta:
        reference = torch.where(counts, _needed(batch, "ref_logprobs", f"beta={config.beta}"), 0.0)
        per_token = per_token + config.beta * kl_estimate(logprobs, reference, old, config.kl)
    loss = reduce_loss(per_token, mask, config, batch.get("completion_tokens"))
    if config.entropy_bonus:
        assert entropies is not None  # needs_entropies
        loss = loss - config.entropy_bonus * mean_entropy(entropies, acting)
    return loss


def _policy_loss(
    logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, batch: Batch, config: GRPOConfig
) -> Tensor:
    """Of each token, [B, N] or [B, 1], with the sampler's correction and the off-policy mask."""
    correction = None
    if config.sampler_correction is not None:
        sampler = _needed(batch, "sampler_logprobs", f"sampler_correction={config.sampler_correction!r}")
        bounds = config.sampler_clip_min, config.sampler_clip_max
        correction = sampler_ratio(old, sampler, mask, config.sampler_correction, *bounds)
    if config.loss_type == "vespo":
        shape = config.vespo_k, config.vespo_lambda
        per_token = vespo_loss(logprobs, old, mask, advantages, *shape, correction)
    else:
        per_token = _ratio_loss(logprobs, old, mask, advantages, config)
        per_token = per_token if correction is None else per_token * correction
    if config.off_policy_threshold is not None:
        sampler = batch.get("sampler_logprobs", old)
        per_token = per_token * off_policy_mask(logprobs, sampler, mask, advantages, config.off_policy_threshold)
    return per_token


def _ratio_loss(logprobs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor, config: GRPOConfig) -> Tensor:
    by_sequence = config.importance_level == "sequence"
    ratio = sequence_ratio(logprobs, old, mask) if by_sequence else policy_ratio(logprobs, old)
    if config.loss_type == "cispo":
        return cispo_loss(ratio, logprobs, advantages, config.clip_high)
    if config.loss_type == "sapo":
        return sapo_loss(ratio, advantages, config.sapo_tau)
    return clipped_loss(ratio, advantages, config.clip_low, config.clip_high, config.delta)


def _needed(batch: Batch, key: str, option: str = "the loss") -> Tensor:
    if key not in batch:
        raise MemplanError(
            f"{option} needs batch[{key!r}], which is not there; the batch has {', '.join(batch)}: add it"
        )
    return batch[key]
