"""Estimates of the KL divergence between policy and reference from sampled tokens; letters as in losses.py.

What must hold: exactly 0 between equal policies. As a loss, what an estimator descends is not what its value says:
benchmarks/kl_estimators.py compares expected gradients with the exact ones, by enumeration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.grpo.choices import KLEstimator
from memplan.grpo.losses import policy_ratio


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """Per-token estimate of a KL divergence from tokens that the old policy sampled; all [B, N].

        k2      (r - l)^2 / 2                  its gradient is that of the reverse KL on-policy
        k3      exp(r - l) - (r - l) - 1       unbiased and >= 0; as a loss it has the gradient of the forward KL
        k3_is   w (exp(r - l) - (r - l) - 1)   its gradient w (l - r) is that of the reverse KL on- and off-policy
        fkl     exp(r - o) (r - l)             value and gradient -exp(r - o) of the forward KL, on- and off-policy

    Reverse is KL(policy || reference), forward KL(reference || policy). Gradients are in expectation over the sampled
    tokens. w is the token's ratio, also where the loss has sequences' ratios: only then do the gradients hold.
    Source: J. Schulman, "Approximating KL divergence" (2020); k3 in GRPO: Shao et al. 2024, eq. 4; k3_is: DeepSeek-V3.2
    (2025).
    """
    difference = ref_logprobs - logprobs
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        return torch.expm1(difference) - difference
    weight = policy_ratio(ref_logprobs, old_logprobs)
    if kind == "fkl":
        return weight * difference
    # exp(r - l) w = exp(r - o) has no l in it: multiplied out, neither value nor gradient overflows with r - l.
    return weight - policy_ratio(logprobs, old_logprobs) * (1 + difference)


def kl_in_reward(rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Rewards less beta times k1 = sum m (o - r), before they become advantages.

    rewards [B], the others [B, N]; returns [B]. k1 is the plain unbiased estimate of KL(policy || reference). As a loss
    its gradient is 0 in expectation; in the reward, the policy gradient makes it that of the reverse KL (PPO for
    language models: Ziegler et al. 2019, eq. 2; Ouyang et al. 2022).
    """
    if rewards.shape != mask.shape[:1]:
        raise MemplanError(f"rewards {[*rewards.shape]} must be one for each row of the mask {[*mask.shape]}: pass [B]")
    return rewards - beta * torch.where(mask > 0, old_logprobs - ref_logprobs, 0.0).sum(-1)
