"""GRPO as users write it: plain torch losses, the train step, verifiable tasks and rollouts. No memory tricks here."""

from memplan.grpo.advantages import group_advantages
from memplan.grpo.checkpoint import load_checkpoint, save_checkpoint
from memplan.grpo.config import GRPOConfig
from memplan.grpo.corrections import off_policy_mask, sampler_ratio, top_entropy_mask
from memplan.grpo.data import Collate, TokenBatches
from memplan.grpo.kl import kl_estimate, kl_in_reward
from memplan.grpo.logprobs import policy_logits, selected_logprobs, token_entropies
from memplan.grpo.losses import cispo_loss, clipped_loss, policy_ratio, sapo_loss, sequence_ratio, vespo_loss
from memplan.grpo.objective import Batch, batch_loss
from memplan.grpo.packing import pack
from memplan.grpo.reductions import mean_entropy, reduce_loss
from memplan.grpo.rollout import Rollout, rollout, score
from memplan.grpo.step import batch_logprobs, grpo_loss, make_step, token_logprobs
from memplan.grpo.tasks import CharTokenizer, Task, make_tasks

__all__ = [
    "Batch",
    "CharTokenizer",
    "Collate",
    "GRPOConfig",
    "Rollout",
    "Task",
    "TokenBatches",
    "batch_logprobs",
    "batch_loss",
    "cispo_loss",
    "clipped_loss",
    "group_advantages",
    "grpo_loss",
    "kl_estimate",
    "kl_in_reward",
    "load_checkpoint",
    "make_step",
    "make_tasks",
    "mean_entropy",
    "off_policy_mask",
    "pack",
    "policy_logits",
    "policy_ratio",
    "reduce_loss",
    "rollout",
    "sampler_ratio",
    "sapo_loss",
    "save_checkpoint",
    "score",
    "selected_logprobs",
    "sequence_ratio",
    "token_entropies",
    "token_logprobs",
    "top_entropy_mask",
    "vespo_loss",
]
