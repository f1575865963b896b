"""The train steps that memplan/steps holds, on the meta device: full sizes, nothing allocated.

In: nothing. Out: STEPS, name -> a function that makes the step and its batch, and how it is traced. Language models
come from transformers' configs, with the sizes of the published checkpoints; the others are written out here, in a
screen each. bfloat16 unless said. Frozen bases have LoRA adapters of rank 16: else gradients would hide activations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

import memplan
from benchmarks.llama8b_lora import SLICE, LoRA, adapted
from benchmarks.llama8b_step import make_batch
from memplan.grpo import GRPOConfig
from memplan.grpo import make_step as grpo_step
from memplan.grpo.step import grpo_loss, token_logprobs

SLICES = (("lm_head", 1024), ("gate_proj", SLICE))  # the head's are less than an MLP's only if they are short

Made = tuple[Callable[[Any], torch.Tensor], Any]  # a step and its batch


@dataclass(frozen=True)
class Recorded:
    """`make`: the step and its batch. `tiles`: the most rows of a slice, by place. `torch`: whether torch's own saved
    sets are recorded.
    """

    make: Callable[[], Made]
    tiles: tuple[tuple[str, int], ...] | None = None
    torch: bool = True


def llama8b_lora_grpo(completions: int, *, streamed: bool = False) -> Made:
    """Reference pass, adapters off and without a gradient, then the policy pass: completions of 20,480 tokens.
    `streamed`: the frozen weights are off the device.
    """
    model = adapted(32)
    if streamed:
        memplan.stream(model)
    config = GRPOConfig(beta=0.04)
    adapters = [m for m in model.modules() if isinstance(m, LoRA)]

    def step(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            _switch(adapters, on=False)
            # Its own ids: heads that look for the same labels would share a mask of the size of all logits.
            reference = token_logprobs(model, batch["input_ids"].clone())
            _switch(adapters, on=True)
        return grpo_loss(model, batch | {"ref_logprobs": reference}, config)

    return step, {name: tensor[:completions] for name, tensor in make_batch().items()}


def _switch(adapters: list[LoRA], *, on: bool) -> None:
    for adapter in adapters:
        adapter.on = on


# ---- language models ------------------------------------------------------------------------------------------------


def _frozen(config: PretrainedConfig, completions: int, tokens: int, projections: tuple[str, ...]) -> Made:
    """GRPO on a frozen base with adapters on the named projections."""
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if name in projections:
                    setattr(owner, name, LoRA(child))
        batch = {
            "input_ids": torch.empty(completions, tokens, dtype=torch.int64),
            "completion_mask": torch.empty(completions, tokens - 1),
            "advantages": torch.empty(completions),
            "old_logprobs": torch.empty(completions, tokens - 1),
        }
    return grpo_step(model, GRPOConfig()), batch


def _llama(layers: int, hidden: int, inner: int, heads: int, tokens: int) -> Made:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, use_cache=False, attn_implementation="causal",
    )  # fmt: skip
    return _frozen(config, 1, tokens, ("q_proj", "v_proj"))


def llama70b() -> Made:
    return _llama(80, 8192, 28672, 64, 8192)


def llama405b() -> Made:
    return _llama(126, 16384, 53248, 128, 8192)


def qwen3_moe() -> Made:
    """Qwen3-30B-A3B: 48 layers, 128 experts of which 8 act; 2 x 4,096 tokens."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, use_cache=False, attn_implementation="causal",
    )  # fmt: skip
    return _frozen(config, 2, 4096, ("q_proj", "k_proj", "v_proj", "o_proj"))


