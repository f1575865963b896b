"""What an engine is to the rest of memplan, in the trainer's process or as a server, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from memplan.errors import MemplanError
from memplan.runtime.ledger import Tenant


class Completion(NamedTuple):
    """Tokens sampled for a prompt, and the log-prob of each in nats, of the distribution it was sampled from.

    prompt: its place in what was asked for. number: which of its n completions. finished: "stop" or "length".
    """

    prompt: int
    number: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: str


class Engine(Tenant, Protocol):
    """A tenant that also generates. As a tenant it is the KV cache."""

    def generate(self, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
        """Completions of prompts given as token ids. Raises MemplanError while the cache is away."""

    def invalidate(self) -> None:
        """Weights have changed: forget what was computed with the old ones."""


def checked_prompts(prompts: Sequence[Sequence[int]], vocabulary: int | None = None) -> list[list[int]]:
    """The prompts. Raises MemplanError for what vLLM would take for something else, or never answer."""
    given = list(prompts)
    for number, prompt in enumerate(given):
        if (
            not isinstance(prompt, Sequence)
            or isinstance(prompt, str)
            or not all(isinstance(token, int) for token in prompt)
        ):
            raise MemplanError(f"prompt {number} is {repr(prompt)[:40]}: prompts are lists of token ids, as ints")
        if not len(prompt):
            raise MemplanError(f"prompt {number} is empty: give one token at least")
        wrong = next((token for token in prompt if not 0 <= token < (vocabulary or token + 1)), None)
        if wrong is not None:
            raise MemplanError(f"prompt {number} has token {wrong}: the vocabulary has {vocabulary or 'none below 0'}")
    return [list(prompt) for prompt in given]


def installed() -> Any:
    """The module vllm. Raises MemplanError where there is none."""
    try:
        with ThreadPoolExecutor(1) as pool:  # vLLM keeps a traceback of its import, and so all that the caller has
            return pool.submit(_imported).result()
    except ImportError as error:
        raise MemplanError(
            f"vLLM cannot be imported ({error}): pip install 'memplan[vllm]', 0.26 to 0.32; without it, roll out with "
            "memplan.grpo.rollout"
        ) from error


def _imported() -> Any:
    import vllm
    import vllm.distributed.parallel_state
    import vllm.engine.arg_utils
    import vllm.sampling_params

    return vllm
