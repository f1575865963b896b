"""The losses against TRL's own code (1.16.0), which is called, not typed again: value and gradient, in float64.

GRPOTrainer._compute_loss runs on a stand-in for the trainer, which has its options, log-probs and entropies, and one
process; the sampler's ratio, which TRL computes within generation, is compiled from the lines of its source.
Where the two differ by intention there is a test that says how.
"""

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from memplan.errors import MemplanError
from memplan.grpo import GRPOConfig, batch_loss, sampler_ratio, selected_logprobs, token_entropies
from memplan.grpo.choices import LossType, SamplerCorrection

pytest.importorskip("trl")

from trl.trainer import utils
from trl.trainer.grpo_trainer import GRPOTrainer

OPTIONS = {
    "importance_level": ["token", "sequence"],
    "delta": [None, 1.6],
    "kl": [None, "k3", "k3_is"],
    "entropy_bonus": [0.0, 0.02],
    "top_entropy": [1.0, 0.4],
    "sampler_correction": [None, *get_args(SamplerCorrection)],
    "sampler_clip_min": [None, 0.8],
    "off_policy_threshold": [None, 0.03],
}


def stand_in(config, logprobs, entropies, training=False):
    """What _compute_loss asks of the trainer: one process, no accumulation."""
    alone = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        accelerator=alone,
        model=SimpleNamespace(training=training),
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=config.entropy_bonus,
        _entropy_bonus_enabled=config.entropy_bonus != 0,
        top_entropy_quantile=config.top_entropy,
        off_policy_mask_threshold=config.off_policy_threshold,
        importance_sampling_level=config.importance_level,
        beta=config.beta,
        loss_type=config.loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        use_vllm=config.sampler_correction is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=config.sampler_correction,
        vllm_importance_sampling_clip_min=config.sampler_clip_min,
        vllm_importance_sampling_clip_max=config.sampler_clip_max,
        max_completion_length=config.max_completion_length,
        args=SimpleNamespace(
            use_bias_correction_kl=config.kl == "k3_is",
            delta=config.delta,
            sapo_temperature_pos=config.sapo_tau[0],
            sapo_temperature_neg=config.sapo_tau[1],
            vespo_k_pos=config.vespo_k[0],
            vespo_k_neg=config.vespo_k[1],
            vespo_lambda_pos=config.vespo_lambda[0],
            vespo_lambda_neg=config.vespo_lambda[1],
        ),
    )
    trainer.get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask.__get__(trainer)
    return trainer


def sampler_lines():
    """The block of _generate_and_score_completions that makes the ratio, compiled."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and "per_token_logps_diff = " in ast.unparse(node)
    ]
    assert len(blocks) == 1, "TRL has moved it"
    return compile(ast.Module([blocks[0]], []), "trl", "exec")


SAMPLER_LINES = sampler_lines()


def trl_sampler_ratio(config, batch):
    names = {
        "self": stand_in(config, None, None),
        "torch": torch,
        "math": math,
        "tool_mask": None,
        "completion_mask": batch["completion_mask"],
        "old_per_token_logps": batch["old_logprobs"],
        "sampling_per_token_logps": batch["sampler_logprobs"],
    }
    exec(SAMPLER_LINES, names)
    return names["vllm_importance_sampling_ratio"]


def trl_loss(config, logprobs, entropies, batch):
    ids = torch.zeros(batch["completion_mask"].shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": batch["completion_mask"],
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprobs"],
        "ref_per_token_logps": batch["ref_logprobs"],
        "num_items_in_batch": batch["completion_tokens"],
    }
    if "sampler_logprobs" in batch:
        inputs["sampling_per_token_logps"] = batch["sampler_logprobs"]
    if config.sampler_correction is not None:
        inputs["importance_sampling_ratio"] = trl_sampler_ratio(config, batch)
    return GRPOTrainer._compute_loss(stand_in(config, logprobs, entropies), None, inputs)


def draw(seed, rows=4, tokens=6):
    """Values of float32 held in float64, as the entropy threshold is of float32; some of the sampler's are unknown."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).double()

    old = -3 * torch.rand(rows, tokens, generator=g).double() - 0.2
    mask = (torch.rand(rows, tokens, generator=g) < 0.7).double()
    mask[:, 0] = 1
    batch = {
        "completion_mask": mask,
        "advantages": normal(rows),
        "old_logprobs": old,
        "ref_logprobs": old + 0.3 * normal(rows, tokens),
        "sampler_logprobs": (old + 0.2 * normal(rows, tokens)).masked_fill(
            torch.rand(rows, tokens, generator=g) < 0.1, math.nan
        ),
        "completion_tokens": torch.tensor(29.0).double(),
    }
    new = old + 0.4 * normal(rows, tokens)
    return new.requires_grad_(), torch.rand(rows, tokens, generator=g).double().requires_grad_(), batch


