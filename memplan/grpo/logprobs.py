"""Logits to log-probs of the sampled tokens, and to entropies.

What must hold: results are float32 at least, whatever the logits are, and a token that is nearly certain keeps its
log-prob and its gradient. log_softmax(z)[t] = z_t - logsumexp(z) would round both to 0 from a margin of 17 nats on in
float32, where a policy that has converged lives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_logits(
    logits: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """softcap * tanh(logit_scale * z / softcap) / temperature, as float32 (float64 stays), of the same shape.

    The order is that of Cohere's scale and Gemma 2's cap (2024), which their models apply before any temperature.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logit_scale != 1:  # multiplying by 1 would change nothing but cost another [..., V]
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature if temperature != 1 else logits


def selected_logprobs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-prob of each token under the softmax of policy_logits(logits, temperature, logit_scale, softcap).

    logits [..., V] of any float dtype, tokens [...] int64; returns [...] float32, whatever the dtype of the logits:
    log-probs rounded to bfloat16 put gradients off by 10 %. Float64 logits stay float64.

        l = -softplus(logsumexp over j != t of z_j - z_t)        1 - p = sigmoid of the same difference

    Logits of -inf are tokens that are never sampled.
    """
    z = policy_logits(logits, temperature, logit_scale, softcap)
    # A comparison instead of gather and scatter: under a compiler both are part of the reduction over the vocabulary,
    # and so are their gradients, which as scatters would need one more [..., V].
    here = torch.arange(z.shape[-1], device=z.device) == tokens.unsqueeze(-1)
    # Not -inf: where all others are -inf their logsumexp would be too, and its gradient nan.
    others = torch.where(here, torch.finfo(z.dtype).min, z).logsumexp(-1)
    margin = torch.where(here, z, 0).sum(-1) - others
    # softplus(-margin); torch's own drops what it adds to numbers over 20, and is less often known to be pointwise.
    return -torch.logaddexp(torch.zeros_like(margin), -margin)


def token_entropies(
    logits: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Entropy of the policy at each position, -sum p log p in nats; logits [..., V], returns [...] float32 or float64.

    Tokens of logit -inf add 0.
    """
    logprobs = policy_logits(logits, temperature, logit_scale, softcap).log_softmax(-1)
    # 0 * -inf is nan: the smallest number stands for -inf, and passes no gradient.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
