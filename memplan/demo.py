"""The demo: the same few GRPO steps unplanned and inside two budgets, on a CPU, in under a minute.

In: nothing but random weights and reasoning-gym's tasks. Out: a table on the terminal, and the tighter plan's
timeline as timeline.html, .png and .json. What must hold: every run starts from the same weights and sees the same
batch, so that the gradients may be compared bit for bit.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

import memplan
from memplan.grpo import Batch, CharTokenizer, GRPOConfig, Rollout, make_step, make_tasks, rollout
from memplan.units import human

# Gradients and weights are kept as arrays, which no allocator of torch sees: a recording holds the step alone.
Array = NDArray[np.float32]

CONFIG = GRPOConfig(beta=0.04, kl="k3_is")
LEARNING_RATE = 0.05  # plain gradient descent: no optimizer state to account for


@dataclass(frozen=True)
class Outcome:
    """What one run of the steps was: bytes and seconds measured, gradients of every step."""

    losses: tuple[float, ...]
    gradients: tuple[tuple[Array, ...], ...]
    seconds: float
    peak: int


def small_llama(tokenizer: CharTokenizer, *, hidden: int = 128, layers: int = 4, seed: int = 0) -> Any:
    """A Llama of transformers with random weights: the tokenizer's vocabulary padded to 512, 0.9 M parameters."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")  # type: ignore[no-untyped-call]


