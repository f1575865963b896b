"""What weighs a token's policy loss: the sampler's mismatch, how far off the policy is, and entropy; letters as in
losses.py.

What must hold: the weights have no gradient, and nothing waits for the device: masks are applied, never indexed with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.grpo.choices import SamplerCorrection
from memplan.grpo.losses import policy_ratio


def sampler_ratio(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    mode: SamplerCorrection,
    clip_min: float | None = None,
    clip_max: float | None = 3.0,
) -> Tensor:
    """exp(o - s) of each token, [B, N], or exp(sum m (o - s)) of each sequence, [B, 1], kept within bounds.

    The sampler (vLLM) and the trainer compute the same policy in other kernels, so s is not o. truncate puts a ratio
    that is out of bounds on the bound, mask makes it 0. All inputs [B, N]; where s is nan, unknown, the ratio is 1.
    Source: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
    RL training"); mask, and the level of sequences: Liu et al. 2025, "When speed kills stability".
    """
    level, how = mode.split("_")
    difference = torch.where((mask > 0) & ~sampler_logprobs.isnan(), old_logprobs - sampler_logprobs, 0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio = policy_ratio(difference, torch.zeros_like(difference)).detach()
    bounded = ratio.clamp(clip_min, clip_max)
    return bounded if how == "truncate" else torch.where(bounded == ratio, ratio, 0.0)


def off_policy_mask(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor, threshold: float
) -> Tensor:
    """1 for a completion whose policy loss counts, else 0; [B, 1] in the dtype of `logprobs`.

    Dropped is what has a negative advantage and sum m (s - l) / n > threshold: the policy has already left it.
    logprobs, sampler_logprobs (nan: unknown, adds 0) and mask [B, N], advantages [B].
    Source: DeepSeek-V3.2 (2025, eq. 9).
    """
    known = (mask > 0) & ~sampler_logprobs.isnan()
    difference = torch.where(known, sampler_logprobs - logprobs.detach(), 0.0).sum(-1, keepdim=True)
    left = difference / mask.sum(-1, keepdim=True).clamp(min=1) > threshold
    return (~left | (advantages.unsqueeze(-1) >= 0)).to(logprobs.dtype)


def top_entropy_mask(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """True for the tokens that count and whose entropy is in the top `share` of this batch; all [B, N].

    The threshold is the (1 - share) quantile, linear between two values, of the tokens that count; share 0 keeps the
    highest alone. Source: Wang et al. 2025, "Beyond the 80/20 rule".
    """
    counts, entropies = mask > 0, entropies.detach().float()  # a rank that is whole but for rounding is rounded to it
    # Boolean indexing would wait for the count: what does not count is sorted to the end instead.
    ordered = torch.where(counts, entropies, torch.inf).flatten().sort().values
    rank = ((counts.sum() - 1) * (1 - share)).clamp(min=0)
    below, above = (ordered.gather(0, r.long().view(1)) for r in (rank.floor(), rank.ceil()))
    threshold = torch.lerp(below, above, rank - rank.floor())
    return counts & (entropies >= threshold)
