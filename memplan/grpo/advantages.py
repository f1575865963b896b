"""Advantages from rewards: each completion against the others of its prompt."""

from __future__ import annotations

from torch import Tensor

from memplan.errors import MemplanError


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """A = (r - mean) / (std + eps) within each group of completions to one prompt.

    rewards [B], groups are `group_size` consecutive entries; returns [B] float32. `std` is the unbiased one.
    scale=False leaves out the division (Liu et al. 2025, dr_grpo). Source: Shao et al. 2024, section 4.1.2.
    A group of equal rewards has advantages 0: it teaches nothing. Raises MemplanError where a reward is not finite:
    all advantages of its group would be NaN, and with them the gradients.
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise MemplanError(f"{rewards.numel()} rewards do not split into groups of {group_size} (at least 2 each)")
    if not (finite := rewards.isfinite()).all():
        row = int(finite.logical_not().nonzero()[0])
        raise MemplanError(
            f"reward {row} is {float(rewards[row])}, of completion {row % group_size} in group {row // group_size}: "
            "rewards are finite; mend what scores it, or leave its group out"
        )
    groups = rewards.double().view(-1, group_size)
    groups = groups - groups[:, :1]  # so that equal rewards have exactly one mean, whatever it rounds to
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(-1, keepdim=True) + eps)
    return advantages.flatten().float()
