"""A GRPO run that learns, inside a third of the memory that it takes unplanned.

    pip install -e . && python examples/grpo_reasoning.py [-o FOLDER] [--steps N] [--seed N]

A small Llama spells words of three letters backward (reasoning-gym). From random weights it is first made what GRPO
begins with elsewhere, a base model: it answers in the right form, has seen how it is done, and yet is mostly wrong. To
that end it reads right answers first, and then ever more that are letters at random, until one in eight is right. GRPO
does the rest, once planned and once not, and the rewards and peaks of both are drawn side by side. A run that was
killed goes on where its last checkpoint was, when the same command is given again, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import gc
import random
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, LlamaConfig

import memplan
from memplan.backend import memplan_backend
from memplan.grpo import (
    CharTokenizer,
    GRPOConfig,
    Rollout,
    Task,
    load_checkpoint,
    make_step,
    make_tasks,
    rollout,
    save_checkpoint,
    token_logprobs,
)

TOKENIZER = CharTokenizer()
NEW_TOKENS = 4  # three letters and the end
SHAPING = 0.0  # the verdict has a part for each letter; that of similarity would favour answers of two letters
BEFORE = (500, 200)  # supervised steps before GRPO: on right answers, and while their share falls
RIGHT = 1 / 8  # to this


@dataclass(frozen=True)
class Run:
    """What a run is made of: a checkpoint of another one is refused. draws: other questions and answers from the same
    base; prompts, group: of a step; every: steps between checkpoints.
    """

    seed: int = 0
    draws: int = 0
    steps: int = 120
    prompts: int = 32
    group: int = 8
    rate: float = 3e-4
    words: int = 600
    every: int = 10


@dataclass(frozen=True)
class Seen:
    """One step: its mean reward, and the peak of bytes while it ran, all that is held included."""

    reward: float
    peak: int


def policy(run: Run) -> Any:
    torch.manual_seed(run.seed)
    config = LlamaConfig(
        vocab_size=TOKENIZER.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=TOKENIZER.eos,
        pad_token_id=TOKENIZER.pad,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def questions(run: Run) -> list[Task]:
    return make_tasks("spell_backward", run.words, run.seed, min_word_len=3, max_word_len=3)


def sampled(run: Run, model: Any, tasks: list[Task], number: int) -> Rollout:
    """The rollout of a step: the same for the same weights."""
    own = run.seed + 1000 * run.draws
    chosen = random.Random(f"{own} {number}").sample(tasks, run.prompts)
    seed = 2**20 * own + number
    return rollout(
        model, chosen, TOKENIZER, group_size=run.group, max_new_tokens=NEW_TOKENS, shaping=SHAPING, seed=seed
    )


def prepare(run: Run, model: Any, tasks: list[Task]) -> None:
    """The supervised steps. Of those of the second kind the last fifth has the least share of right answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    draw = random.Random(run.seed)

    def row(task: Task, share: float) -> list[int]:
        right = draw.random() < share
        answer = task.answer if right else "".join(draw.choices(string.ascii_lowercase, k=len(task.answer)))
        return [*TOKENIZER.encode(task.prompt), *TOKENIZER.encode(answer), TOKENIZER.eos]

    for number in range(sum(BEFORE)):
        fallen = max(0.0, (number - BEFORE[0]) / BEFORE[1])
        if fallen:
            optimizer.param_groups[0]["lr"] = 1e-3
        share = max(RIGHT, 1 - (1 - RIGHT) * fallen / 0.8)
        ids = torch.tensor([row(task, share) for task in draw.sample(tasks, 64)])  # words of one length: rows too
        (-token_logprobs(model, ids)[:, -NEW_TOKENS:].mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train(run: Run, folder: Path, budget: int | None, make: Any = torch.optim.AdamW) -> Iterator[Seen]:
    """The steps of a run, those before its checkpoint as they were. budget: bytes, None for a step that is not planned.
    make: the class of the optimizer, or as it is called. The folder's checkpoint is the run's last one, and at the end
    its result.
    """
    torch._dynamo.reset()  # it keeps the models of earlier runs of this process
    model = policy(run)
    tasks = questions(run)
    optimizer = make(model.parameters(), lr=run.rate, weight_decay=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {"model": model, "optimizer": optimizer, "made_of": asdict(run) | {"budget": budget}}
    checkpoint = folder / "checkpoint.pt"
    done, seen = load_checkpoint(checkpoint, **own)
    if seen is None:
        prepare(run, model, tasks)
        save_checkpoint(checkpoint, step=0, kept=(seen := []), **own)
    yield from (Seen(*values) for values in seen)
    gc.collect()  # what came before is alive no more

    step = make_step(model, GRPOConfig())
    if budget is not None:
        options = {"budget": budget, "inner": "eager", "optimizer": optimizer}
        step = torch.compile(step, backend=memplan_backend, options=options)
    for number in range(done, run.steps):
        rolled = sampled(run, model, tasks, number)
        if number == done and budget is not None:
            step(rolled.batch)  # plans; while a step is recorded none can be
        with memplan.record() as recorded:
            step(rolled.batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((float(rolled.rewards.mean()), recorded.timeline.peak))
        if (number + 1) % run.every == 0 or number + 1 == run.steps:
            save_checkpoint(checkpoint, step=number + 1, kept=seen, **own)
        yield Seen(*seen[-1])


def unplanned_peak(run: Run) -> int:
    """Bytes at the peak of a step with its optimizer's states there: of the second one, of any weights."""
    model = policy(run)
    tasks = questions(run)
    optimizer, step = torch.optim.AdamW(model.parameters()), make_step(model, GRPOConfig())
    batch = sampled(run, model, tasks, 0).batch
    for _ in range(2):
        with memplan.record() as recorded:
            step(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return recorded.timeline.peak


def draw(path: Path, curves: dict[str, list[Seen]], budget: int) -> None:
    """Rewards, each the mean of ten steps, and peaks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    rewards, peaks = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        smooth = [sum(s.reward for s in curve[max(k - 9, 0) : k + 1]) / min(k + 1, 10) for k in range(len(curve))]
        rewards.plot(smooth, style, label=name)
        peaks.plot([s.peak / 1e6 for s in curve], style, label=name)
    peaks.axhline(budget / 1e6, color="grey", linewidth=0.8, label="budget")
    rewards.set(ylabel="mean reward", ylim=(0, 1))
    peaks.set(ylabel="peak, MB", xlabel="step", ylim=(0, None))
    for axes in (rewards, peaks):
        axes.legend(frameon=False)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=120)
    part.replace(path)


def main(folder: Path = Path("grpo-reasoning"), run: Run | None = None) -> dict[str, list[Seen]]:
    run = run or Run()
    torch.set_num_threads(1)  # small products
    unplanned = unplanned_peak(run)
    budget = unplanned // 3
    print(f"unplanned a step has its peak at {unplanned / 1e6:.1f} MB; the budget is {budget / 1e6:.1f} MB")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    curves = {}
    with Progress(*columns, TextColumn("{task.fields[state]}")) as progress:
        for name, most in (("planned", budget), ("unplanned", None)):
            shown = progress.add_task(f"{name:>9}", total=run.steps, state="before GRPO")
            curves[name] = []
            for seen in train(run, folder / name, most):
                curves[name].append(seen)
                state = f"reward {seen.reward:.2f}, peak {seen.peak / 1e6:.1f} MB"
                progress.update(shown, advance=1, state=state)
    draw(folder / "rewards.png", curves, budget)
    for name, curve in curves.items():
        last = [s.reward for s in curve[-10:]]
        print(
            f"{name:>9}: mean reward {curve[0].reward:.2f} -> {sum(last) / len(last):.2f}, "
            f"highest peak {max(s.peak for s in curve) / 1e6:.1f} MB"
        )
    print(f"drawn: {folder / 'rewards.png'}")
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("grpo-reasoning"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--seed", type=int, default=Run.seed)
    given = parser.parse_args()
    if given.steps < 1:
        parser.error(f"--steps {given.steps} trains nothing: it takes 1 or more")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        main(given.out, Run(seed=given.seed, steps=given.steps))
    except memplan.MemplanError as error:
        raise SystemExit(f"grpo_reasoning: {error}") from None
    except OSError as error:
        raise SystemExit(f"grpo_reasoning: cannot write to {given.out}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("grpo_reasoning: interrupted; the same command goes on from the last checkpoint") from None
