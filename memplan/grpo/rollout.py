"""Rollouts: groups of completions sampled by the model itself, scored, and packed into a batch of a fixed shape.

What must hold: for the same weights and seed the batch is the same, and torch's generator is left as it was found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.grpo.advantages import group_advantages
from memplan.grpo.objective import Batch
from memplan.grpo.step import token_logprobs
from memplan.grpo.tasks import CharTokenizer, Task


@dataclass(frozen=True)
class Rollout:
    """A batch for the train step, and what it was made from: one text and one reward [B] per completion."""

    batch: Batch
    completions: tuple[str, ...]
    rewards: Tensor

    @property
    def teaches(self) -> float:
        """The share of completions that have an advantage: where a whole group has one reward, none has."""
        return float((self.batch["advantages"] != 0).float().mean())


def rollout(
    model: Any,
    tasks: Sequence[Task],
    tokenizer: CharTokenizer,
    *,
    group_size: int = 8,
    max_new_tokens: int = 16,
    length: int | None = None,
    temperature: float = 1.0,
    shaping: float = 0.2,
    seed: int = 0,
) -> Rollout:
    """Sample `group_size` completions for every task with model.generate (transformers) and score them.

    The batch has B = len(tasks) * group_size rows, a task's completions side by side, padded on the right to
    T = `length` tokens (default: the longest prompt plus max_new_tokens). It holds no ref_logprobs: they are
    token_logprobs(reference, batch["input_ids"], temperature) under no_grad. shaping: as of Task.reward.

    Token ids beyond the tokenizer's (a vocabulary padded to a round size) are never sampled. The policy's log-probs
    do count them, so there the sampler and the policy differ slightly; old and new log-probs do not.
    """
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    longest = max(map(len, prompts))
    length = length or longest + max_new_tokens
    if length < longest + max_new_tokens:
        raise MemplanError(f"length={length} is too short: {longest} prompt tokens + {max_new_tokens} new ones")
    device = next(model.parameters()).device

    # generate appends, so here prompts are padded on the left; it derives positions from the mask, and they start
    # at 0 with the prompt's first token, exactly as in the packed batch below.
    padded = [[tokenizer.pad] * (longest - len(p)) + p for p in prompts]
    ids = torch.tensor(padded, device=device).repeat_interleave(group_size, 0)
    with _evaluation(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        sampled = model.generate(
            ids,
            attention_mask=(ids != tokenizer.pad).long(),
            do_sample=True,
            temperature=temperature,
            top_k=0,  # the whole distribution: the ratio is against it
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad,
            eos_token_id=tokenizer.eos,
            suppress_tokens=[tokenizer.pad, *range(tokenizer.vocab_size, model.config.vocab_size)],
        )
    completions = [row[: row.index(tokenizer.eos) + 1] if tokenizer.eos in row else row
                   for row in sampled[:, longest:].tolist()]  # fmt: skip

    rolled = score(tasks, tokenizer, completions, length=length, shaping=shaping)
    batch = {name: value.to(device) for name, value in rolled.batch.items()}
    with torch.no_grad():  # in the mode the step will run in, so that the first ratio is 1
        batch["old_logprobs"] = token_logprobs(model, batch["input_ids"], temperature)
    return replace(rolled, batch=batch)


def score(
    tasks: Sequence[Task],
    tokenizer: CharTokenizer,
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None = None,
    *,
    length: int,
    shaping: float = 0.2,
) -> Rollout:
    """Completions from anywhere, as an inference engine, scored and packed into a batch on the CPU.

    completions: token ids, as many for each task, a task's side by side. logprobs: of their tokens, in nats, as they
    were sampled; with them the batch holds old_logprobs [B, T-1], 0 where no completion is. T = length. shaping: as of
    Task.reward.
    Raises MemplanError where a row is longer than that, or tasks and completions do not go together.
    """
    group_size, rest = divmod(len(completions), len(tasks))
    if rest or not group_size:
        raise MemplanError(f"{len(completions)} completions are not as many for each of {len(tasks)} tasks")
    prompts = [tokenizer.encode(task.prompt) for task in tasks]
    input_ids = torch.full((len(completions), length), tokenizer.pad)
    mask, old = torch.zeros(len(completions), length - 1), torch.zeros(len(completions), length - 1)
    for row, completion in enumerate(completions):
        prompt = prompts[row // group_size]
        end = len(prompt) + len(completion)
        if end > length:
            raise MemplanError(
                f"length={length} is too short for row {row}: {len(prompt)} prompt tokens + {len(completion)} new ones"
            )
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, len(prompt) - 1 : end - 1] = 1
        if logprobs is not None:
            old[row, len(prompt) - 1 : end - 1] = torch.tensor(logprobs[row])
    texts = tuple(map(tokenizer.decode, completions))
    rewards = torch.tensor([tasks[row // group_size].reward(text, shaping) for row, text in enumerate(texts)])
    batch = {"input_ids": input_ids, "completion_mask": mask, "advantages": group_advantages(rewards, group_size)}
    return Rollout(batch if logprobs is None else batch | {"old_logprobs": old}, texts, rewards)


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back to its own afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
