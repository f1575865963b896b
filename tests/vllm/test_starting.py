"""Starting an engine and ending it: the trainer's process is left as it was, and what cannot be is refused."""

import gc
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from memplan.errors import MemplanError
from memplan.runtime.vllm import InProcess

from .conftest import KV, Start
from .test_in_process import PROMPTS, SAMPLING


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def process() -> list[Any]:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    names = {name: value for name, value in os.environ.items() if name.startswith("VLLM_ENABLE")}
    hooks = sys.excepthook, list(warnings.filters), torch.set_num_threads
    return [*states, torch.get_num_threads(), *hooks, dist.is_initialized(), gc.get_freeze_count() == 0, names]


def test_the_process_is_left_as_it_was(start: Start) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = process()
    there = start()
    assert process() == before
    there.generate(PROMPTS, **SAMPLING)
    there.release()
    there.restore()
    there.close()
    assert process() == before


def test_the_trainers_process_group_is_its_own(start: Start, group: None) -> None:
    mine = dist.group.WORLD
    there = start()
    assert dist.group.WORLD is mine
    assert dist.get_world_size() == 1
    first = there.generate(PROMPTS, **SAMPLING)
    sub = dist.new_group([0])
    total = torch.ones(3)
    dist.all_reduce(total, group=sub)
    dist.all_reduce(total)
    assert there.generate(PROMPTS, **SAMPLING) == first
    there.close()
    dist.all_reduce(total)


def test_a_closed_engine_says_so_and_there_is_one_at_a_time(start: Start) -> None:
    there = start()
    with pytest.raises(MemplanError, match="there is a vLLM engine in this process, and it can have one: close"):
        start()
    assert there.generate(PROMPTS, **SAMPLING)
    there.close()
    there.close()
    assert there.resident == 0
    assert there.release() == 0  # it is not in the way of others
    for call in (lambda: there.generate(PROMPTS), there.restore, there.invalidate):
        with pytest.raises(MemplanError, match="the engine is closed: start another one"):
            call()


@pytest.fixture
def heard() -> Iterator[None]:
    """Interrupts are, also in a process that was started in the background of a shell, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_leaves_the_process_to_the_trainer(
    start: Start, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    there = start()
    first, before, calls = there.generate(PROMPTS, **SAMPLING), process(), iter([1, 2, 3, 4])
    real = random.setstate

    def interrupted(state: Any) -> None:  # in the middle of going to the engine's states, or of coming back
        real(state)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(random, "setstate", interrupted)
        there.release()
    assert process() == before
    there.release()
    there.restore()
    assert there.generate(PROMPTS, **SAMPLING) == first


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match=f"vLLM has not started with '{tmp_path}'"):
        InProcess.start(tmp_path, KV)
    with pytest.raises(MemplanError, match="'worker_cls' cannot be given: memplan has a worker of its own"):
        InProcess.start(tmp_path, KV, worker_cls="another")
