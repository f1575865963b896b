"""From losses of tokens to a scalar; letters as in losses.py.

What must hold: what is masked has no influence, not even as inf; a batch without completions gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.grpo.config import GRPOConfig


def reduce_loss(
    per_token: Tensor, mask: Tensor, config: GRPOConfig, completion_tokens: Tensor | float | None = None
) -> Tensor:
    """Mean of the tokens that count; per_token [B, N] or [B, 1], mask [B, N] of 0 and 1 in its dtype; a scalar.

    grpo, sapo          mean over completions of sum(m p) / max(n, 1)       Shao et al. 2024
    bnpo                sum(m p) / max(sum m, 1) over the whole batch       every token weighs the same
    dr_grpo             sum(m p) / (B * max_completion_length)              Liu et al. 2025: no bias by length
    dapo, cispo, vespo  sum(m p) / max(completion_tokens, 1)                Yu et al. 2025: parts of a batch add up
    luspo               mean over completions of sum(m p)                   Liu et al. 2026: undoes GSPO's 1 / n

    `completion_tokens` are those of the whole batch of which this may be a part, a number or a scalar tensor.
    """
    # where, not a product: a padded token may hold inf, and inf * 0 is nan.
    counted = torch.where(mask > 0, per_token, 0.0)
    kind = config.loss_type
    if kind in ("grpo", "sapo"):
        return (counted.sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if kind == "bnpo":
        return counted.sum() / mask.sum().clamp(min=1)
    if kind == "luspo":
        return counted.sum(-1).mean()
    if kind == "dr_grpo":
        assert config.max_completion_length is not None  # GRPOConfig checked it
        return counted.sum() / (per_token.shape[0] * config.max_completion_length)
    if completion_tokens is None:
        raise MemplanError(
            f"loss_type {kind!r} divides by batch['completion_tokens'], which is not there: add the completion tokens "
            "of the whole generation batch over all ranks, a scalar; for one batch alone it is completion_mask.sum()"
        )
    if not isinstance(completion_tokens, Tensor):
        return counted.sum() / max(completion_tokens, 1)
    return counted.sum() / completion_tokens.clamp(min=1)


def mean_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count, whatever the loss's own reduction; both [B, N], a scalar in nats."""
    return torch.where(mask > 0, entropies, 0.0).sum() / mask.sum().clamp(min=1)
