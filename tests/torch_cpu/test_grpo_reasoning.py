"""The run that learns, at a small size: planned and not the same bits, killed and gone on the same bits, inside."""

import json
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import grpo_reasoning
from examples.grpo_reasoning import Run
from memplan.errors import MemplanError

ROOT = Path(__file__).parent.parent.parent
SMALL = Run(steps=6, prompts=8, group=16, words=80, every=2)


RUN = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from examples import grpo_reasoning
grpo_reasoning.BEFORE = (1, 1)
run = grpo_reasoning.Run(*json.loads(sys.argv[2]))
curves = grpo_reasoning.main(Path(sys.argv[1]), run)
curves = {name: [asdict(seen) for seen in curve] for name, curve in curves.items()}
print(json.dumps({"budget": grpo_reasoning.unplanned_peak(run) // 3} | curves))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_few_steps_before() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_reasoning, "BEFORE", (1, 1))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """In a process of its own, whose memory is nobody else's: the folder, and what came out."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(folder), json.dumps(astuple(SMALL))]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder, json.loads(ran.stdout.splitlines()[-1])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_planned_and_unplanned_are_the_same_bits(done: tuple[Path, Any]) -> None:
    folder, curves = done
    planned, unplanned = ([s["reward"] for s in curves[name]] for name in ("planned", "unplanned"))
    assert len(planned) == SMALL.steps and planned == unplanned
    for name, value in weights(folder / "planned").items():
        assert torch.equal(value, weights(folder / "unplanned")[name])
    assert (folder / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_every_step_is_inside_a_third(done: tuple[Path, Any]) -> None:
    _, curves = done
    assert max(s["peak"] for s in curves["planned"]) <= curves["budget"]
    assert min(s["peak"] for s in curves["unplanned"]) > 2.9 * curves["budget"]


CHILD = """
import sys
from dataclasses import astuple
from pathlib import Path
import torch
from examples import grpo_reasoning
torch.set_num_threads(1)
grpo_reasoning.BEFORE = (1, 1)
for seen in grpo_reasoning.train(grpo_reasoning.Run(*map(eval, sys.argv[3:])), Path(sys.argv[1]), int(sys.argv[2])):
    print(seen.reward, flush=True)
"""


def test_killed_and_gone_on_it_ends_the_same(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, curves = done
    budget = curves["budget"]
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(budget), *map(str, astuple(SMALL))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        for _ in range(3):  # one step behind a checkpoint
            child.stdout.readline()
        child.kill()
    left = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < left["step"] < SMALL.steps
    again = list(grpo_reasoning.train(SMALL, tmp_path, budget))
    assert [s.reward for s in again] == [s["reward"] for s in curves["planned"]]
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, weights(folder / "planned")[name])


def test_another_run_does_not_go_on(done: tuple[Path, Any]) -> None:
    folder, _ = done
    for change, says in (({"rate": 1e-3}, "rate=0.0003, and this one has rate=0.001"), ({"seed": 1}, "has seed=1")):
        with pytest.raises(MemplanError, match=says):
            next(grpo_reasoning.train(replace(SMALL, **change), folder / "unplanned", None))


def test_the_figures_are_those_that_were_measured() -> None:
    found = json.loads((ROOT / "benchmarks/results/grpo_reasoning.json").read_text())
    text = (ROOT / "README.md").read_text()
    for row in found["seeds"]:
        planned, unplanned = row["planned"], row["unplanned"]
        assert row["same"] and planned["first"] < 0.2 and planned["last"] > 0.6 and planned["over"] <= 1
        says = f"| {row['seed']} | {planned['first']:.2f} | {planned['last']:.2f} | {planned['peak'] / 1e6:.1f} MB |"
        assert f"{says} {unplanned['peak'] / 1e6:.1f} MB |" in text
    assert found["killed"]["same"] and f"Killed {found['killed']['kills']} times at random moments" in text
