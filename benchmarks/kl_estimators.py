"""Which divergence an estimator of the KL term descends, by enumeration: expected gradients against the exact ones.

    python benchmarks/kl_estimators.py [-o FILE] [--plot FILE]

A policy over 32 tokens, a reference, and an older policy that sampled, all random, in float64; a loss of one sampled
token is put in for each token, so expectations are sums and nothing is drawn. `off reverse`, `off forward`: the norm of
the difference between the expected gradient and that of KL(policy || reference), or KL(reference || policy), over the
norm of the latter. `noise`: the standard deviation of one token's gradient over the norm of the gradient of
KL(policy || reference). All are medians of 200 policies at a logit distance of 1 from the reference; `off-policy`, the
older policy is at 0.5. "as written" are four experiments:

    1  reverse KL as GRPO has it, k3, beside a policy term with w = exp(l - l.detach())
    2  the same without the detach: w is 1, and the policy term has no gradient at all, which stops training
    3  the summand of the full reverse KL, p (l - r), of a sampled token: its expectation weighs with p^2
    4  forward KL: the expected gradient of 1, and more noise

Exit code 1 when one of the statements above, or of kl_estimate's docstring, does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from memplan.grpo import kl_estimate, policy_ratio

SEEDS, TOKENS, EXACT = 200, 32, 1e-9
DISTANCES = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0)
# (l, r, o) of every token -> the loss of every token; o is a constant
ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1 as a loss": lambda new, ref, old: new - ref,
    "k1 in the reward": lambda new, ref, old: policy_ratio(new, old) * (old - ref),  # a cost in the place of -A
    "k2": lambda new, ref, old: kl_estimate(new, ref, old, "k2"),
    "k3": lambda new, ref, old: kl_estimate(new, ref, old, "k3"),
    "k3_is": lambda new, ref, old: kl_estimate(new, ref, old, "k3_is"),
    "fkl": lambda new, ref, old: kl_estimate(new, ref, old, "fkl"),
    "p (l - r), as written": lambda new, ref, old: new.exp() * (new - ref),
}
HOLDS = [  # estimator, policy, and the direction whose gradient it has
    ("k1 in the reward", "on", "reverse"), ("k2", "on", "reverse"), ("k3", "on", "forward"), ("k3_is", "on", "reverse"),
    ("k3_is", "off", "reverse"), ("fkl", "on", "forward"), ("fkl", "off", "forward"),
]  # fmt: skip
Figures = dict[str, float]


def main() -> int:
    """Run, print, write, draw; 1 if a statement does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/kl_estimators.json")
    parser.add_argument("--plot", default="docs/kl-estimators.png")
    args = parser.parse_args()
    curves = {d: {p: table(d, p) for p in ("on", "off")} for d in DISTANCES}
    rows = curves[1.0]
    print(f"{'':22}" + "".join(f"  {p + '-policy:':11} off reverse off forward    noise" for p in rows))
    for name in ESTIMATORS:
        cells = [
            f"  {r['reverse']:21.1%} {r['forward']:11.1%} {r['noise']:8.2f}" for r in (t[name] for t in rows.values())
        ]
        print(f"{name:22}" + "".join(cells))
    terms = policy_terms()
    print("policy term, off the policy gradient: " + ", ".join(f"{k} {v:.1%}" for k, v in terms.items()))
    broken = [f"{e} {p}-policy is not {way}" for e, p, way in HOLDS if not rows[p][e][way] < EXACT]
    broken += [] if rows["on"]["fkl"]["noise"] > rows["on"]["k3"]["noise"] else ["fkl is not noisier than k3"]
    broken += [] if terms["detached"] < EXACT and terms["not detached"] == 1 else ["the policy term"]
    figures = {
        "tokens": TOKENS,
        "policies": SEEDS,
        "distance": 1.0,
        "rows": rows,
        "policy_term": terms,
        "curves": curves,
    }
    save(args.out, figures | {"broken": broken})
    draw(curves, args.plot)
    print("\n".join(broken) or "every statement holds")
    return bool(broken)


def table(distance: float, policy: str) -> dict[str, Figures]:
    """Medians over the seeds, for each estimator."""
    found = [compared(distance, policy, seed) for seed in range(SEEDS)]
    return {e: {k: statistics.median(f[e][k] for f in found) for k in found[0][e]} for e in ESTIMATORS}


def compared(distance: float, policy: str, seed: int) -> dict[str, Figures]:
    """Each estimator's expected gradient and its noise, for one random policy."""
    g = torch.Generator().manual_seed(seed)
    start, to_ref, to_old = torch.randn(3, TOKENS, dtype=torch.float64, generator=g)
    ref = (start + distance * to_ref).log_softmax(0)
    old = (start + (0.5 * to_old if policy == "off" else 0)).log_softmax(0)
    reverse = jacobian(lambda new: (new.exp() * (new - ref)).sum()[None], start)[0]
    forward = jacobian(lambda new: (ref.exp() * (ref - new)).sum()[None], start)[0]
    figures = {}
    for name, loss in ESTIMATORS.items():
        each = jacobian(lambda new, loss=loss: loss(new, ref, old), start)
        mean = old.exp() @ each
        spread = (old.exp() @ (each - mean).square()).sum().sqrt()
        figures[name] = {
            "reverse": off(mean, reverse),
            "forward": off(mean, forward),
            "noise": (spread / reverse.norm()).item(),
        }
    return figures


def policy_terms() -> Figures:
    """How far the expected gradient of -w A is from the policy gradient, with w = exp(l - l), its second l detached or
    not; the worst of all seeds."""
    found: dict[str, Figures] = {"detached": {}, "not detached": {}}
    for seed in range(SEEDS):
        start, advantages = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        p = start.softmax(0)
        exact = jacobian(lambda new, a=advantages: -(new.exp() * a).sum()[None], start)[0]
        for how, values in found.items():
            second = Tensor.detach if how == "detached" else Tensor.clone
            each = jacobian(lambda new, a=advantages, second=second: -policy_ratio(new, second(new)) * a, start)
            values[str(seed)] = off(p @ each, exact)
    return {how: max(values.values()) for how, values in found.items()}


def jacobian(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Gradients, in the logits, of what `loss` makes of the log-probs: one row for each of its results."""
    return torch.autograd.functional.jacobian(lambda z: loss(z.log_softmax(0)), logits)


def off(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def draw(curves: dict[float, dict[str, dict[str, Figures]]], path: str) -> None:
    """Error and noise over the distance from the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = [("on", "reverse", "on-policy"), ("off", "reverse", "off-policy"), ("on", "noise", "on-policy")]
    for ax, (policy, key, title) in zip(figure.subplots(1, 3), panels, strict=True):
        noise = key == "noise"
        for i, name in enumerate(ESTIMATORS):
            values = [curves[d][policy][name][key] * (1 if noise else 100) for d in DISTANCES]
            # what lies on each other is told apart by markers that shrink
            ax.plot(DISTANCES, values, marker="osv^Dxp"[i], markersize=10 - i, alpha=0.8, label=name)
        ax.set(xscale="log", xlabel="logit distance from the reference", xticks=DISTANCES, xticklabels=DISTANCES)
        ax.minorticks_off()
        ax.set(yscale="log") if noise else ax.set(ylim=(-5, 150), ylabel="%")
        what = "noise of one token" if noise else "expected gradient off the reverse KL's"
        ax.set_title(f"{title}: {what}", fontsize=10)
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), fontsize=9, loc="outside right center")
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
