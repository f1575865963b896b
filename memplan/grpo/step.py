"""The GRPO train step: a batch of scored completions in, a scalar loss out; the caller runs .backward().

What must hold: it is one graph (no graph breaks), and log-probs of old, reference and new policy come from the same
function, so that equal weights give a ratio of exactly 1.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from memplan.errors import MemplanError
from memplan.grpo.losses import GRPOConfig, clipped_loss, kl_estimate, policy_ratio, reduce_loss, selected_logprobs

# input_ids        [B, T] int64: prompt, completion, padding on the right
# completion_mask  [B, T-1] float32: entry t is 1 if input_ids[:, t + 1] belongs to the completion
# advantages       [B] float32
# old_logprobs     [B, T-1] float32: entry t is the log-prob of input_ids[:, t + 1]
# ref_logprobs     [B, T-1] float32, only if beta > 0
Batch = dict[str, Tensor]


def token_logprobs(model: nn.Module, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of every token given those before it; input_ids [B, T] int64, returns [B, T-1] float32.

    `model` is called as transformers' causal language models are: model(input_ids=..., use_cache=False).logits.
    """
    # No attention mask: padding is on the right and attention is causal, so no token that counts sees padding.
    # The last token predicts nothing that is known, so the model does not see it.
    logits = model(input_ids=input_ids[:, :-1], attention_mask=None, use_cache=False).logits
    return selected_logprobs(logits, input_ids[:, 1:], temperature)


def grpo_loss(model: nn.Module, batch: Batch, config: GRPOConfig) -> Tensor:
    """The clipped policy loss plus beta times the KL estimate, reduced as config.loss_type says: a float32 scalar."""
    mask = batch["completion_mask"]
    old = batch["old_logprobs"]
    # A token that does not count gets the old policy's log-prob: no overflow of its ratio reaches the gradient.
    logprobs = token_logprobs(model, batch["input_ids"], config.temperature).where(mask > 0, old)
    per_token = clipped_loss(policy_ratio(logprobs, old), batch["advantages"], config.clip_low, config.clip_high)
    if config.beta:
        if "ref_logprobs" not in batch:
            raise MemplanError(f"beta={config.beta} needs batch['ref_logprobs'], [B, T-1]: add them, or set beta=0")
        per_token = per_token + config.beta * kl_estimate(logprobs, batch["ref_logprobs"], old, config.kl)
    return reduce_loss(per_token, mask, config)


def make_step(model: nn.Module, config: GRPOConfig | None = None) -> Callable[[Batch], Tensor]:
    """A plain function step(batch) -> loss, for torch.compile or memplan.plan; .backward() stays with the caller."""
    config = config or GRPOConfig()

    def step(batch: Batch) -> Tensor:
        return grpo_loss(model, batch, config)

    return step
