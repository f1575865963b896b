"""An engine in the trainer's process: its cache leaves and comes back, and nobody can tell from its tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime.vllm import Completion, InProcess

from .conftest import started

MIB = 2**20
CACHE = 64 * MIB
PROMPTS = [[3, 4, 5, 6 + k] for k in range(6)]
SAMPLING: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "seed": 7}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    there = started(tmp_path_factory.mktemp("llama"), kv_cache=CACHE)
    yield there
    there.close()


def test_a_group_can_be_made_after_the_engine(engine: InProcess, tmp_path: Path) -> None:
    first = engine.generate(PROMPTS, **SAMPLING)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert engine.generate(PROMPTS, **SAMPLING) == first
    dist.destroy_process_group()
    assert engine.generate(PROMPTS, **SAMPLING) == first


def test_the_cache_leaves_and_comes_back(engine: InProcess) -> None:
    assert engine.kv_bytes == CACHE
    first = engine.generate(PROMPTS, **SAMPLING)
    with_it = memory.resident()
    for _ in range(5):
        engine.release()
        assert engine.resident == 0
        assert abs(with_it - memory.resident() - CACHE) < 4 * MIB
        engine.restore()
        assert engine.resident == CACHE
        assert abs(with_it - memory.resident()) < 4 * MIB
        assert engine.generate(PROMPTS, **SAMPLING) == first


@pytest.mark.parametrize("steps", [0, 1, 2, 9, 23])
def test_requests_are_kept_when_it_leaves_in_the_middle_of_a_rollout(engine: InProcess, steps: int) -> None:
    whole = engine.generate(PROMPTS, n=2, **SAMPLING)
    first = engine.submit(PROMPTS, n=2, **SAMPLING)[0]
    done = engine.advance(steps)
    assert not done
    for _ in range(2):
        engine.release()
        engine.restore()
        done += engine.advance(1)
    done += engine.advance()
    again = [c._replace(prompt=c.prompt - first) for c in done]
    assert [c.tokens for c in again] == [c.tokens for c in whole]
    # computed at once and not token by token: the same numbers but for the order of sums
    torch.testing.assert_close(flat(again), flat(whole), atol=1e-5, rtol=0)


def flat(completions: list[Completion]) -> torch.Tensor:
    return torch.tensor([p for c in completions for p in c.logprobs])


def test_release_and_restore_may_come_again_and_in_any_order(engine: InProcess) -> None:
    first = engine.generate(PROMPTS, **SAMPLING)
    for name in ("release", "release", "restore", "restore", "release", "restore"):
        assert getattr(engine, name)() == 0
    assert engine.generate(PROMPTS, **SAMPLING) == first


def test_completions_are_in_the_order_of_prompts_and_say_why_they_end(engine: InProcess) -> None:
    found = engine.generate(PROMPTS, n=3, max_tokens=40, seed=1, stop_token_ids=[3, 4])
    assert [(c.prompt, c.number) for c in found] == [(p, k) for p in range(len(PROMPTS)) for k in range(3)]
    assert {c.finished for c in found} == {"stop", "length"}
    assert all((c.finished == "length") == (len(c.tokens) == 40) for c in found)
    assert all(len(c.tokens) == len(c.logprobs) and max(c.logprobs) <= 0 for c in found)
    assert len({c.tokens for c in found if c.prompt == 0}) == 3


def test_what_is_not_a_prompt_is_refused(engine: InProcess) -> None:
    for prompts, why in (
        (["Hello"], "prompt 0 is 'Hello': prompts are lists of token ids, as ints"),
        ([[1], []], "prompt 1 is empty: give one token at least"),
        ([[1.5]], r"prompt 0 is \[1.5\]: prompts are lists"),
        ([[1] * 128], "vLLM has not taken the prompts: .*128"),
        ([[1], [2, 131]], "prompt 1 has token 131: the vocabulary has 131"),
    ):
        with pytest.raises(MemplanError, match=why):
            engine.generate(prompts)
    with pytest.raises(MemplanError, match=r"sampling {'max_tokns': 3} is not what vLLM takes: .*max_tokns"):
        engine.generate(PROMPTS, max_tokns=3)
    with pytest.raises(MemplanError, match=r"sampling {'temperature': -1} is not what vLLM takes: .*temperature"):
        engine.generate(PROMPTS, temperature=-1)
    assert engine.generate(PROMPTS, **SAMPLING)


def test_nothing_is_generated_while_the_cache_is_away(engine: InProcess) -> None:
    engine.release()
    with pytest.raises(MemplanError, match="the engine's KV cache is not on the device: generate inside"):
        engine.generate(PROMPTS)
    assert engine.resident == 0
    engine.restore()
    engine.submit(PROMPTS, max_tokens=2)
    with pytest.raises(MemplanError, match="6 requests are unfinished: advance"):
        engine.generate(PROMPTS)
    assert len(engine.advance()) == 6


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_the_engine_has_failed_it_works(
    engine: InProcess, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    first = engine.generate(PROMPTS, **SAMPLING)
    for at in (0, 1, 5):
        calls = iter(range(at + 1))
        real = engine._worker.execute_model

        def fails(*args: Any, calls: Iterator[int] = calls, real: Any = real, at: int = at) -> Any:
            if next(calls) == at:
                raise error("boom")
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(error, match="boom"):
            patch.setattr(engine._worker, "execute_model", fails)
            engine.generate(PROMPTS, **SAMPLING)
        engine.release()
        engine.restore()
        assert engine.generate(PROMPTS, **SAMPLING) == first
