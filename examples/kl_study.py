"""The KL study: what a policy does under each KL term people write, and what each term descends.

    pip install -e . && python examples/kl_study.py

A softmax policy over all 216 sequences of three tokens out of six, in float64, with one logit for each position, token
before and token. So an expectation is a sum over sequences, and the same code runs on samples and on all of them. The
reward is the share of neighbours that ascend; training starts at the reference. Experiments 1 to 4 are an article's.

What must hold: gradients put together by hand, one sequence at a time (`enumerated_gradient`), are those that autograd
finds for the expected loss. benchmarks/kl_study.py runs it over five seeds, checks it and draws; docs/kl-study.md says
what came out.

Letters as in memplan/grpo/losses.py: l is a log-prob under the policy, o under the one that sampled, r under the
reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from memplan.grpo import clipped_loss, kl_estimate, kl_in_reward, policy_ratio

TOKENS, LENGTH = 6, 3
SEQUENCES = torch.cartesian_prod(*[torch.arange(TOKENS)] * LENGTH)  # [216, 3]: S sequences of N tokens
BEFORE = torch.cat([torch.zeros(len(SEQUENCES), 1, dtype=torch.long), SEQUENCES[:, :-1]], 1)
REWARDS = (SEQUENCES.diff(dim=1) > 0).double().mean(1)  # the share of neighbours that ascend
BETA, RATE, STEPS, GROUP, CLIP = 0.3, 3.0, 300, 64, (0.2, 0.2)


@dataclass(frozen=True)
class Experiment:
    """A way to keep a policy near its reference; `kl` and its derivative in l are functions of l, r and o, [S, N]."""

    what: str
    kl: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    detached: bool = True  # the second l of the ratio exp(l - l), while the policy is the one that sampled
    in_reward: bool = False


K3 = Experiment(
    "reverse KL as GRPO has it, k3", partial(kl_estimate, kind="k3"), lambda new, ref, old: 1 - (ref - new).exp()
)
EXPERIMENTS = {
    "1 k3": K3,
    "2 no detach": replace(K3, what="the same, the ratio's detach removed", detached=False),
    "3 p (l - r)": Experiment(
        "the summand of the full reverse KL",
        lambda new, ref, old: new.exp() * (new - ref),
        lambda new, ref, old: new.exp() * (new - ref + 1),
    ),
    "4 fkl": Experiment(
        "forward KL",
        partial(kl_estimate, kind="fkl"),
        lambda new, ref, old: -(ref - old).exp(),
    ),
    "k2": Experiment(
        "half the squared log ratio",
        partial(kl_estimate, kind="k2"),
        lambda new, ref, old: new - ref,
    ),
    "k3_is": Experiment(
        "k3 times the ratio",
        partial(kl_estimate, kind="k3_is"),
        lambda new, ref, old: (new - old).exp() * (new - ref),
    ),
    "k1 in reward": Experiment(
        "k1, taken off the reward",
        lambda new, ref, old: torch.zeros_like(new),
        lambda new, ref, old: torch.zeros_like(new),
        in_reward=True,
    ),
}


def token_logprobs(logits: Tensor) -> Tensor:
    """[S, N] of every sequence, from logits [N, TOKENS before, TOKENS]."""
    return logits.log_softmax(-1)[torch.arange(LENGTH), BEFORE, SEQUENCES]


def chances(logprobs: Tensor) -> Tensor:
    """[S], each sequence's probability, as a constant."""
    return logprobs.detach().sum(1).exp()


def advantages(e: Experiment, old: Tensor, ref: Tensor, rewards: Tensor, weights: Tensor, beta: float) -> Tensor:
    """[S]: rewards less their mean, not over their deviation, so that the objective stays E[R] - beta KL."""
    if e.in_reward:
        rewards = kl_in_reward(rewards, old, ref, torch.ones_like(old), beta)
    return rewards - weights @ rewards


def token_losses(
    e: Experiment,
    new: Tensor,
    ref: Tensor,
    old: Tensor,
    advantage: Tensor,
    beta: float,
    clip: tuple[float, float] = CLIP,
) -> Tensor:
    """Policy loss plus beta times the KL term, [S, N]."""
    ratio = policy_ratio(new, old if e.detached else new)
    return clipped_loss(ratio, advantage, *clip) + beta * e.kl(new, ref, old)


