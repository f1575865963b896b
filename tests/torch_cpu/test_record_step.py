"""memplan record-step: the second run of a step, with its lines; the first has left its gradients."""

from pathlib import Path

import pytest

from memplan.cli import main
from memplan.ir import Timeline
from memplan.serialize import from_json

STEP = """
import torch

def make_step():
    weight = torch.nn.Parameter(torch.ones(256, 1024))

    def step(x):
        loss = torch.sin(x @ weight).sum()
        return loss

    return step, torch.ones(64, 256)

def make_whole():
    step, x = make_step()

    def whole(x):
        loss = step(x)
        loss.backward()
        return loss.detach()

    return whole, x

def make_returning():
    step, x = make_step()

    def returning(x):
        loss = step(x)
        loss.backward()
        return loss

    return returning, x

def make_broken():
    return (lambda x: 1 / 0), None
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(STEP)
    return str(tmp_path / "train.py")


@pytest.mark.parametrize("make", ["make_step", "make_whole", "make_returning"])
def test_record_step(make: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    assert main(["record-step", f"{script}:{make}", "--device", "cpu", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    timeline = Timeline.load(out)
    assert text.startswith(f"{script}:{make}, recorded on cpu: measured, {len(timeline.moments)} moments")
    assert dict(timeline.base)["gradient"] >= 2**20  # the first step's: the second adds to it
    assert {"forward", "backward"} <= {m.phase for m in timeline.moments}
    sine = next(b for b in timeline.blocks if b.name == "aten::sin")
    assert sine.source.endswith(
        f"train.py:{1 + STEP.split(chr(10)).index('        loss = torch.sin(x @ weight).sum()')} in step"
    )


def test_as_json(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record-step", f"{script}:make_step", "--device", "cpu", "--json"]) == 0
    assert from_json(capsys.readouterr().out, Timeline).origin == "measured"


def test_bad_input(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["-o", "step.txt"], ["-o", str(tmp_path), "-f"], ["--device", "meta"], ["--device", "gpu"]):
        assert main(["record-step", f"{script}:make_step", *more]) == 2
        assert capsys.readouterr().err.startswith("memplan: cannot")
    (tmp_path / "step.json").write_text("mine")
    assert main(["record-step", f"{script}:make_broken", "-o", str(tmp_path / "step.json")]) == 2  # before it runs
    assert "exists already: give -f" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # the step's own errors are the user's to see
        main(["record-step", f"{script}:make_broken"])
