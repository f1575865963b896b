"""Verifiable tasks from reasoning_gym, and a character tokenizer small enough for toy models.

What must hold: the same name, count and seed give the same tasks, and scoring has no randomness.
"""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from memplan.errors import MemplanError, did_you_mean

_ALPHABET = string.digits + string.ascii_letters + string.punctuation + " \n"


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: id 0 pads, id 1 ends a completion, then the alphabet in order."""

    alphabet: str = _ALPHABET
    pad: int = 0
    eos: int = 1

    @property
    def vocab_size(self) -> int:
        return 2 + len(self.alphabet)

    def encode(self, text: str) -> list[int]:
        """Raises MemplanError if a character is not in the alphabet."""
        if unknown := set(text) - set(self.alphabet):
            raise MemplanError(f"characters {sorted(unknown)} are not in the tokenizer's alphabet: pass a larger one")
        return [2 + self.alphabet.index(character) for character in text]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text up to the first end token; padding is skipped."""
        text = []
        for token in tokens:
            if token == self.eos:
                break
            if token != self.pad:
                text.append(self.alphabet[token - 2])
        return "".join(text)


@dataclass(frozen=True)
class Task:
    """One question with its verifier."""

    prompt: str
    answer: str
    entry: dict[str, Any] = field(repr=False)
    dataset: Any = field(repr=False, compare=False)

    def score(self, completion: str) -> float:
        """reasoning_gym's verdict, from 0 to 1."""
        return float(self.dataset.score_answer(completion, self.entry))

    def reward(self, completion: str, shaping: float = 0.2) -> float:
        """The verdict, mixed with how similar the completion is to the answer (0 to 1, difflib's ratio).

        A model with random weights hardly ever answers right, so the verdict alone would be 0 for a whole group and
        all advantages 0. The shaped part is there to make groups differ; shaping=0 is the honest task.
        """
        similarity = difflib.SequenceMatcher(None, completion, self.answer, autojunk=False).ratio()
        return (1 - shaping) * self.score(completion) + shaping * similarity


def make_tasks(name: str = "spell_backward", count: int = 4, seed: int = 0, **options: Any) -> list[Task]:
    """`count` tasks of a reasoning_gym data set; `options` are that data set's own (max_word_len, min_terms, ...)."""
    if name not in DATASETS:
        raise MemplanError(f"reasoning_gym has no data set {name!r}{did_you_mean(name, DATASETS)}")
    dataset = reasoning_gym.create_dataset(name, size=count, seed=seed, **options)
    return [Task(entry["question"] + "\n", entry["answer"], entry, dataset) for entry in dataset]
