"""The options of the loss: one frozen value, checked when it is made (choices.py)."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.grpo.choices import ImportanceLevel, KLEstimator, LossType, SamplerCorrection, check


@dataclass(frozen=True)
class GRPOConfig:
    """What the loss needs to know. Raises MemplanError on a value or a combination that makes no sense.

    `loss_type`: the loss of a token (losses.py) and how it is averaged (reductions.py).
    `clip_low`, `clip_high`: the ratio is clipped to [1 - clip_low, 1 + clip_high]; cispo caps it at clip_high itself.
    `delta`: the ratio is at most this where the advantage is negative, too: the two-sided clip.
    `importance_level`: a ratio for each token, or one for each completion (GSPO).
    `beta`, `kl`: weight and estimator of the KL term (kl.py); with weight 0 no reference log-probs are needed.
    `max_completion_length`: tokens, the constant that dr_grpo divides by; the other losses ignore it.
    `temperature`, `logit_scale`, `softcap`: softcap * tanh(logit_scale * z / softcap) / temperature are the logits of
        the policy. Only for a model that returns a bare head's: transformers' models apply their own scale and cap.
        The old and the reference log-probs need the same.
    `entropy_bonus`: this times the mean entropy of the tokens that count, in nats, is subtracted from the loss.
    `top_entropy`: share of tokens, those of highest entropy in the batch, that have a policy loss and a bonus.
    `sampler_correction`, `sampler_clip_min`, `sampler_clip_max`: what becomes of exp(o - s), s the sampler's log-prob,
        before it weighs the policy loss (corrections.py); None leaves it out. vespo takes it into its own weight.
    `off_policy_threshold`: nats; a completion with a negative advantage that is further than this from the policy
        has no policy loss (corrections.py); None keeps all.
    `sapo_tau`: temperature for advantages > 0, and for the others. `vespo_k`, `vespo_lambda`: >= 0, and < 0.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    loss_type: LossType = "grpo"
    kl: KLEstimator = "k3"
    temperature: float = 1.0
    max_completion_length: int | None = None
    importance_level: ImportanceLevel = "token"
    delta: float | None = None
    entropy_bonus: float = 0.0
    top_entropy: float = 1.0
    sampler_correction: SamplerCorrection | None = None
    sampler_clip_min: float | None = None
    sampler_clip_max: float | None = 3.0
    off_policy_threshold: float | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    sapo_tau: tuple[float, float] = (1.0, 1.05)
    vespo_k: tuple[float, float] = (2.0, 3.0)
    vespo_lambda: tuple[float, float] = (3.0, 2.0)

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs_entropies(self) -> bool:
        """Whether the loss asks for the entropy of each token."""
        return self.entropy_bonus != 0 or self.top_entropy < 1
