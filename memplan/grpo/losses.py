"""GRPO losses and KL estimators on log-probs, in plain torch.

In come float32 log-probs of the sampled tokens, out come per-token losses and their reduction to a scalar.
What must hold: equal policies have ratio exactly 1 and KL exactly 0; a masked token has no influence.

Letters, as in the formulas below: l log-prob under the policy, o under the policy that sampled, r under the
reference; A advantage, m mask, w = exp(l - o). Shapes: B completions, N predicted tokens each (T - 1 in step.py).
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memplan.errors import MemplanError, did_you_mean

LossType = Literal["grpo", "bnpo", "dr_grpo"]
KLEstimator = Literal["k2", "k3", "k3_is"]


@dataclass(frozen=True)
class GRPOConfig:
    """What the loss needs to know. Raises MemplanError on a value that makes no sense.

    `clip_low`, `clip_high`: the ratio is clipped to [1 - clip_low, 1 + clip_high].
    `beta`: weight of the KL term; 0 leaves it out, and then no reference log-probs are needed.
    `max_completion_length`: tokens, the constant that dr_grpo divides by; the other losses ignore it.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    loss_type: LossType = "grpo"
    kl: KLEstimator = "k3"
    temperature: float = 1.0
    max_completion_length: int | None = None

    def __post_init__(self) -> None:
        _known("loss_type", self.loss_type, typing.get_args(LossType))
        _known("kl", self.kl, typing.get_args(KLEstimator))
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise MemplanError(f"clip_low={self.clip_low}, clip_high={self.clip_high}: need 0 <= low <= 1, 0 <= high")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise MemplanError(f"temperature={self.temperature} must be a positive number")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise MemplanError(f"beta={self.beta} must be zero (no KL term) or a positive number")
        if self.loss_type == "dr_grpo" and (self.max_completion_length or 0) < 1:
            raise MemplanError("loss_type 'dr_grpo' divides by max_completion_length: set it to at least 1 token")


def _known(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        choices = ", ".join(valid)
        raise MemplanError(f"{option} {value!r} is not offered: it is one of {choices}{did_you_mean(value, valid)}")


def selected_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of each token: log_softmax(logits / temperature)[token].

    logits [..., V] of any float dtype, tokens [...] int64; returns [...] float32, whatever the dtype of the logits:
    log-probs rounded to bfloat16 put gradients off by 10 %. Float64 logits stay float64.
    Beyond a margin of about 16 nats over all other tokens, a float32 result rounds to 0 and has no gradient.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:  # dividing by 1 would change nothing but cost another [..., V]
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """w = exp(l - o), [B, N]: exactly 1 where both are equal."""
    return torch.exp(logprobs - old_logprobs)


def clipped_loss(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) per token.

    ratio [B, N], advantages [B]; returns [B, N]. Its gradient in l is -A w, and 0 where the clip is active.
    Source: PPO's surrogate (Schulman et al. 2017), as used by GRPO (Shao et al. 2024, DeepSeekMath, eq. 3).
    """
    advantages = advantages.unsqueeze(-1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the old policy sampled; all [B, N].

        k2      (r - l)^2 / 2                  its gradient is that of the reverse KL on-policy
        k3      exp(r - l) - (r - l) - 1       unbiased and >= 0; as a loss it has the gradient of the forward KL
        k3_is   w (exp(r - l) - (r - l) - 1)   its gradient w (l - r) is that of the reverse KL on- and off-policy

    Gradients are in expectation over the sampled tokens. Source: J. Schulman, "Approximating KL divergence" (2020);
    k3 in GRPO: Shao et al. 2024, eq. 4.
    """
    difference = ref_logprobs - logprobs
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(difference) - difference
    # exp(r - l) w = exp(r - o) has no l in it: multiplied out, neither value nor gradient overflows with r - l.
    return torch.exp(ref_logprobs - old_logprobs) - policy_ratio(logprobs, old_logprobs) * (1 + difference)


def reduce_loss(per_token: Tensor, mask: Tensor, config: GRPOConfig) -> Tensor:
    """Mean of the tokens that count; per_token [B, N], mask [B, N] of 0 and 1 in the same dtype; returns a scalar.

    grpo      mean over completions of sum(m p) / max(sum m, 1)     Shao et al. 2024
    bnpo      sum(m p) / max(sum m, 1) over the whole batch         every token weighs the same
    dr_grpo   sum(m p) / (B * max_completion_length)                Liu et al. 2025: no bias by length
    """
    # where, not a product: a padded token may hold inf, and inf * 0 is nan.
    counted = torch.where(mask > 0, per_token, 0.0)
    if config.loss_type == "grpo":
        return (counted.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if config.loss_type == "bnpo":
        return counted.sum() / mask.sum().clamp(min=1)
    assert config.max_completion_length is not None  # GRPOConfig checked it
    return counted.sum() / (per_token.shape[0] * config.max_completion_length)


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """A = (r - mean) / (std + eps) within each group of completions to one prompt.

    rewards [B], groups are `group_size` consecutive entries; returns [B] float32. `std` is the unbiased one.
    scale=False leaves out the division (Liu et al. 2025, dr_grpo). Source: Shao et al. 2024, section 4.1.2.
    A group of equal rewards has advantages 0: it teaches nothing.
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise MemplanError(f"{rewards.numel()} rewards do not split into groups of {group_size} (at least 2 each)")
    groups = rewards.float().view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(-1, keepdim=True) + eps)
    return advantages.flatten()
