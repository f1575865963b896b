"""Fused linear + log-prob of given tokens: api.py and loss.py are what callers use."""

from memplan.runtime.kernels.linear_logprob.api import linear_logprob
from memplan.runtime.kernels.linear_logprob.loss import linear_logprob_loss

__all__ = ["linear_logprob", "linear_logprob_loss"]
