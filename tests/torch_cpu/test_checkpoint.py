"""Checkpoints: a run goes on from one bit for bit, and nothing half-written or foreign is ever loaded."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.grpo import load_checkpoint, save_checkpoint

MADE_OF = {"task": "lcm", "rate": 1e-3}


def run(width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save(path: Path, model: nn.Module, optimizer: Any, number: int, **how: Any) -> None:
    save_checkpoint(path, step=number, model=model, optimizer=optimizer, made_of=MADE_OF, **how)


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run()
    assert load_checkpoint(path, model=model, optimizer=optimizer, made_of=MADE_OF) == (0, None)
    for number in range(6):
        step(model, optimizer)
        if number == 2:
            save(path, model, optimizer, 3, kept={"rewards": [0.5, 0.25]})
    again, its = run()
    torch.manual_seed(7)
    assert load_checkpoint(path, model=again, optimizer=its, made_of=MADE_OF) == (3, {"rewards": [0.5, 0.25]})
    for _ in range(3):
        step(again, its)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("made_of", "width", "says"),
    [
        (MADE_OF | {"rate": 0.01}, 8, "is of a run with rate=0.001, and this one has rate=0.01: go on with the same"),
        ({"task": "lcm"}, 8, "is of a run with rate=0.001, and this one has rate='not given'"),
        (MADE_OF | {"seed": 3}, 8, "is of a run with seed='not given', and this one has seed=3"),
        (MADE_OF, 9, r"is of another model: 0.weight is float32 \[8, 4\] there and float32 \[9, 4\] here"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path: Path, made_of: Any, width: int, says: str) -> None:
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run()
    step(model, optimizer)
    save(path, model, optimizer, 1)
    other, its = run(width)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(MemplanError, match=says):
        load_checkpoint(path, model=other, optimizer=its, made_of=made_of)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True)) and not its.state


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run()
    save(path, model, optimizer, 1)
    groups = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    for other, says in (
        (torch.optim.SGD(model.parameters()), "is of a run with optimizer='AdamW', and this one has optimizer='SGD'"),
        (groups, "is of an optimizer with other parameters, or in another order"),
        (torch.optim.AdamW(list(model.parameters())[::-1]), "is of an optimizer with other parameters, or in another"),
    ):
        with pytest.raises(MemplanError, match=says):
            load_checkpoint(path, model=model, optimizer=other, made_of=MADE_OF)


@pytest.mark.parametrize(
    "kept", [Path("x"), [np.float64(0.5)], {"a": np.zeros(2)}, print], ids=("path", "number", "array", "function")
)
def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path, kept: Any) -> None:
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run()
    save(path, model, optimizer, 1)
    before = path.read_bytes()
    with pytest.raises(MemplanError, match=r"cannot write the checkpoint of step 2 .*; the checkpoint that is there, "):
        save(path, model, optimizer, 2, kept=kept)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run()
    save(path, model, optimizer, 1)
    whole = path.read_bytes()
    for content, says in (
        (whole[: len(whole) // 2], "is no checkpoint, or was cut short"),
        (b"", "is no checkpoint, or was cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(MemplanError, match=says):
            load_checkpoint(path, model=model, optimizer=optimizer, made_of=MADE_OF)
    path.write_bytes(whole[:200] + bytes(200) + whole[400:])
    with pytest.raises(MemplanError, match="is damaged, or holds other objects"):
        load_checkpoint(path, model=model, optimizer=optimizer, made_of=MADE_OF)
    torch.save({"a": 1}, path)
    with pytest.raises(MemplanError, match="was not written by save_checkpoint"):
        load_checkpoint(path, model=model, optimizer=optimizer, made_of=MADE_OF)


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the write fails at the same call."""
    path, (model, optimizer) = tmp_path / "checkpoint.pt", run(4096)
    save(path, model, optimizer, 1)
    step(model, optimizer)  # the optimizer's states make the next one larger
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        says = r"cannot write the checkpoint of step 2 .*: File too large; the checkpoint that is there, .* is whole"
        with pytest.raises(MemplanError, match=says):
            save(path, model, optimizer, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


WRITER = """
import sys, torch
from memplan.grpo import save_checkpoint
model = torch.nn.Linear(512, 512)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
number = 0
while True:
    number += 1
    torch.nn.init.constant_(model.weight, number)
    save_checkpoint(sys.argv[1], step=number, model=model, optimizer=optimizer, made_of={})
    print(number, flush=True)
"""


def test_killed_while_saving_there_is_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    model = nn.Linear(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(20):
            said = int(writer.stdout.readline())
        writer.kill()  # it does nothing but save
    number, _ = load_checkpoint(path, model=model, optimizer=optimizer, made_of={})
    assert number >= said and (model.weight == number).all()
