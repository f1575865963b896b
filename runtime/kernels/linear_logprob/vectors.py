"""dl/dh and dH/dh of each row, found in forward: with a frozen head, backward is then one product per row.

With q_j = p_j / (1 - p_t), the distribution of all but the target, s the slope of the softcap, W the weight's rows:

    dl/dh = (1 - p_t) (s_t W_t - Q)                                           Q  = sum of q_j s_j W_j
    dH/dh = -p_t (l + H) s_t W_t - (1 - p_t) (Q2 + (log(1 - p_t) + H) Q)      Q2 = sum of q_j log q_j s_j W_j

and both times dz/draw of head.py. Sums are online: when the maximum rises, what was added so far is scaled down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.runtime.kernels.linear_logprob.head import Head
from memplan.runtime.kernels.linear_logprob.statistics import LOWEST, Results, inside


class Vectors:
    """Those of one tile of rows."""

    def __init__(self, head: Head, labels_R: Tensor, width: int, *, entropy: bool) -> None:
        self.head, self.labels_R = head, labels_R
        rows, dtype = labels_R.shape[0], head.form.sums
        self.sum_RD = torch.zeros(rows, width, dtype=dtype, device=labels_R.device)
        self.weighted_RD = torch.zeros_like(self.sum_RD) if entropy else None
        self.slope_RC: Tensor | None = None
        self.target_slope_R1 = torch.ones(rows, 1, dtype=dtype, device=labels_R.device)

    def see(self, z_RC: Tensor, columns: slice) -> None:
        """Look at the logits, before the statistics take their memory."""
        if self.head.form.softcap is None:
            return
        self.slope_RC = self.head.slope_(z_RC.clone())
        there_R1, at_R1 = inside(self.labels_R, columns)
        self.target_slope_R1 = torch.where(there_R1, self.slope_RC.gather(1, at_R1), self.target_slope_R1)

    def add(
        self, z_RC: Tensor, scratch_RC: Tensor | None, weight_CD: Tensor, factor_R: Tensor, shift_R: Tensor
    ) -> None:
        """Add what `Statistics.add` left: e, or with entropy e (z - top), and e in the scratch."""
        e_RC = z_RC if scratch_RC is None else scratch_RC
        if self.slope_RC is not None:
            e_RC.mul_(self.slope_RC)
        factor_R1 = factor_R.unsqueeze(1)
        if self.weighted_RD is not None:
            if self.slope_RC is not None:
                z_RC.mul_(self.slope_RC)
            self.weighted_RD.addcmul_(self.sum_RD, shift_R.unsqueeze(1)).mul_(factor_R1).addmm_(z_RC, weight_CD)
        self.sum_RD.mul_(factor_R1).addmm_(e_RC, weight_CD)

    def of_logprob(self, results: Results) -> Tensor:
        """dl/dh, [R, D]."""
        mean_RD = self.sum_RD / nonzero(results.sum_R).unsqueeze(1)
        others_R1 = -results.logprob_R.expm1().unsqueeze(1)
        return self._target().sub_(mean_RD).mul_(others_R1 * self.head.form.factor)

    def of_entropy(self, results: Results) -> Tensor:
        """dH/dh, [R, D]."""
        assert self.weighted_RD is not None and results.entropy_R is not None
        sum_R1 = nonzero(results.sum_R).unsqueeze(1)
        logprob_R1, entropy_R1 = results.logprob_R.unsqueeze(1), results.entropy_R.unsqueeze(1)
        mean_RD = self.sum_RD / sum_R1
        # Q2 = weighted / sum - log(sum) Q, and what is in front of Q joins it
        level_R1 = results.log_others_R.unsqueeze(1).clamp(min=LOWEST) + entropy_R1 - sum_R1.log()
        rest_RD = mean_RD.mul_(level_R1).addcdiv_(self.weighted_RD, sum_R1).mul_(logprob_R1.expm1())
        target_R1 = logprob_R1.exp() * (logprob_R1.clamp(min=LOWEST) + entropy_R1)
        return rest_RD.addcmul_(self._target(), target_R1, value=-1).mul_(self.head.form.factor)

    def _target(self) -> Tensor:
        """s_t W_t, [R, D]: memory of its own."""
        last = self.head.weight_VD.shape[0] - 1
        return self.head.weights(self.labels_R.clamp(0, last)) * self.target_slope_R1


def nonzero(sum_R: Tensor) -> Tensor:
    """The sums, and 1 for those of nothing: the target is the whole vocabulary."""
    return sum_R.masked_fill(sum_R == 0, 1)
