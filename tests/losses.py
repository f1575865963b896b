"""Losses on a small head, as people write them: for tests of tiling, and for the table beside other compilers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Head(nn.Module):
    """Hidden states and logits; a second head, and one for values."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=False)
        self.with_bias, self.second = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary, bias=False)
        self.value = nn.Linear(width, 1)

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h_BTD = torch.tanh(self.body(x_BTD))
        return h_BTD, self.head(h_BTD)


@dataclass(frozen=True)
class Rows:
    """What a loss reads. `gain` is each sequence's advantage; `reference` are another model's hidden states."""

    x_BTD: torch.Tensor
    labels_BT: torch.Tensor
    some_BT: torch.Tensor  # labels, a third of them -100
    mask_BT: torch.Tensor
    old_BT: torch.Tensor
    gain_B: torch.Tensor
    reference_BTD: torch.Tensor
    reference_VD: torch.Tensor

    @staticmethod
    def make(sequences: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> Rows:
        """Rows that are the same in every run."""
        shape, count = (sequences, tokens), sequences * tokens
        x = torch.linspace(-2, 2, count * width, dtype=dtype).sin().view(*shape, width)
        labels = (torch.arange(count) * 7 % vocabulary).view(shape)
        some = labels.masked_fill(torch.arange(count).view(shape) % 3 == 0, -100)
        gain = torch.linspace(1.0, -0.7, sequences, dtype=dtype)
        head = torch.linspace(-9, 9, vocabulary * width, dtype=dtype).cos().view(vocabulary, width) / width**0.5
        old = torch.full(shape, -0.95 * torch.tensor(float(vocabulary)).log().item(), dtype=dtype)
        return Rows(x, labels, some, (some >= 0).to(dtype), old, gain, x.cos(), head)

    def selected(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        """Log-probs of the labels."""
        return logits_BTV.log_softmax(-1).gather(-1, self.labels_BT[..., None]).squeeze(-1)

    def ratio(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        """New to old probabilities."""
        return (self.selected(logits_BTV) - self.old_BT).exp()

    def clipped(self, logits_BTV: torch.Tensor, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
        """PPO's, of each token."""
        ratio, gain = self.ratio(logits_BTV), self.gain_B[:, None]
        return -torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)

    def mean(self, loss_BT: torch.Tensor) -> torch.Tensor:
        """Over the tokens that count."""
        return (loss_BT * self.mask_BT).sum() / self.mask_BT.sum()


def entropy(logits_BTV: torch.Tensor) -> torch.Tensor:
    return -(logits_BTV.softmax(-1) * logits_BTV.log_softmax(-1)).sum(-1)


def k3(r: Rows, logits_BTV: torch.Tensor) -> torch.Tensor:
    d = r.old_BT + 0.1 - r.selected(logits_BTV)
    return d.exp() - d - 1


def sequence_ratio(r: Rows, logits_BTV: torch.Tensor) -> torch.Tensor:
    mean = ((r.selected(logits_BTV) - r.old_BT) * r.mask_BT).sum(-1) / r.mask_BT.sum(-1)
    return mean.exp()


def soft_gate(r: Rows, logits_BTV: torch.Tensor) -> torch.Tensor:
    """SAPO's, 2025: a sigmoid in the place of the clip, with another temperature where the advantage is negative."""
    tau = torch.where(r.gain_B > 0, 1.0, 1.05)[:, None]
    return torch.sigmoid(tau * (r.ratio(logits_BTV) - 1)) * 4 / tau * r.gain_B[:, None]


def full_kl(r: Rows, logits_BTV: torch.Tensor) -> torch.Tensor:
    """Over the vocabulary, to a reference head on reference hidden states."""
    p, q = logits_BTV.log_softmax(-1), F.linear(r.reference_BTD, r.reference_VD).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def autocast(m: Head, r: Rows, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = m(r.x_BTD)[1]
    return loss(logits.float())


def flat(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(0, 1)


Loss = Callable[[Head, Rows, torch.Tensor, torch.Tensor], Any]
LOSSES: dict[str, Loss] = {
    "cross entropy": lambda m, r, h, z: F.cross_entropy(flat(z), flat(r.labels_BT)),
    "cross entropy, by hand": lambda m, r, h, z: -r.selected(z).mean(),
    "bias": lambda m, r, h, z: F.cross_entropy(flat(m.with_bias(h)), flat(r.labels_BT)),
    "temperature": lambda m, r, h, z: -r.selected(z / 0.7).mean(),
    "softcap": lambda m, r, h, z: -r.selected(30 * torch.tanh(z / 30)).mean(),
    "label smoothing": lambda m, r, h, z: F.cross_entropy(flat(z), flat(r.labels_BT), label_smoothing=0.1),
    "ignore_index": lambda m, r, h, z: F.cross_entropy(flat(z), flat(r.some_BT)),
    "z-loss": lambda m, r, h, z: -r.selected(z).mean() + 1e-2 * z.logsumexp(-1).square().mean(),
    "shift after the head": lambda m, r, h, z: F.cross_entropy(flat(z[:, :-1]), flat(r.some_BT[:, 1:])),
    "masked mean": lambda m, r, h, z: r.mean(-r.selected(z)),
    "GRPO": lambda m, r, h, z: ((r.clipped(z) * r.mask_BT).sum(-1) / r.mask_BT.sum(-1)).mean(),
    "two-sided clip": lambda m, r, h, z: r.mean(r.clipped(z).clamp(max=3.0)),
    "DAPO": lambda m, r, h, z: r.mean(r.clipped(z, 0.2, 0.28)),
    "k3": lambda m, r, h, z: r.mean(r.clipped(z) + 0.04 * k3(r, z)),
    "k2": lambda m, r, h, z: r.mean(r.clipped(z) + 0.02 * (r.old_BT - r.selected(z)).square()),
    "full KL": lambda m, r, h, z: r.mean(r.clipped(z) + 0.04 * full_kl(r, z)),
    "entropy bonus": lambda m, r, h, z: r.mean(r.clipped(z) - 0.01 * entropy(z)),
    "GSPO": lambda m, r, h, z: (
        -torch.minimum((s := sequence_ratio(r, z)) * r.gain_B, s.clamp(0.9, 1.1) * r.gain_B).mean()
    ),
    "CISPO": lambda m, r, h, z: -r.mean(r.ratio(z).clamp(max=1.2).detach() * r.gain_B[:, None] * r.selected(z)),
    "SAPO": lambda m, r, h, z: -r.mean(soft_gate(r, z)),
    "value head": lambda m, r, h, z: r.mean(r.clipped(z)) + (m.value(h).squeeze(-1) - 0.3).square().mean(),
    "second head": lambda m, r, h, z: -r.selected(z).mean() - 0.3 * r.selected(m.second(h)).mean(),
    "two terms of one head": lambda m, r, h, z: -r.selected(z).mean() - 0.3 * z.log_softmax(-1)[..., 3].mean(),
    "log-probs returned": lambda m, r, h, z: (r.mean(r.clipped(z)), r.selected(z).detach()),
    "log-probs alone": lambda m, r, h, z: r.selected(z),
    "tied embeddings": lambda m, r, h, z: -r.selected(m.head(h + F.embedding(r.labels_BT, m.head.weight))).mean(),
    "frozen head": lambda m, r, h, z: -r.selected(F.linear(h, m.head.weight.detach())).mean(),
    "bfloat16 autocast": lambda m, r, h, z: autocast(m, r, lambda logits: r.mean(r.clipped(logits))),
    "float16, scaled": lambda m, r, h, z: r.mean(r.clipped(F.linear(h.half(), m.head.weight.half()).float())) * 2.0**13,
    "pointwise, of the user": lambda m, r, h, z: (torch.sigmoid(z) * z.cos()).mean(-1).tanh().mean(),
    "mean of all": lambda m, r, h, z: z.softmax(-1).square().mean() + z.mean((0, 1)).square().mean(),
    "normalised by itself": lambda m, r, h, z: r.selected(z).square().sum() / (r.selected(z).detach().abs().sum() + 1),
    "shifted, and not": lambda m, r, h, z: -r.selected(z)[:, :-1].mean() + 1e-2 * z.logsumexp(-1).square().mean(),
    "centred over all rows": lambda m, r, h, z: (z - z.sum() / 7).softmax(-1).square().sum(-1).mean(),
    "logits returned": lambda m, r, h, z: (-r.selected(z).mean(), z.detach()),
}
RETURNS_MORE = ("log-probs returned", "logits returned")
MIXES = ("centred over all rows", "logits returned")  # not to be tiled: rows mix, or all of them are asked for