def configs(loss_type):
    """Every combination of the options that is not refused; `kl` None is beta 0."""
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        if options["kl"] is None:
            del options["kl"]
        elif options["kl"] == "k3_is" and options["importance_level"] == "sequence":
            continue  # see test_k3_is_takes_the_ratio_of_the_token
        else:
            options["beta"] = 0.3
        if options["sampler_correction"] is None and options["sampler_clip_min"] is not None:
            continue
        options |= {"clip_high": 1.1 if loss_type == "cispo" else 0.28, "sampler_clip_max": 1.2}
        try:
            yield GRPOConfig(loss_type=loss_type, max_completion_length=11, **options)
        except MemplanError:
            continue


COUNTS = {"luspo": 288, "cispo": 360, "sapo": 360, "vespo": 120}


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_every_combination_is_trl(loss_type):
    count = 0
    for seed, config in enumerate(configs(loss_type)):
        new, entropies, batch = draw(seed)
        if config.sampler_correction is None and seed % 2:  # the off-policy mask takes the old log-probs then
            del batch["sampler_logprobs"]
        found = []
        for loss in (batch_loss(new, batch, config, entropies), trl_loss(config, new, entropies, batch)):
            grads = torch.autograd.grad(loss, (new, entropies), allow_unused=True)
            found.append([loss.detach(), *(torch.zeros_like(new) if g is None else g for g in grads)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=lambda m, c=config: f"{c}\n{m}")
        assert found[0][1].any() or config.off_policy_threshold is not None or config.sampler_correction is not None
        count += 1
    assert count == COUNTS.get(loss_type, 720)


@pytest.mark.parametrize("mode", get_args(SamplerCorrection))
@pytest.mark.parametrize("bounds", [(None, 1.2), (0.8, None), (0.8, 1.2)], ids=str)
def test_the_sampler_ratio_is_trl(mode, bounds):
    for seed in range(20):
        _, _, batch = draw(seed)
        config = GRPOConfig(sampler_correction=mode, sampler_clip_min=bounds[0], sampler_clip_max=bounds[1])
        ours = sampler_ratio(batch["old_logprobs"], batch["sampler_logprobs"], batch["completion_mask"], mode, *bounds)
        torch.testing.assert_close(ours, trl_sampler_ratio(config, batch))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_trl(temperature):
    logits = 4 * torch.randn(2, 3, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(6).view(2, 3)
    found = []
    for z in (logits.clone().requires_grad_() for _ in range(2)):
        if found:
            values = utils.selective_log_softmax_and_entropy(z, tokens, temperature=temperature)
        else:
            values = selected_logprobs(z, tokens, temperature), token_entropies(z, temperature)
        (values[0].sum() + 0.3 * values[1].sum()).backward()
        found.append([*(v.detach() for v in values), z.grad])
    torch.testing.assert_close(*found)


def test_k3_is_takes_the_ratio_of_the_token():
    """TRL weighs k3 by the sequence's ratio where the loss has one; its gradient is then no longer w (l - r)."""
    new, entropies, batch = draw(0)
    by_token = GRPOConfig(beta=0.3, kl="k3_is")
    by_sequence = dataclasses.replace(by_token, importance_level="sequence")
    batch["advantages"] = torch.zeros(4).double()  # the KL term alone
    torch.testing.assert_close(batch_loss(new, batch, by_sequence), batch_loss(new, batch, by_token))
    assert not torch.allclose(trl_loss(by_sequence, new, entropies, batch), batch_loss(new, batch, by_token))
