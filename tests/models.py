"""The models that tests and benchmarks run: small, random, unmodified, each with a batch and a scalar loss.

    for case in CASES:
        sample = case.make(dropout=0.1, dtype=torch.bfloat16)
        sample.step(sample.batch).backward()

What must hold: `make` is deterministic and leaves the global random state as it was, every step compiles with
fullgraph=True, and every parameter receives a gradient. Language models have a GRPO step, the U-Net a squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)


class Rollout(NamedTuple):
    """Completions to learn from: N of them, T tokens each."""

    ids_NT: torch.Tensor
    advantages_N: torch.Tensor
    old_log_probs_NS: torch.Tensor  # S = T - 1: the first token is not predicted


class Images(NamedTuple):
    noisy_NCHW: torch.Tensor
    clean_NCHW: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A model, a batch for it, and the loss that trains it."""

    module: nn.Module
    step: Callable[[Any], torch.Tensor]
    batch: Any


class Make(Protocol):
    def __call__(self, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Sample: ...


@dataclass(frozen=True)
class Case:
    name: str
    make: Make

    def __str__(self) -> str:
        return self.name


# ---- language models ------------------------------------------------------------------------------------------------


def grpo_loss(logits_NTV: torch.Tensor, batch: Rollout, clip: float = 0.2) -> torch.Tensor:
    """The clipped policy objective of GRPO (Shao et al. 2024), without a KL term, averaged over tokens."""
    log_probs_NTV = logits_NTV[:, :-1].float().log_softmax(-1)
    log_probs_NS = log_probs_NTV.gather(-1, batch.ids_NT[:, 1:, None]).squeeze(-1)
    ratio_NS = (log_probs_NS - batch.old_log_probs_NS).exp()
    gain_N1 = batch.advantages_N[:, None]
    return -torch.minimum(ratio_NS * gain_N1, ratio_NS.clamp(1 - clip, 1 + clip) * gain_N1).mean()


def language_model(config: PretrainedConfig, dtype: torch.dtype, completions: int, tokens: int) -> Sample:
    """A causal language model of transformers, in training mode, with the GRPO step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        ids_NT = torch.randint(config.vocab_size, (completions, tokens))
        noise_NS = torch.randn(completions, tokens - 1)
    uniform = -torch.tensor(float(config.vocab_size)).log()  # what a random model believes, roughly
    batch = Rollout(ids_NT, torch.linspace(-1, 1, completions), uniform + 0.1 * noise_NS)

    def step(batch: Rollout) -> torch.Tensor:
        return grpo_loss(module(input_ids=batch.ids_NT, use_cache=False).logits, batch)

    return Sample(module, step, batch)


def _causal(config: type[PretrainedConfig], dropouts: tuple[str, ...] = ("attention_dropout",), **options: Any) -> Make:
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)

    def make(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Sample:
        rates = dict.fromkeys(dropouts, dropout)
        return language_model(config(**sizes | rates | options), dtype, completions=2, tokens=16)

    return make


def six_layer(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Sample:
    """The benchmark model: Llama-like, 34.4 MiB of parameters in float32, 4 completions of 512 tokens."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_dropout=dropout,
    )
    return language_model(config, dtype, completions=4, tokens=512)


# ---- the U-Net ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm = nn.GroupNorm(4, outer)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return self.dropout(F.silu(self.norm(self.conv(x_NCHW))))


class UNet(nn.Module):
    """Down twice, up twice; each level hands its features across, so they stay alive from one end to the other."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.enter = Block(3, width, dropout)
        self.down = Block(width, 2 * width, dropout)
        self.middle = Block(2 * width, 2 * width, dropout)
        self.up = Block(4 * width, width, dropout)
        self.leave = Block(2 * width, width, dropout)
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        full = self.enter(x_NCHW)
        half = self.down(F.max_pool2d(full, 2))
        low = self.middle(F.max_pool2d(half, 2))
        up = self.up(torch.cat([F.interpolate(low, scale_factor=2.0), half], 1))
        out: torch.Tensor = self.out(self.leave(torch.cat([F.interpolate(up, scale_factor=2.0), full], 1)))
        return out


def unet(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32, images: int = 2, size: int = 16) -> Sample:
    """A small U-Net that removes noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = UNet(8, dropout).to(dtype).train()
        shape = (images, 3, size, size)
        batch = Images(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))

    def step(batch: Images) -> torch.Tensor:
        return F.mse_loss(module(batch.noisy_NCHW).float(), batch.clean_NCHW.float())

    return Sample(module, step, batch)


# Mixtures of experts keep transformers' default experts_implementation, "grouped_mm": one graph, and equal to eager.
# "batched_mm" compiles too but copies weights per token; "eager" loops over the experts that were hit: never one graph.
CASES = (
    Case("llama", _causal(LlamaConfig, num_key_value_heads=2)),
    Case("qwen3", _causal(Qwen3Config, num_key_value_heads=2, head_dim=8)),
    Case("gemma2", _causal(Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=8)),
    Case(
        "qwen3_moe",
        _causal(
            Qwen3MoeConfig,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    Case("mixtral", _causal(MixtralConfig, num_key_value_heads=2, num_local_experts=4)),
    Case("gpt_neox", _causal(GPTNeoXConfig, dropouts=("attention_dropout", "hidden_dropout"))),
    Case("unet", unet),
)
# Half the time to trace and compile, where nothing depends on a second layer.
ONE_LAYER = _causal(LlamaConfig, num_key_value_heads=2, num_hidden_layers=1)
