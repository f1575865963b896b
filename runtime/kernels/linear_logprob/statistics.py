"""Log-prob and entropy of rows, from logits that come tile by tile.

The target t is kept apart from the rest, so that nothing is lost where p_t is close to 1 (or to 0):

    rest = logsumexp over j != t of z_j
    l    = -softplus(rest - z_t)            1 - p_t = -expm1(l)
    H    = -p_t l - (1 - p_t) log(1 - p_t) + (1 - p_t) H_rest       H_rest: entropy of q_j = p_j / (1 - p_t), j != t

log_softmax, which computes z_t - logsumexp(z), returns 0 with gradient 0 in float32 once z_t leads by 16 nats.
Infinite and nan logits give what log_softmax gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -800.0  # exp of it is 0, also in float64; unlike -inf it can be multiplied by 0


def inside(labels_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each label is in a tile [R, 1], and at which column of it, or any [R, 1]."""
    local_R = labels_R - columns.start
    width = columns.stop - columns.start
    return ((local_R >= 0) & (local_R < width)).unsqueeze(1), local_R.clamp(0, width - 1).unsqueeze(1)


@dataclass
class Results:
    """Per row: log-prob, logsumexp over all logits, and entropy, if asked for; for vectors.py log(1 - p_t), and the sum
    over all but the target of exp(z - top).
    """

    logprob_R: Tensor
    total_R: Tensor
    entropy_R: Tensor | None
    log_others_R: Tensor
    sum_R: Tensor


class Statistics:
    """Of R rows, online: maximum and sum of all logits but the target's, and the target's."""

    def __init__(self, labels_R: Tensor, dtype: torch.dtype, *, entropy: bool) -> None:
        self.labels_R = labels_R
        self.sum_R = torch.zeros(labels_R.shape, dtype=dtype, device=labels_R.device)
        self.top_R = torch.full_like(self.sum_R, -torch.inf)
        self.target_R = torch.full_like(self.sum_R, torch.nan)  # stays nan if the label is no token
        self.weighted_R = torch.zeros_like(self.sum_R) if entropy else None
        self.taken_off_R = self.sum_R  # from the logits of the last tile

    def add(self, z_RC: Tensor, columns: slice, scratch_RC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add a tile. z becomes e = exp(z - top), and 0 for targets. With entropy, that is in the scratch, and z
        becomes e (z - top).

        Returns what sums of e so far are to be multiplied with, and what each z - top has been lowered by: [R] both.
        """
        there_R1, at_R1 = inside(self.labels_R, columns)
        found_R1 = z_RC.gather(1, at_R1)
        self.target_R = torch.where(there_R1, found_R1, self.target_R.unsqueeze(1)).squeeze(1)
        z_RC.scatter_(1, at_R1, found_R1.masked_fill(there_R1, -torch.inf))
        top_R = torch.maximum(self.top_R, z_RC.amax(1))
        finite_R = top_R.masked_fill(top_R == -torch.inf, 0)  # nothing yet: -inf - -inf would be nan
        self.taken_off_R = finite_R
        shift_R = (self.top_R - finite_R).clamp_(min=LOWEST)
        factor_R = shift_R.exp()
        z_RC.sub_(finite_R.unsqueeze(1))
        if self.weighted_R is None:
            added_R = z_RC.exp_().sum(1)
        else:
            assert scratch_RC is not None
            added_R = torch.exp(z_RC, out=scratch_RC).sum(1)
            z_RC.clamp_(min=LOWEST).mul_(scratch_RC)
            self.weighted_R = factor_R * (self.weighted_R + shift_R * self.sum_R) + z_RC.sum(1)
        self.top_R, self.sum_R = top_R, factor_R * self.sum_R + added_R
        return factor_R, shift_R

    def results(self) -> Results:
        """When all tiles are in."""
        target_R = self.target_R
        top_R = self.top_R.masked_fill(self.top_R == -torch.inf, 0)
        rest_R = top_R + self.sum_R.log()
        margin_R = target_R - top_R - self.sum_R.log()  # not target - rest, which is rounded once more
        # and where the target does not lead, as log_softmax does, for the same reason
        beside_R = target_R - top_R - (self.sum_R + (target_R - top_R).exp()).log()
        logprob_R = torch.where(margin_R > 0, torch.nn.functional.logsigmoid(margin_R), beside_R)
        # log_softmax is nan there: inf - inf
        logprob_R = logprob_R.masked_fill(target_R == torch.inf, torch.nan)
        log_others_R = torch.nn.functional.logsigmoid(-margin_R)
        entropy_R = None
        if self.weighted_R is not None:
            others_R = -logprob_R.expm1()
            within_R = self.sum_R.log() - self.weighted_R / self.sum_R
            entropy_R = torch.where(others_R == 0, 0, others_R * (within_R - log_others_R))
            entropy_R += torch.where(logprob_R == -torch.inf, 0, -logprob_R.exp() * logprob_R)
        return Results(logprob_R, torch.logaddexp(rest_R, target_R), entropy_R, log_others_R, self.sum_R)
