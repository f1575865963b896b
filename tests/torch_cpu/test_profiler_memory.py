"""Profilers that are started while something runs that an earlier one saw the beginning of: torch writes its end into
freed memory, and so into tensors. What memplan starts must not.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

import memplan
from memplan.runtime import rolling
from memplan.runtime.allocator import interrupt
from memplan.runtime.window import Session

SIZES = (64, 256, 1024, 4096, 8192, 16384, 20000, 32768, 65536)
TRIES = 20


DEFECT = """
import torch

def profile():
    made = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)
    made.start()
    return made

for _ in range(40):
    first = profile()
    with torch.profiler.record_function("a scope"):
        for _ in range(50):
            torch.ones(3) + 1
        first.stop()
        del first
        zeros = [torch.zeros(n) for n in (64, 256, 1024, 4096, 8192, 16384, 20000, 32768, 65536) for _ in range(60)]
        second = profile()
    second.stop()
    assert not any(t.any() for t in zeros)
"""


def damaged(first: Callable[[], None], second: Callable[[], None], tries: int = TRIES) -> list[int]:
    """Sizes of tensors of zeros, made between `first` and `second`, that are not zeros after the scope around both."""
    found = list[int]()
    for _ in range(tries):
        with record_function("a scope"):
            first()
            zeros = [torch.zeros(n) for n in SIZES for _ in range(60)]
            second()
        found += [t.numel() for t in zeros if t.any()]
    return found


def work() -> None:
    for _ in range(50):
        torch.ones(3) + 1


def test_torch_has_the_defect() -> None:
    """If this fails, torch has mended it, and this file's subject is gone. In a process of its own: it may crash."""
    run = subprocess.run([sys.executable, "-c", DEFECT], env={**os.environ, "KINETO_LOG_LEVEL": "6"}, check=False)
    assert run.returncode


def test_sessions_inside_of_a_scope() -> None:
    """A session sees the beginning; it ends inside, and the next one is there when the scope ends."""
    sessions = [Session()]

    def end() -> None:
        work()
        sessions[-1].end()

    assert damaged(end, lambda: sessions.append(Session())) == []
    sessions[-1].end()
    assert not torch._C._autograd._profiler_enabled()


def test_marks_are_not_memory() -> None:
    session = Session()
    start = session.mark({})
    kept = torch.ones(1000)
    stop = session.mark({})
    session.end()
    assert session.between(start, stop, {}) == (4000, 4000)
    assert [e.mark for e in session.events if e.mark is not None] == [0, 1, 2]
    assert sum(e.bytes for e in session.events) == 4000
    del kept


def test_the_rolling_recording_stays_out_of_scopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "SECONDS", 0.0)
    weight = torch.ones(10, requires_grad=True)
    with memplan.on_oom(tmp_path / "oom.json"):

        def backward() -> None:
            (weight * 2).sum().backward()

        assert damaged(backward, backward) == []
        assert recording()
        for _ in range(TRIES):
            assert damaged(give_way, backward, tries=1) == []
            assert not recording()
            backward()  # it leaves a step to others
            assert not recording()
            backward()
            assert recording()


def test_a_session_where_the_rolling_recording_was_cut_short(tmp_path: Path) -> None:
    """It cannot measure there; the next one can."""
    weight = torch.ones(10, requires_grad=True)
    sessions = list[Session]()

    def start() -> None:
        sessions.append(Session())

    with memplan.on_oom(tmp_path / "oom.json"):
        for _ in range(TRIES):
            assert recording()
            assert damaged(give_way, start, tries=1) == []
            assert sessions[-1].log is None
            sessions[-1].end()
            (weight * 2).sum().backward()
            assert damaged(give_way, start, tries=1) == []
            assert sessions[-1].log is not None
            (weight * 2).sum().backward()
            assert sessions[-1].events


def recording() -> bool:
    return torch._C._autograd._profiler_enabled()


def give_way() -> None:
    work()
    interrupt()
