"""GRPO as users write it: plain torch losses, the train step, verifiable tasks and rollouts. No memory tricks here."""

from memplan.grpo.losses import (
    GRPOConfig,
    clipped_loss,
    group_advantages,
    kl_estimate,
    policy_ratio,
    reduce_loss,
    selected_logprobs,
)
from memplan.grpo.rollout import Rollout, rollout
from memplan.grpo.step import Batch, grpo_loss, make_step, token_logprobs
from memplan.grpo.tasks import CharTokenizer, Task, make_tasks

__all__ = [
    "Batch",
    "CharTokenizer",
    "GRPOConfig",
    "Rollout",
    "Task",
    "clipped_loss",
    "group_advantages",
    "grpo_loss",
    "kl_estimate",
    "make_step",
    "make_tasks",
    "policy_ratio",
    "reduce_loss",
    "rollout",
    "selected_logprobs",
    "token_logprobs",
]
