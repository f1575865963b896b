"""Policy losses of tokens from log-probs, in plain torch.

In come log-probs of the sampled tokens, float32 at least, out come losses of tokens; reductions.py makes a scalar.
What must hold: equal policies have ratio exactly 1 and, whatever the loss, the gradient -A.

Letters, as in the formulas below: l log-prob under the policy, o under the policy that sampled, r under the
reference, s as the sampler itself reported it; A advantage, m mask, w = exp(l - o), n the sum of m in a row.
Shapes: B completions, N predicted tokens each (T - 1 in step.py). Nothing here reads where m is 0, if l and o are
finite there; batch_loss sees to that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(80) is still a float32. Beyond, w would be inf, and the gradient 0 of a clip times inf is nan.
_LARGEST_LOG_RATIO = 80.0
# VESPO's own bounds: a token's log ratio, and the sequence's log weight
_VESPO_TOKEN, _VESPO_LOG = 20.0, (math.log(1e-8), 20.0)


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """w = exp(l - o), [B, N]: exactly 1 where both are equal; at most exp(80), and constant from there on."""
    return torch.exp((logprobs - old_logprobs).clamp(max=_LARGEST_LOG_RATIO))


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """w = exp(sum m (l - o) / n), [B, 1]: the geometric mean of the tokens' ratios, 1 for an empty completion.

    Its gradient in l is w m / n. Source: GSPO (Zheng et al. 2025).
    """
    difference = torch.where(mask > 0, logprobs - old_logprobs, 0.0).sum(-1, keepdim=True)
    return policy_ratio(difference / mask.sum(-1, keepdim=True).clamp(min=1), torch.zeros_like(difference))


def clipped_loss(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, delta: float | None = None
) -> Tensor:
    """-min(min(w, delta) A, clip(w, 1 - clip_low, 1 + clip_high) A).

    ratio [B, N] or [B, 1], advantages [B]; returns the ratio's shape. Its gradient in l is -A w, and 0 where a clip is
    active. Source: PPO's surrogate (Schulman et al. 2017), as used by GRPO (Shao et al. 2024, DeepSeekMath, eq. 3);
    delta, which bounds the loss of a negative advantage: INTELLECT-2 (Prime Intellect 2025).
    """
    advantages = advantages.unsqueeze(-1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def cispo_loss(ratio: Tensor, logprobs: Tensor, advantages: Tensor, cap: float) -> Tensor:
    """-min(w, cap) A l, [B, N], where min(w, cap) is held constant: no token's gradient is clipped away.

    ratio [B, N] or [B, 1], logprobs [B, N], advantages [B]. Its gradient in l is -min(w, cap) A.
    Source: CISPO (MiniMax-M1, 2025), with an upper bound alone as in ScaleRL (Khatri et al. 2025).
    """
    return -ratio.clamp(max=cap).detach() * advantages.unsqueeze(-1) * logprobs


def sapo_loss(ratio: Tensor, advantages: Tensor, tau: tuple[float, float] = (1.0, 1.05)) -> Tensor:
    """-A (4 / tau) sigmoid(tau (w - 1)), a soft gate in the place of the clip; tau[0] where A > 0, else tau[1].

    ratio [B, N] or [B, 1], advantages [B]; returns the ratio's shape. Its gradient in l is -4 A s (1 - s) w, with s the
    sigmoid. Source: SAPO (Gao et al. 2025).
    """
    advantages = advantages.unsqueeze(-1)
    temperature = torch.where(advantages > 0, *tau).to(ratio.dtype)
    return -advantages * torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature


def vespo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    k: tuple[float, float] = (2.0, 3.0),
    rate: tuple[float, float] = (3.0, 2.0),
    sampler: Tensor | None = None,
) -> Tensor:
    """-phi(W) A l, [B, N], with phi(W) = W^k exp(rate (1 - W)) held constant; k[0], rate[0] where A >= 0, else [1].

    W = exp(sum m (l - o)) is the ratio of the whole completion, times the product of `sampler` [B, N], the ratios of
    the old policy to the sampler, if given. logprobs, old_logprobs, mask [B, N], advantages [B].
    Its gradient in l is -phi A, and phi(1) = 1. Source: VESPO (Shen et al. 2026), with the bounds of its code: log
    ratios of tokens within 20 nats, log W from log(1e-8) to 20.
    """
    advantages, counts = advantages.unsqueeze(-1), mask > 0
    difference = (logprobs - old_logprobs).detach().clamp(-_VESPO_TOKEN, _VESPO_TOKEN)
    if sampler is not None:
        difference = difference + sampler.log().clamp(*_VESPO_LOG)  # log 0, of a ratio that is masked out, is -inf
    log_weight = torch.where(counts, difference, 0.0).sum(-1, keepdim=True).clamp(*_VESPO_LOG)
    power, falling = (torch.where(advantages >= 0, *pair).to(logprobs.dtype) for pair in (k, rate))
    phi = (power * log_weight + falling * (1 - log_weight.exp())).exp()
    return -phi * advantages * logprobs