def gemma2() -> Made:
    """Gemma-2-9B: 42 layers, every second one with a window; eager attention with its soft cap; 1 x 4,096 tokens."""
    config = Gemma2Config(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, sliding_window=2048, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return _frozen(config, 1, 4096, ("q_proj", "k_proj", "v_proj", "o_proj"))


def t5() -> Made:
    """T5-large, all of it trained with dropout: 24 layers each way, 16 x 512 tokens in, 16 x 128 out."""
    config = T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config).to(torch.bfloat16).train()
        batch = {
            "input_ids": torch.empty(16, 512, dtype=torch.int64),
            "labels": torch.empty(16, 128, dtype=torch.int64),
        }

    def step(batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        return loss

    return step, batch


# ---- others ---------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions beside a shortcut (Ho, Jain, Abbeel 2020)."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(32, inner), nn.GroupNorm(32, outer)])
        self.convs = nn.ModuleList([nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)])
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        h_NCHW = x_NCHW
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h_NCHW = conv(F.silu(norm(h_NCHW)))
        shortcut: torch.Tensor = self.shortcut(x_NCHW)
        return shortcut + h_NCHW


class UNet(nn.Module):
    """Four levels of two blocks, down and up; each level hands its features across."""

    def __init__(self, width: int = 128, levels: tuple[int, ...] = (1, 2, 4, 4)) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [], width
        for k in levels:
            for _ in range(2):
                self.down.append(Residual(c, c := k * width))
                skips.append(c)
        self.middle = nn.ModuleList([Residual(c, c) for _ in range(2)])
        for k in reversed(levels):
            for _ in range(2):
                self.up.append(Residual(c + skips.pop(), k * width))
                c = k * width
        self.leave = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        h, skips = self.enter(x_NCHW), []
        for i, block in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i and i % 2 == 0 else h
            skips.append(h := block(h))
        for block in self.middle:
            h = block(h)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i and i % 2 == 0 else h
            h = block(torch.cat([h, skips.pop()], 1))
        out: torch.Tensor = self.leave(h)
        return out


