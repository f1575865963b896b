"""Fused linear + log-prob of given tokens: api.py is what callers use."""

from memplan.runtime.kernels.linear_logprob.api import linear_logprob

__all__ = ["linear_logprob"]