def problem(
    *,
    prompts: int = 2,
    group_size: int = 8,
    max_new_tokens: int = 24,
    hidden: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> tuple[Any, Rollout]:
    """A small model, and a rollout of it whose batch is ready for make_step(model, CONFIG).

    The reference policy is the initial model, as it is on the first step of every GRPO run, so ref_logprobs are
    old_logprobs. Rewards are shaped (Task.reward): a random model's groups would otherwise all score 0.
    """
    tokenizer = CharTokenizer()
    model = small_llama(tokenizer, hidden=hidden, layers=layers, seed=seed)
    tasks = make_tasks("spell_backward", prompts, seed, max_word_len=6)
    sampled = rollout(model, tasks, tokenizer, group_size=group_size, max_new_tokens=max_new_tokens, seed=seed)
    sampled.batch["ref_logprobs"] = sampled.batch["old_logprobs"]
    return model, sampled


def train(model: Any, step: Callable[[Batch], Tensor], batch: Batch, steps: int) -> Outcome:
    """`steps` steps of gradient descent on one batch: the first compiles, the last is recorded, the others are timed.

    `seconds` is the fastest of those, as other programs on the machine can only make a step slower.
    """
    losses, gradients, seconds = [], [], []

    def one() -> float:
        loss = step(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    for index in range(steps):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        if index < steps - 1:
            losses.append(one())
        else:
            with memplan.record() as seen:
                losses.append(one())
        seconds.append(time.perf_counter() - started)
        gradients.append(tuple(p.grad.numpy().copy() for p in model.parameters()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return Outcome(tuple(losses), tuple(gradients), min(seconds[1:-1]), seen.timeline.peak)


def smallest_budget(step: Callable[[Batch], Tensor], batch: Batch, inner: str) -> int:
    """The least bytes that any plan needs: what DoesNotFit says about a budget of one byte."""
    try:
        return memplan.plan(step, batch, budget=1, inner=inner).peak
    except memplan.DoesNotFit as error:
        return error.smallest


def same_gradients(run: Outcome, reference: Outcome) -> str:
    """How far two runs' gradients are apart, over all steps and parameters: "equal" is bit for bit."""
    pairs = list(zip(itertools.chain(*run.gradients), itertools.chain(*reference.gradients), strict=True))
    if all(np.array_equal(a, b) for a, b in pairs):
        return "equal"
    return f"off by {max(np.abs(a - b).max() for a, b in pairs):.1e}"


def run(
    inner: str = "eager",
    budgets: Sequence[int | str] | None = None,
    out: str | Path = Path("."),
    steps: int = 6,
) -> None:
    """Run the demo.

    `inner`: what runs the planned graphs, "eager" or "inductor". The unplanned step is then plain eager, or torch's own
    compile, which recomputes a little of its own accord.
    `budgets`: "30MB" or bytes; by default 50 % and 10 % of the way from the smallest budget that fits up to the
    unplanned peak. `steps`: at least 3. `out`: the folder that timeline.html, .png and .json go to.
    Raises memplan.DoesNotFit if a given budget is too small.
    """
    if inner not in ("eager", "inductor"):
        raise memplan.MemplanError(f"inner {inner!r} is not offered: it is 'eager' or 'inductor'")
    if steps < 3:
        raise memplan.MemplanError(f"steps={steps}: the first compiles and the last is recorded, so at least 3")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise memplan.MemplanError(f"cannot write into {str(out)!r}: {e.strerror}; name a folder") from None
    from memplan.backend import memplan_backend  # by object: the name is known to torch only once memplan is installed

    console = Console()

    with _progress(console, "sampling completions"):
        model, sampled = problem()
    batch = sampled.batch
    initial = [p.detach().numpy().copy() for p in model.parameters()]
    rows, length = batch["input_ids"].shape
    size = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"Llama of {size:.1f} M parameters, {rows} completions x {length} tokens; "
        f"rewards {sampled.rewards.min():.2f} to {sampled.rewards.max():.2f}, mean {sampled.rewards.mean():.2f}"
    )

    def measure(name: str, step: Callable[[Batch], Tensor]) -> Outcome:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(torch.from_numpy(value))
        with _progress(console, f"{steps} steps, {name}"):
            outcome = train(model, step, batch, steps)
        model.zero_grad(set_to_none=True)  # gradients left over would count against the next budget
        return outcome

    step = make_step(model, CONFIG)
    # Eager is compared with the step as written: aot_eager would already recompute what torch's partitioner picks.
    unplanned = measure("unplanned", step if inner == "eager" else torch.compile(step, fullgraph=True))
    if budgets is None:
        with _progress(console, "looking for the smallest budget"):
            smallest = smallest_budget(step, batch, inner)
        room = max(unplanned.peak - smallest, 0)
        budgets = [smallest + room // 2, smallest + room // 10]

    table = Table(
        title=f"{steps} GRPO steps, {inner}, from the same weights",
        caption="gradients of every step and parameter against the unplanned run's: equal means bit for bit, "
        "off by is the largest absolute difference",
    )
    table.add_column("budget")
    for heading in ("planned", "measured", "of none", "ms/step", "last loss", "gradients"):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(budget: str, planned: str, outcome: Outcome, gradients: str) -> None:
        share, seconds, loss = outcome.peak / unplanned.peak, outcome.seconds, outcome.losses[-1]
        table.add_row(
            budget, planned, human(outcome.peak), f"{share:.0%}", f"{1e3 * seconds:.0f}", f"{loss:.5f}", gradients
        )

    row("none", "", unplanned, "")
    plans = []
    for budget in budgets:
        name = budget if isinstance(budget, str) else human(budget)
        with _progress(console, f"planning for {name}"):
            plans.append(plan := memplan.plan(step, batch, budget=budget, inner=inner))
        options: dict[str, Any] = {"budget": budget, "inner": inner}
        outcome = measure(f"inside {name}", torch.compile(step, backend=memplan_backend, options=options))
        row(name, human(plan.peak), outcome, same_gradients(outcome, unplanned))

    console.print(table)
    if not plans:
        return
    tightest = min(plans, key=lambda plan: plan.budget.bytes)
    print(tightest)
    for suffix in ("html", "png", "json"):
        tightest.timeline.save(out / f"timeline.{suffix}")
    console.print(f"the tighter plan's timeline: {out / 'timeline.html'}, .png and .json")


def _progress(console: Console, what: str) -> AbstractContextManager[Any]:
    return console.status(f"{what} ...")