class DenseNet(nn.Module):
    """DenseNet-121 (Huang et al. 2017): each layer reads all before it in its block. Group norm for batch norm."""

    def __init__(self, blocks: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32) -> None:
        super().__init__()
        c = 2 * growth
        self.enter = nn.Conv2d(3, c, 7, stride=2, padding=3)
        self.layers, self.transitions, self.blocks = nn.ModuleList(), nn.ModuleList(), blocks
        for count in blocks:
            for _ in range(count):
                self.layers.append(nn.Sequential(*_half(c, 4 * growth, 1), *_half(4 * growth, growth, 3)))
                c += growth
            self.transitions.append(nn.Sequential(*_half(c, c // 2, 1)))
            c //= 2
        self.head = nn.Linear(c, 1000)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        h, layers = F.max_pool2d(self.enter(x_NCHW), 2), iter(self.layers)
        for count, transition in zip(self.blocks, self.transitions, strict=True):
            for _ in range(count):
                h = torch.cat([h, next(layers)(h)], 1)
            h = F.avg_pool2d(transition(h), 2)
        out: torch.Tensor = self.head(h.mean((2, 3)))
        return out


def _half(inner: int, outer: int, size: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(32, inner), nn.ReLU(), nn.Conv2d(inner, outer, size, padding=size // 2)


def unet() -> Made:
    """16 images of 256 x 256."""
    return _images(UNet(), 16, 256, lambda out, batch: F.mse_loss(out.float(), batch["target"]), (16, 3, 256, 256))


def densenet() -> Made:
    """64 images of 224 x 224."""
    return _images(DenseNet(), 64, 224, lambda out, batch: (out.float() * batch["target"]).sum(), (64, 1000))


def _images(
    model: nn.Module, images: int, size: int, loss: Callable[[torch.Tensor, Any], torch.Tensor], target: tuple[int, ...]
) -> Made:
    model = model.to("meta", torch.bfloat16)
    with torch.device("meta"):
        batch = {"x": torch.empty(images, 3, size, size, dtype=torch.bfloat16), "target": torch.empty(target)}

    def step(batch: Any) -> torch.Tensor:
        return loss(model(batch["x"]), batch)

    return step, batch


class Scan(nn.Module):
    """Two LSTM layers, a token at a time: long, thin, and every state needed again (Gruslys et al. 2016)."""

    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cells = nn.ModuleList([nn.LSTMCell(width, width) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids_NT: torch.Tensor) -> torch.Tensor:
        x_TNW = self.embed(ids_NT).unbind(1)
        states = [(torch.zeros_like(x_TNW[0]),) * 2 for _ in self.cells]
        outs = []
        for h in x_TNW:
            for k, cell in enumerate(self.cells):
                h, c = _cell(cell, h, *states[k])
                states[k] = h, c
            outs.append(h)
        out: torch.Tensor = self.head(torch.stack(outs, 1))
        return out


def _cell(cell: nn.LSTMCell, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own cell is one kernel on CUDA and not in a CPU trace: written out."""
    gates = F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm() -> Made:
    """256 sequences of 128 tokens, width 2,048."""
    with torch.device("meta"):
        model = Scan(2048, 2, 8192).to(torch.bfloat16)
        batch = {"ids": torch.empty(256, 128, dtype=torch.int64), "labels": torch.empty(256, 128, dtype=torch.int64)}

    def step(batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch["ids"]).flatten(0, 1).float(), batch["labels"].flatten())

    return step, batch


class Mixed(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTW: torch.Tensor) -> torch.Tensor:
        n, t, w = x_NTW.shape
        q, k, v = self.qkv(self.norms[0](x_NTW)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, w)
        x_NTW = x_NTW + self.out(mixed)
        out: torch.Tensor = x_NTW + self.down(F.gelu(self.up(self.norms[1](x_NTW))))
        return out


def shared_blocks() -> Made:
    """12 layers, each checkpointed, traversed twice over two batches that share all weights: a pair of losses, as in
    DPO, whose difference is the loss. 2 x 4 x 2,048 tokens, width 2,048.
    """
    with torch.device("meta"):
        layers = nn.ModuleList([Mixed(2048, 16) for _ in range(12)]).to(torch.bfloat16)
        embed = nn.Embedding(32000, 2048).to(torch.bfloat16)
        batch = {name: torch.empty(4, 2048, dtype=torch.int64) for name in ("chosen", "rejected")}
    model = nn.ModuleDict({"embed": embed, "layers": layers})

    def logprob(ids: torch.Tensor) -> torch.Tensor:
        h = model["embed"](ids)
        for layer in model["layers"]:
            h = checkpoint(layer, h, use_reentrant=False)
        logits = F.linear(h, model["embed"].weight)[:, :-1].flatten(0, 1).float()
        return -F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")

    def step(batch: Any) -> torch.Tensor:
        return -F.logsigmoid(0.1 * (logprob(batch["chosen"]) - logprob(batch["rejected"])))

    return step, batch


STEPS = {
    "llama8b_lora_grpo_8x20k": Recorded(lambda: llama8b_lora_grpo(8), tiles=SLICES, torch=False),
    "llama8b_lora_grpo_1x20k": Recorded(lambda: llama8b_lora_grpo(1), tiles=SLICES, torch=False),
    "llama8b_lora_grpo_1x20k_streamed": Recorded(
        lambda: llama8b_lora_grpo(1, streamed=True), tiles=SLICES, torch=False
    ),
    "llama70b_lora_8k": Recorded(llama70b, torch=False),
    "llama405b_lora_8k": Recorded(llama405b, torch=False),
    "qwen3_moe_30b_4k": Recorded(qwen3_moe),
    "gemma2_9b_4k": Recorded(gemma2),
    "t5_large": Recorded(t5),
    "unet_256": Recorded(unet),
    "densenet121_224": Recorded(densenet),
    "lstm_128": Recorded(lstm),
    "shared_blocks_2x2k": Recorded(shared_blocks),
}
