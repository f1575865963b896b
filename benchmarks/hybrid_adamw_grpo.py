"""HybridAdamW on a GRPO run that learns (examples/grpo_reasoning.py, not planned), against torch's AdamW.

    python benchmarks/hybrid_adamw_grpo.py [--seeds 5] [--jobs 2] [-o FILE]

For each seed every optimizer starts from the same base and is asked the same questions; answers are drawn from what it
has learned. `reward` is the mean of the last ten steps, `loss` the mean negative log-probability of the right answers
after the last step, over all words of the run; `bytes` are those of the moments' storages then. Differences are in % of
AdamW's. "AdamW, other draws" are other questions and answers: what chance alone does.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from examples import grpo_reasoning as example
from memplan.grpo import token_logprobs
from memplan.runtime.optim import HybridAdamW
from memplan.runtime.optimizers import states
from memplan.runtime.storages import nbytes

AdamW = torch.optim.AdamW
RULES: dict[str, tuple[Any, int]] = {  # and which draws of questions and answers
    "AdamW": (AdamW, 0),
    "AdamW, other draws": (AdamW, 1),
    "threshold 1e-3": (functools.partial(HybridAdamW, threshold=1e-3, every=20), 0),
    "share 0.84": (functools.partial(HybridAdamW, share=0.84, every=20), 0),
}


def trained(run: example.Run, make: Any) -> dict[str, float]:
    """What comes out of a run with this optimizer."""
    made: list[torch.optim.Optimizer] = []

    def keeping(*args: Any, **options: Any) -> torch.optim.Optimizer:
        made.append(make(*args, **options))
        return made[-1]

    with tempfile.TemporaryDirectory() as folder:
        rewards = [seen.reward for seen in example.train(run, Path(folder), None, keeping)]
        model = example.policy(run)
        model.load_state_dict(torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["model"])
    texts = {(task.prompt, task.answer) for task in example.questions(run)}
    encode, end = example.TOKENIZER.encode, example.TOKENIZER.eos
    ids = torch.tensor([[*encode(prompt), *encode(answer), end] for prompt, answer in sorted(texts)])
    with torch.no_grad():
        loss = -token_logprobs(model, ids)[:, -example.NEW_TOKENS :].sum(1).mean()
    moments = [state for state in states(made[0]) if state.dim()]
    return {"reward": sum(rewards[-10:]) / 10, "loss": loss.item(), "bytes": nbytes(moments, ("cpu",))}


def job(seed: int, name: str) -> dict[str, float]:
    torch.set_num_threads(1)
    make, draws = RULES[name]
    return trained(example.Run(seed=seed, draws=draws), make)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--out", default="benchmarks/results/hybrid_adamw_grpo.json")
    asked = parser.parse_args()
    pairs = [(seed, name) for seed in range(asked.seeds) for name in RULES]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RULES}
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        for (seed, name), one in zip(pairs, pool.map(job, *zip(*pairs, strict=True)), strict=True):
            plain = found["AdamW"][seed] if name != "AdamW" else one
            percent = {f"{key}_percent": 100 * (one[key] / plain[key] - 1) for key in ("loss", "bytes")}
            found[name].append(one | percent)
            print(seed, name, found[name][-1], flush=True)
    save(asked.out, {"run": asdict(example.Run()), "rules": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
