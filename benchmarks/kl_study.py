"""The KL study over five seeds: gradients by enumeration, training runs, one picture; parts: examples/kl_study.py.

    python benchmarks/kl_study.py [-o FILE] [--plot FILE]

Gradients are of policies at a logit distance of 1 from the reference; "off", an older policy at 0.5 sampled. Each KL
term's expected gradient is compared with those of four divergences, the norm of the difference over the norm of the
divergence's: KL(policy || reference) and KL(reference || policy), of whole sequences, and as the sum over tokens where
the prefixes stay those of the policy that sampled. `noise` is the standard deviation of one sequence's gradient over
the norm of the gradient of the reverse KL of tokens; `value` is the expected value of the term over that of
KL(policy || reference). Runs are of samples and of expected gradients, with 1 and with 10 steps for each group.

Exit code 1 when a statement of docs/kl-study.md does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save, writable
from examples import kl_study as study
from memplan.grpo import kl_in_reward

SEEDS, UPDATES, DISTANCES, EXACT = range(5), (1, 10), (0.1, 0.3, 1.0), 1e-12
EVERY = 10  # steps between the points of a curve
HOW = ("sampled", "expected")
WHO = ("on", "off")  # the policy itself sampled, or an older one
NO_DETACH = "2 no detach"  # its KL term is k3's: its own is the policy term
HOLDS = [  # experiment, who sampled, the divergence whose gradient it has
    ("1 k3", "on", "forward, tokens"), ("4 fkl", "on", "forward, tokens"), ("4 fkl", "off", "forward, tokens"),
    ("k2", "on", "reverse, tokens"), ("k3_is", "on", "reverse, tokens"), ("k3_is", "off", "reverse, tokens"),
    ("k1 in reward", "on", "reverse, sequences"),
]  # fmt: skip
Figures = dict[str, float]


def main() -> int:
    """Run, print, write, draw; 1 if a statement does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=writable, default="benchmarks/results/kl_study.json")
    parser.add_argument("--plot", type=writable, default="docs/kl-study.png")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors of a few hundred numbers
    figures: dict[str, Any] = {
        "sequences": len(study.SEQUENCES), "seeds": len(SEEDS), "steps": study.STEPS, "group": study.GROUP,
        "rate": study.RATE, "beta": study.BETA, "distances": DISTANCES,
        "agreement": max(agreement(name, seed, who) for name in study.EXPERIMENTS for seed in SEEDS for who in WHO),
        "gradients": {str(d): {who: gradients(d, who) for who in WHO} for d in DISTANCES},
        "no_detach": no_detach(),
        "left": left(),
        "every": EVERY,
        "runs": {str(updates): runs(updates) for updates in UPDATES},
    }  # fmt: skip
    broken = check(figures)
    show(figures)
    save(args.out, figures | {"broken": broken})
    draw(figures, args.plot)
    print("\n".join(broken) or "every statement holds")
    return bool(broken)


