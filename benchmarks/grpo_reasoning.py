"""The run that learns (examples/grpo_reasoning.py): three seeds planned and unplanned, and one that is killed 20 times.

    python benchmarks/grpo_reasoning.py [-o FILE] [--plot FILE] [--seeds 3] [--kills 20]

`first` is the mean reward of the first step, whose answers are the base model's, `last` that of the last ten; `same`
says whether the planned run's rewards and final weights are the unplanned run's bits; `over` is the most that a planned
step took of its budget, which is a third of the unplanned peak; `seconds` of one run on one core, what comes before
GRPO, compiling and recording included. The killed run has 40 steps, after few supervised ones, in processes of their
own, each killed with SIGKILL after a random time and started again; its `same` is about the final weights.
Exit code 1 when a run does not learn, is over, or differs.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from examples import grpo_reasoning as example

ROOT = Path(__file__).parent.parent
WORKER = """
import sys
from pathlib import Path
import torch
from examples import grpo_reasoning as example
torch.set_num_threads(1)
example.BEFORE = (20, 10)
for _ in example.train(example.Run(steps=40), Path(sys.argv[1]), int(sys.argv[2])):
    pass
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/grpo_reasoning.json")
    parser.add_argument("--plot", default="docs/grpo-reasoning.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    budget = example.unplanned_peak(example.Run()) // 3
    runs = [seed_run(seed, budget, Path(args.plot) if not seed else None) for seed in range(args.seeds)]
    killed = kills(args.kills, budget)
    save(args.out, {"run": asdict(example.Run()), "budget": budget, "seeds": runs, "killed": killed})
    learned = all(r["first"] < 0.2 and r["last"] > 0.6 for run in runs for r in (run["planned"], run["unplanned"]))
    return 0 if learned and killed["same"] and all(r["same"] and r["planned"]["over"] <= 1 for r in runs) else 1


def seed_run(seed: int, budget: int, plot: Path | None) -> dict[str, Any]:
    run, found, curves = example.Run(seed=seed), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, most in (("planned", budget), ("unplanned", None)):
            started = time.process_time()
            curve = curves[name] = list(example.train(run, Path(folder) / name, most))
            rewards, peak = [s.reward for s in curve], max(s.peak for s in curve)
            found[name] = {
                "first": rewards[0],
                "last": sum(rewards[-10:]) / 10,
                "peak": peak,
                "over": peak / budget,
                "seconds": time.process_time() - started,
                "rewards": [round(sum(rewards[k : k + 10]) / 10, 4) for k in range(0, run.steps, 10)],
            }
            print(f"seed {seed}, {name}: {found[name]['first']:.3f} -> {found[name]['last']:.3f}, {peak / 1e6:.1f} MB")
        same = [s.reward for s in curves["planned"]] == [s.reward for s in curves["unplanned"]]
        same = same and equal(*(Path(folder) / name for name in curves))
    if plot:
        example.draw(plot, curves, budget)
    return found | {"seed": seed, "same": same}


def kills(count: int, budget: int) -> dict[str, Any]:
    """Each worker lives from the time that importing takes to that of a whole run."""
    draw, steps = random.Random(0), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        started = time.perf_counter()
        work(whole, budget)
        took = time.perf_counter() - started
        while len(steps) < count:
            if work(killed, budget, after=draw.uniform(0.2, 1.0) * took / 2):
                checkpoint = killed / "checkpoint.pt"
                steps.append(torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else -1)
                if steps[-1] == 40:
                    checkpoint.unlink()  # it was killed when all was done: the next begins anew
            else:
                (killed / "checkpoint.pt").unlink()
        work(killed, budget)
        print(f"killed {count} times, with checkpoints of steps {steps}; the same weights: {equal(whole, killed)}")
        return {"kills": count, "steps": steps, "same": equal(whole, killed)}


def work(folder: Path, budget: int, after: float | None = None) -> bool:
    """Whether it was killed, after so many seconds."""
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", WORKER, str(folder), str(budget)], cwd=ROOT) as child:
        try:
            if child.wait(after):
                raise SystemExit("the worker failed by itself")
            return False
        except subprocess.TimeoutExpired:
            child.kill()
            return True


def equal(*folders: Path) -> bool:
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in folders)
    return all(torch.equal(value, other[name]) for name, value in one.items())


if __name__ == "__main__":
    sys.exit(main())
