"""memplan.largest: the size it names fits and the next one does not, by plans made at these sizes alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import memplan
from memplan.api import find_largest
from memplan.cli import main
from memplan.errors import DoesNotFit, MemplanError
from memplan.passes.largest import border
from tests.cases import cases
from tests.models import CASES, Case, Rollout

LLAMA, UNET = CASES[0], CASES[-1]


def rollout(batch: int, tokens: int) -> Rollout:
    return Rollout(torch.zeros(batch, tokens, dtype=torch.int64), torch.zeros(batch), torch.zeros(batch, tokens - 1))


def needed(step: Callable, batch: object, **options) -> int:
    """The smallest budget for one batch."""
    with pytest.raises(DoesNotFit) as refused:
        memplan.plan(step, batch, budget=1, **options)
    return refused.value.smallest


@pytest.mark.parametrize(
    "machine", [pytest.param(None, id="measured"), pytest.param("rtx4090", id="rtx4090", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("dimension", ["tokens", pytest.param("batch", marks=pytest.mark.slow)])
def test_it_fits_and_the_next_does_not(dimension: str, machine: str | None) -> None:
    sample, given = LLAMA.make(), {"machine": machine, "inner": "eager"}
    sizes = {"batch": 2, "tokens": 16}
    budget = needed(sample.step, rollout(5, 29), **given)
    size = memplan.largest(sample.step, sample.batch, dimension, budget=budget, **given)
    assert size > sizes[dimension]
    assert memplan.plan(sample.step, rollout(**sizes | {dimension: size}), budget=budget, **given).fits
    with pytest.raises(DoesNotFit):
        memplan.plan(sample.step, rollout(**sizes | {dimension: size + 1}), budget=budget, **given)


@pytest.mark.parametrize("case", cases("llama", "gpt_neox"))
def test_a_budget_that_was_found_for_a_size_gives_that_size(case: Case) -> None:
    sample, given = case.make(), {"machine": "rtx4090", "inner": "eager"}
    budget = needed(sample.step, rollout(2, 11), **given)
    assert memplan.largest(sample.step, sample.batch, "tokens", budget=budget, **given) == 11


def test_tiles_count() -> None:
    """The open trace of this step is not tiled: plans at single sizes find the end all the same."""
    inner, head = nn.Linear(16, 16), nn.Linear(16, 2048)

    def step(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, ids = batch
        return nn.functional.cross_entropy(head(inner(x)).flatten(0, 1), ids.flatten())

    def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, tokens, 16), torch.zeros(2, tokens, dtype=torch.int64)

    given = {"machine": "rtx4090", "inner": "eager", "tiles": 16}
    budget = needed(step, batch(16), machine="rtx4090", inner="eager")
    size = memplan.largest(step, batch(16), "tokens", budget=budget, **given)
    assert size > 32
    assert memplan.plan(step, batch(size), budget=budget, **given).fits
    with pytest.raises(DoesNotFit):
        memplan.plan(step, batch(size + 1), budget=budget, **given)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def test_sizes_that_the_step_does_not_take() -> None:
    """Blocks of 8 tokens, 40 at most: a multiple of 8, however small the budget, and no more than 40, however large."""
    net, x = Net(), torch.randn(2, 16, 8)
    seen: list[int] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        seen.append(int(x.stride(0)) // 8 if isinstance(x.shape[1], int) else 0)
        return net(x.unflatten(1, (-1, 8)).flatten(0, 1) if x.shape[1] <= 40 else x[:, :, :7])

    budget = needed(step, torch.randn(2, 24, 8), inner="eager")
    for allowed, size in ((budget, 24), (budget - 1, 16), ("1GB", 40)):
        assert memplan.largest(step, x, "tokens", budget=allowed, inner="eager") == size
    assert {n % 8 for n in seen} == {0}


def test_a_model_that_fixes_the_size() -> None:
    sample, net = UNET.make(), Net()
    with pytest.raises(MemplanError, match=r"^the step takes tokens of 3 alone \(Eq\(\w+, 3\) .*:\d+ in conv"):
        memplan.largest(sample.step, sample.batch, "tokens")

    def step(x: torch.Tensor) -> torch.Tensor:
        return sum((net(row) for row in x), torch.zeros(()))

    with pytest.raises(MemplanError, match=r"batch of 5 alone \(Eq\(\w+, 5\)"):
        memplan.largest(step, torch.randn(5, 8), "batch")


def test_bad_input() -> None:
    net = Net()
    with pytest.raises(MemplanError, match=r"no dimension 'token': there are batch and tokens.*did you mean 'tokens'"):
        memplan.largest(net, torch.randn(4, 8), "token")
    with pytest.raises(MemplanError, match="no tensor of the batch has tokens, a dimension 1 of at least 2"):
        memplan.largest(net, torch.randn(4, 1), "tokens")
    with pytest.raises(KeyError, match="mine"):  # the step's own error is what is raised
        memplan.largest(lambda x: {}["mine"], torch.randn(4, 8), "batch")


def test_each_size_is_told_before_it_is_planned() -> None:
    seen: list[int] = []
    budget = needed(Net(), torch.randn(9, 8), inner="eager")
    found = find_largest(Net(), torch.randn(4, 8), "batch", budget=budget, inner="eager", tried=seen.append)
    assert found.size == 9 and {4, 9, 10} <= set(seen)


def test_nothing_fits() -> None:
    with pytest.raises(DoesNotFit, match="no batch fit, not even 2: the step does not fit 10 B") as refused:
        memplan.largest(Net(), torch.randn(4, 8), "batch", budget=10, inner="eager")
    assert refused.value.smallest == needed(Net(), torch.randn(2, 8), inner="eager")


def test_where_a_border_is() -> None:
    for last in range(0, 70):
        for start in (1, 2, 33, 64, 100):
            for stride in (1, 7):
                assert border(lambda n, last=last: n <= last, start, stride) == last
    asked: list[int] = []
    assert border(lambda n: not asked.append(n) and n <= 10**9, 1) == 10**9
    assert len(asked) < 70


SCRIPT = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
def make_step():
    return (lambda x: net(x).square().mean()), torch.randn(4, 6, 8)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return f"{path}:make_step"


def test_the_command(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", script, "--largest", "batch", "--machine", "rtx4090", "--budget"]
    assert main([*command, "520MB", "-o", str(tmp_path / "plan.json")]) == 0
    first, *more = capsys.readouterr().out.splitlines()
    assert more == []
    size = int(first.split(": ")[1].split(" ")[0].replace(",", ""))
    assert first.startswith(f"largest batch that fits 520.0 MB: {size:,} (planned ")
    assert f"; {size + 1:,} needs " in first
    assert memplan.Plan.load(tmp_path / "plan.json").fits
    assert main([*command, "520MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dimension"], found["largest"], found["next"]) == ("batch", size, size + 1)
    assert found["planned"] <= found["budget"] == 520 * 10**6 < found["next_needs"]
    assert main([*command, "1B"]) == 3
    assert capsys.readouterr().err.startswith("memplan: no batch fit, not even 2: ")