def policies(seed: int, distance: float, who: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and log-probs of a random policy, then logits of its reference, and log-probs of who sampled."""
    g = torch.Generator().manual_seed(seed)
    shape = study.LENGTH, study.TOKENS, study.TOKENS
    ref, to_policy, to_old = torch.randn(3, *shape, dtype=torch.float64, generator=g)
    logits = (ref + distance * to_policy).requires_grad_()
    new = study.token_logprobs(logits)
    old = new.detach() if who == "on" else study.token_logprobs((logits + 0.5 * to_old).detach())
    return logits, new, ref, old


def agreement(name: str, seed: int, who: str) -> float:
    """Gradient by hand against autograd of the expected loss, reward and KL term together."""
    e = study.EXPERIMENTS[name]
    logits, new, ref_logits, old = policies(seed, 1.0, who)
    ref, weights = study.token_logprobs(ref_logits), study.chances(old)
    advantage = study.advantages(e, old, ref, study.REWARDS, weights, study.BETA)
    found = study.enumerated_gradient(logits, study.slopes(e, new.detach(), ref, old, advantage, study.BETA))
    losses = study.token_losses(e, new, ref, old, advantage, study.BETA, clip=(1.0, torch.inf))
    exact = torch.autograd.grad(weights @ losses.sum(1), logits)[0]
    return (torch.einsum("s,s...", weights, found) - exact).abs().max().item() / exact.abs().max().item()


def gradients(distance: float, who: str) -> dict[str, dict[str, list[float]]]:
    """Of each experiment but the one whose KL term is k3's too: figures of each seed."""
    found = [compared(seed, distance, who) for seed in SEEDS]
    return {e: {k: [f[e][k] for f in found] for k in found[0][e]} for e in found[0]}


def compared(seed: int, distance: float, who: str) -> dict[str, Figures]:
    """Each KL term alone, beside no reward, against the divergences."""
    logits, new, ref_logits, old = policies(seed, distance, who)
    ref, weights = study.token_logprobs(ref_logits), study.chances(old)
    values = {
        "reverse, tokens": study.prefix_kl(logits, ref_logits, old),
        "forward, tokens": study.prefix_kl(logits, ref_logits, old, forward=True),
        "reverse, sequences": study.sequence_kl(new, ref),
        "forward, sequences": study.sequence_kl(ref, new),
    }
    exact = {name: torch.autograd.grad(value, logits, retain_graph=True)[0] for name, value in values.items()}
    figures = {}
    for name, e in study.EXPERIMENTS.items():
        if name == NO_DETACH:
            continue
        nothing = torch.zeros_like(weights)
        advantage = study.advantages(e, old, ref, nothing, weights, beta=1.0)
        each = study.enumerated_gradient(logits, study.slopes(e, new.detach(), ref, old, advantage, beta=1.0))
        mean = torch.einsum("s,s...", weights, each)
        spread = (weights @ (each - mean).square().flatten(1).sum(1)).sqrt()
        k1 = -kl_in_reward(nothing, old, ref, torch.ones_like(old), beta=1.0)
        cost = k1 if e.in_reward else e.kl(new, ref, old).sum(1)
        figures[name] = {way: ((mean - of).norm() / of.norm()).item() for way, of in exact.items()} | {
            "noise": (spread / exact["reverse, tokens"].norm()).item(),
            "value": (weights @ cost / values["reverse, sequences"]).item(),
        }
    return figures


def no_detach() -> Figures:
    """The policy term's largest derivative in a log-prob, with the detach and without; how far training moves a logit
    without it."""
    found = {}
    for words, name in (("with", "1 k3"), ("without", NO_DETACH)):
        e, largest = study.EXPERIMENTS[name], 0.0
        for seed in SEEDS:
            _, new, ref_logits, old = policies(seed, 1.0, "on")
            ref, weights = study.token_logprobs(ref_logits), study.chances(old)
            advantage = study.advantages(e, old, ref, study.REWARDS, weights, 0.0)
            losses = study.token_losses(e, new, ref, old, advantage, beta=0.0)
            rows = torch.autograd.grad(losses.sum(), new)[0]  # a token's loss has no other token's log-prob in it
            largest = max(largest, rows.abs().max().item())
        found[words] = largest
    moved = (study.train(study.EXPERIMENTS[NO_DETACH], seed)[0].abs().max().item() for seed in SEEDS)
    return found | {"moved": max(moved)}


def left() -> dict[str, list[float]]:
    """KL(policy || reference) after training on no reward, from the reference on, where a KL has nothing to do."""
    nothing = torch.zeros_like(study.REWARDS)
    return {
        name: [study.train(e, seed, expected=True, rewards=nothing)[1][-1]["kl"] for seed in SEEDS]
        for name, e in study.EXPERIMENTS.items()
    }


def runs(updates: int) -> dict[str, dict[str, dict[str, list[list[float]]]]]:
    """KL and reward over the steps, of every seed, sampled and expected; with more than 1 step a group, ends alone."""
    every = EVERY if updates == 1 else study.STEPS
    found: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for name, e in study.EXPERIMENTS.items():
        found[name] = {}
        for how in HOW:
            curves = [study.train(e, seed, how == "expected", updates)[1] for seed in SEEDS]
            found[name][how] = {k: [[round(at[k], 5) for at in c[::every]] for c in curves] for k in ("kl", "reward")}
    return found


def curves(figures: dict[str, Any], updates: int, name: str, how: str) -> dict[str, list[list[float]]]:
    """Reward, KL and reward less beta KL, over the steps, of every seed."""
    run = figures["runs"][str(updates)][name][how]
    pairs = zip(run["reward"], run["kl"], strict=True)
    objective = [[r - figures["beta"] * k for r, k in zip(*pair, strict=True)] for pair in pairs]
    return {"reward": run["reward"], "kl": run["kl"], "objective": objective}


def ends(figures: dict[str, Any], updates: int, name: str, how: str) -> dict[str, list[float]]:
    return {key: [c[-1] for c in seeds] for key, seeds in curves(figures, updates, name, how).items()}


def check(figures: dict[str, Any]) -> list[str]:
    """The statements that do not hold."""
    at = figures["gradients"]["1.0"]
    broken = [] if figures["agreement"] < EXACT else ["enumeration is not autograd"]
    for name in at["on"]:
        for who in WHO:
            for way in ("reverse, tokens", "forward, tokens", "reverse, sequences", "forward, sequences"):
                off = at[who][name][way]
                holds = (name, who, way) in HOLDS
                if not (max(off) < EXACT if holds else min(off) > 0.01):
                    broken.append(f"{name} {who}-policy is {'not ' * holds}{way}")
    detach = figures["no_detach"]
    broken += [] if detach["without"] == detach["moved"] == 0 < detach["with"] else ["the policy term"]
    for name, away in figures["left"].items():
        stays = name != "3 p (l - r)"
        broken += [] if (max(away) < EXACT if stays else min(away) > 0.01) else [f"{name} and no reward"]
    for of in figures["gradients"].values():
        pairs = zip(of["on"]["4 fkl"]["noise"], of["on"]["1 k3"]["noise"], strict=True)
        broken += [] if all(forward > k3 for forward, k3 in pairs) else ["fkl is not noisier than k3"]
    objective = {n: ends(figures, 1, n, "expected")["objective"] for n in study.EXPERIMENTS}
    for name in objective:
        best = zip(objective["k1 in reward"], objective[name], strict=True)
        broken += [] if all(a >= b for a, b in best) else [f"{name} ends above k1 in the reward"]
    return broken


def show(figures: dict[str, Any]) -> None:
    print(f"agreement of enumeration and autograd: {figures['agreement']:.1e}; {figures['no_detach']}")
    print("KL after no reward: " + ", ".join(f"{name} {max(away):.1e}" for name, away in figures["left"].items()))
    for who, of in figures["gradients"]["1.0"].items():
        print(f"{who + '-policy':13}  {'  '.join(next(iter(of.values())))}")
        for name, row in of.items():
            print(f"{name:13}" + "".join(f"  {statistics.median(v):12.3g}" for v in row.values()))
    for updates in UPDATES:
        print(f"{updates} step(s) for each group: reward, KL, objective at the end, sampled, then expected")
        for name in study.EXPERIMENTS:
            both = [v for how in HOW for v in ends(figures, updates, name, how).values()]
            print(f"{name:13}" + "".join(f"  {statistics.median(v):7.3f}" for v in both))


def draw(figures: dict[str, Any], path: str) -> None:
    """Curves of the runs with one step for each group, and bars of the gradients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 9), layout="constrained")
    above, below = figure.subplots(2, 3)
    colours = dict(zip(study.EXPERIMENTS, ("C0", "0.4", "C3", "C1", "C2", "C4", "k"), strict=True))
    best = curves(figures, 1, "k1 in reward", "expected")["objective"]
    for name, colour in colours.items():
        for how in HOW:
            found = curves(figures, 1, name, how)
            found["behind"] = [
                [max(b - o, 3e-4) for b, o in zip(*pair, strict=True)]
                for pair in zip(best, found["objective"], strict=True)
            ]
            for ax, key in zip(above, ("kl", "reward", "behind"), strict=True):
                line(ax, name, how, found[key], colour)
    above[0].set(title="KL(policy || reference), nats", xlabel="step")
    above[1].set(title="expected reward", xlabel="step")
    above[2].set(title="reward less beta KL, behind the exact gradient (from 0.0003)", xlabel="step", yscale="log")
    for ax, key, scale, title in (
        (below[0], "reverse, tokens", 100, "expected gradient off that of the reverse KL of tokens, %"),
        (below[1], "forward, tokens", 100, "expected gradient off that of the forward KL of tokens, %"),
        (below[2], "noise", 1, "noise of one sequence's gradient, in norms of the reverse KL's"),
    ):
        bars(ax, figures, key, colours, scale)
        ax.set(title=title, xlabel="sampled by the policy itself; hatched: by an older one")
    for ax in (*above, *below):
        ax.grid(alpha=0.3)
    note = f"median of {figures['seeds']} seeds, bands: least to most; dotted: expected gradients, by enumeration"
    figure.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10, title=note)
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


def line(ax: Any, name: str, how: str, seeds: list[list[float]], colour: str) -> None:
    """The median of the seeds, and a band from the least to the most around that of samples."""
    rows = list(zip(*seeds, strict=True))
    steps = [EVERY * i for i in range(len(rows))]
    middle = [statistics.median(row) for row in rows]
    if how == "expected":
        ax.plot(steps, middle, ":", color=colour)
        return
    width = 3.5 if name == "k2" else 1.5  # k3_is lies on k2
    ax.plot(steps, middle, color=colour, linewidth=width, label=f"{name}: {study.EXPERIMENTS[name].what}")
    ax.fill_between(steps, [min(row) for row in rows], [max(row) for row in rows], color=colour, alpha=0.1, lw=0)


def bars(ax: Any, figures: dict[str, Any], key: str, colours: dict[str, str], scale: float) -> None:
    """Median, least and most of the seeds, of the policy itself and of an older one (hatched)."""
    names = list(figures["gradients"]["1.0"]["on"])
    for i, who in enumerate(WHO):
        rows = [[scale * v for v in figures["gradients"]["1.0"][who][name][key]] for name in names]
        middle = [statistics.median(row) for row in rows]
        under = [m - min(row) for m, row in zip(middle, rows, strict=True)]
        over = [max(row) - m for m, row in zip(middle, rows, strict=True)]
        at, colour = [n + 0.38 * (i - 0.5) for n in range(len(names))], [colours[name] for name in names]
        ax.bar(at, middle, 0.36, yerr=[under, over], color=colour, alpha=0.8, hatch="//" * i, capsize=2)
    ax.set_xticks(range(len(names)), names)


if __name__ == "__main__":
    sys.exit(main())
