"""A machine file is measured here, and plans take it; sizes and times are small, so that figures are only plausible."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import memplan
from memplan.calibrate import Measured, calibrate
from memplan.cli import main
from memplan.errors import MemplanError
from memplan.ir import Step
from memplan.machines import machine
from tests.models import ONE_LAYER

SMALL = 0.004


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def measured(told: list[str]) -> Measured:
    before = torch.get_rng_state()
    found = calibrate("cpu", progress=told.append, scale=SMALL)
    assert torch.equal(before, torch.get_rng_state())
    return found


def test_everything_is_measured(measured: Measured, told: list[str]) -> None:
    found = measured.machine
    assert {"float32", "float64", "bfloat16"} <= set(found.rates)
    assert {"float32", "bfloat16"} <= set(found.attention_rates)
    rates = [*found.rates.values(), *found.attention_rates.values()]
    for rate in (*rates, found.bandwidth, found.host_bandwidth, found.disk_bandwidth):
        assert 1e5 < rate < 1e16
    assert 0 <= found.contention < math.inf
    assert found.unified and found.device == "cpu" and found.memory_bytes > 2**30
    assert dict(found.workspace_rules)["aten._scaled_dot_product_flash_attention_for_cpu_backward.default"] > 0.5
    assert found.disk_bandwidth <= min(value for what, value, _ in measured.figures if what.startswith("disk"))
    assert len(told) == len(set(told)) == 7
    assert all(what in str(measured) for what, _, _ in measured.figures)


def moved(step: Step) -> int:
    """Bytes that its ops are priced by."""
    return sum(op.traffic if op.priced is None else op.priced for op in step.ops)


def test_a_plan_takes_the_file(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    measured.save(path)
    assert machine(path) == measured.machine
    assert {row["what"] for row in json.loads(path.read_text())["measured"]["figures"]} >= {"pointwise", "disk, read"}
    sample = ONE_LAYER()
    fused, alone = (
        memplan.plan(sample.step, sample.batch, machine=str(path), cost=cost) for cost in (None, "roofline-v1")
    )
    assert fused.machine == measured.machine
    assert (fused.step.cost, alone.step.cost) == ("fused", "roofline-v1")
    assert " (fused); policy optimal on cpu measured, inner inductor" in str(fused)
    assert fused.base_seconds > 0 and alone.base_seconds > 0  # which is larger hangs on how fast the machine computes
    assert 0 < moved(fused.step) < moved(alone.step)


def test_from_the_shell(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked = tmp_path / "mine.json", dict[str, Any]()

    def known(device: str | None, **given: Any) -> Measured:
        asked.update(given, device=device)
        return measured

    monkeypatch.setattr("memplan.calibrate.calibrate", known)
    assert main(["calibrate", "--device", "cpu", "--name", "mine", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{measured}\nwritten: {path}\n"
    assert machine(path) == measured.machine
    assert (asked["device"], asked["name"], asked["scale"]) == ("cpu", "mine", 1.0)


@pytest.mark.parametrize("device", ["tpu", "cuda:7"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(MemplanError, match=f"cannot calibrate '{device}': give 'cpu'"):
        calibrate(device)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(MemplanError, match="a scale of"):
        calibrate("cpu", scale=scale)


def test_a_recording_is_set_against_the_prediction(measured: Measured) -> None:
    sample = ONE_LAYER()
    plan = memplan.plan(sample.step, sample.batch, machine=measured.machine, inner="eager", policy="save-all")
    assert plan.step.cost == "roofline-v1"
    with memplan.record("cpu") as seen:
        sample.step(sample.batch).backward()
    found = memplan.compare(plan, seen.timeline)
    assert found.seconds_a == plan.timeline.seconds > 0
    assert found.seconds_b == seen.timeline.seconds > 0
    assert "\ntime  " in str(found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda() -> None:
    found = calibrate("cuda", scale=0.05)
    assert found.machine.device == "cuda" and not found.machine.rates["float32"] <= 1e11
    assert {"copies out", "copies back", "copies out, pageable"} <= {what for what, _, _ in found.figures}
