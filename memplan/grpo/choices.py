"""What the options of the loss may be, and which go together.

What must hold: a value or a combination that has no meaning is refused by name, in one line that says what to do.
"""

from __future__ import annotations

import math
import typing
from typing import TYPE_CHECKING, Literal

from memplan.errors import MemplanError, did_you_mean

if TYPE_CHECKING:
    from memplan.grpo.config import GRPOConfig

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
KLEstimator = Literal["k2", "k3", "k3_is", "fkl"]
ImportanceLevel = Literal["token", "sequence"]
SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # PPO's surrogate; they differ in their reduction


def check(config: GRPOConfig) -> None:
    """Raises MemplanError if the options make no sense."""
    _check_names(config)
    _check_numbers(config)
    _check_loss_type(config)
    _check_sampler(config)


def _check_names(c: GRPOConfig) -> None:
    _known("loss_type", c.loss_type, LossType)
    _known("kl", c.kl, KLEstimator)
    _known("importance_level", c.importance_level, ImportanceLevel)
    if c.sampler_correction is not None:
        _known("sampler_correction", c.sampler_correction, SamplerCorrection)


def _known(option: str, value: str, kind: object) -> None:
    valid = typing.get_args(kind)
    if value not in valid:
        k1 = "; as a loss k1 has gradient 0 on average: kl_in_reward puts it in the rewards"
        hint = k1 if value == "k1" else did_you_mean(value, valid)
        raise MemplanError(f"{option} {value!r} is not offered: it is one of {', '.join(valid)}{hint}")


def _check_numbers(c: GRPOConfig) -> None:
    _number("clip_low", c.clip_low, 0 <= _real(c.clip_low) <= 1, "from 0 to 1: the ratio's lower bound is 1 - clip_low")
    _number("clip_high", c.clip_high, _real(c.clip_high) >= 0, "0 or more: the ratio's upper bound is 1 + clip_high")
    _number("beta", c.beta, _real(c.beta) >= 0, "zero (no KL term) or a positive number")
    _number("entropy_bonus", c.entropy_bonus, math.isfinite(_real(c.entropy_bonus)), "a finite number, 0 for no bonus")
    _number("top_entropy", c.top_entropy, 0 <= _real(c.top_entropy) <= 1, "a share from 0 to 1; 1 keeps all tokens")
    _number("temperature", c.temperature, _real(c.temperature) > 0, "a positive number; 1 changes nothing")
    _number("logit_scale", c.logit_scale, _real(c.logit_scale) > 0, "a positive number; 1 changes nothing")
    if c.softcap is not None:
        _number("softcap", c.softcap, _real(c.softcap) > 0, "a positive number, or None for no cap")
    if c.off_policy_threshold is not None:
        fine = _real(c.off_policy_threshold) >= 0
        _number("off_policy_threshold", c.off_policy_threshold, fine, "0 nats or more, or None for no mask")
    for option, pair, least in (("sapo_tau", c.sapo_tau, "> 0"), ("vespo_lambda", c.vespo_lambda, "> 0"),
                                ("vespo_k", c.vespo_k, ">= 0")):  # fmt: skip
        fine = isinstance(pair, tuple) and len(pair) == 2
        fine = fine and all(_real(v) > 0 or (least == ">= 0" and v == 0) for v in pair)
        _number(option, pair, fine, f"two numbers {least}, for positive and for negative advantages")


def _real(value: object) -> float:
    """The value, or nan, which no comparison accepts, for what is not a finite number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _number(option: str, value: object, fine: bool, valid: str) -> None:
    if not fine:
        raise MemplanError(f"{option}={value!r} must be {valid}")


def _check_loss_type(c: GRPOConfig) -> None:
    name = c.loss_type
    if name == "dr_grpo" and (c.max_completion_length or 0) < 1:
        raise MemplanError("loss_type 'dr_grpo' divides by max_completion_length: set it to at least 1 token")
    if name == "luspo" and c.importance_level != "sequence":
        raise MemplanError("loss_type 'luspo' is made of sequences' ratios: set importance_level='sequence'")
    if name == "vespo" and c.importance_level != "token":
        raise MemplanError("loss_type 'vespo' weighs whole sequences by itself: leave importance_level='token'")
    if name == "cispo" and c.clip_high < 1:
        raise MemplanError(
            f"loss_type 'cispo' caps the ratio at clip_high itself, and clip_high={c.clip_high} is below the ratio of "
            "equal policies, 1: set clip_high to the cap, such as 5.0 (1.28 where another loss has 0.28)"
        )
    if c.delta is not None and name not in CLIPPED:
        raise MemplanError(f"delta={c.delta} has no place in loss_type {name!r}: it is for {', '.join(CLIPPED)}")
    if c.delta is not None and not _real(c.delta) > 1 + c.clip_high:
        raise MemplanError(
            f"delta={c.delta} must be above 1 + clip_high = {1 + c.clip_high}, or it is clipped away; None for no bound"
        )


def _check_sampler(c: GRPOConfig) -> None:
    mode, low, high = c.sampler_correction, c.sampler_clip_min, c.sampler_clip_max
    if mode is None:
        if low is not None:
            raise MemplanError(f"sampler_clip_min={low} bounds nothing: set sampler_correction, or leave it out")
        return
    if c.loss_type == "vespo" and mode not in ("token_truncate", "token_mask"):
        raise MemplanError(
            f"loss_type 'vespo' takes ratios of tokens, not {mode!r}: set 'token_truncate' or 'token_mask'"
        )
    for option, bound in (("sampler_clip_min", low), ("sampler_clip_max", high)):
        if bound is not None:
            _number(option, bound, _real(bound) >= 0, "a ratio, 0 or more, or None for no bound")
    if low is not None and high is not None and low >= high:
        raise MemplanError(f"sampler_clip_min={low} must be below sampler_clip_max={high}: swap them, or leave one out")
    if low is None and high is None:
        raise MemplanError(f"sampler_correction {mode!r} without bounds: set sampler_clip_max or sampler_clip_min")