def slopes(e: Experiment, new: Tensor, ref: Tensor, old: Tensor, advantage: Tensor, beta: float) -> Tensor:
    """d loss / d l of `token_losses`, by hand and where nothing is clipped, [S, N]."""
    policy = -(new - old).exp() * advantage[:, None] if e.detached else torch.zeros_like(new)
    return policy + beta * e.slope(new, ref, old)


def enumerated_gradient(logits: Tensor, slope: Tensor) -> Tensor:
    """The gradient of each sequence's loss, by hand: [S, N, TOKENS, TOKENS] from d loss / d l, [S, N].

    Its l is z_token - logsumexp z, of the row of logits that the token before picks: the slope times one-hot less p.
    """
    p = logits.detach().softmax(-1)
    found = torch.zeros(len(SEQUENCES), *logits.shape, dtype=logits.dtype)
    every = torch.arange(len(SEQUENCES))
    for t in range(LENGTH):
        before = BEFORE[:, t]
        row = one_hot(SEQUENCES[:, t], TOKENS) - p[t, before]
        found[every, t, before] = slope[:, t, None] * row
    return found


def sequence_kl(logprobs: Tensor, of: Tensor) -> Tensor:
    """KL of one policy over sequences to another, in nats, from log-probs [S, N] of both."""
    first, second = logprobs.sum(1), of.sum(1)
    return (first.exp() * (first - second)).sum()


def prefix_kl(logits: Tensor, ref_logits: Tensor, old: Tensor, forward: bool = False) -> Tensor:
    """The sum over positions of the KL of the next token, where prefixes come from the old policy and stay as they are.

    What a loss of tokens can descend: the gradient of `sequence_kl` has one more part, which changes the prefixes.
    """
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    first, second = (q, p) if forward else (p, q)
    rows = (first.exp() * (first - second)).sum(-1)  # [N, TOKENS before]
    return chances(old) @ rows[torch.arange(LENGTH), BEFORE].sum(1)


def train(
    e: Experiment, seed: int, expected: bool = False, updates: int = 1, rewards: Tensor = REWARDS
) -> tuple[Tensor, list[dict[str, float]]]:
    """Plain gradient descent, `updates` steps for each group of samples; `expected`: all sequences, by probability.

    rewards [S]. Returns how far the logits have moved, [N, TOKENS before, TOKENS], and, before each step and at the
    end, by enumeration, KL(policy || reference) in nats and the expected reward.
    """
    g = torch.Generator().manual_seed(seed)
    start = torch.randn(LENGTH, TOKENS, TOKENS, dtype=torch.float64, generator=g)
    ref, logits, curve = token_logprobs(start), start.clone().requires_grad_(), []
    for step in range(STEPS + 1):
        now = token_logprobs(logits)
        curve.append({"kl": sequence_kl(now.detach(), ref).item(), "reward": (chances(now) @ rewards).item()})
        if step == STEPS:
            break
        if step % updates == 0:
            p, sampler = chances(now), now.detach()
            drawn = torch.arange(len(p)) if expected else torch.multinomial(p, GROUP, replacement=True, generator=g)
            weights = p if expected else torch.full_like(p[drawn], 1 / GROUP)
            old, of = sampler[drawn], ref[drawn]
            advantage = advantages(e, old, of, rewards[drawn], weights, BETA)
        loss = weights @ token_losses(e, now[drawn], of, old, advantage, BETA).sum(1)
        with torch.no_grad():
            logits -= RATE * torch.autograd.grad(loss, logits)[0]
    return logits.detach() - start, curve


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)  # tensors of a few hundred numbers
    print(f"reward and KL(policy || reference) in nats after {STEPS} steps, of samples and of expected gradients")
    for name, e in EXPERIMENTS.items():
        ends = [train(e, seed=0, expected=expected)[1][-1] for expected in (False, True)]
        words = "".join(f"  {end['reward']:6.3f} {end['kl']:6.3f}" for end in ends)
        print(f"{name:13}{words}  {e.what}")


if __name__ == "__main__":
    main()
