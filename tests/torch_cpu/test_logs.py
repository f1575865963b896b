"""What torch's own switches show of memplan: TORCH_LOGS its log, TORCH_TRACE its plans. Both are read when torch is
imported, so each test is a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.ir import Plan
from memplan.serialize import from_json

SCRIPT = """
import torch
from memplan.backend import memplan_backend
net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
def loss(x):
    y = net(x)
    torch._dynamo.graph_break()
    return y.mean()
step = torch.compile(loss, backend=memplan_backend, options={"inner": "eager", "budget": "1MB"})
for rows in (4, 8, 12):
    step(torch.randn(rows, 8)).backward()
import memplan.grpo  # torch has imported memplan's packages to find their names, while it was imported itself
memplan.grpo.GRPOConfig()
"""
ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^([VIWE])\d{4} .*\] (.*)$")  # torch's format: the level and the date, then the message


def run(script: str = SCRIPT, **environment: str) -> str:
    """What the script writes to stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_", "MEMPLAN_"))}
    given = {k: v for k, v in environment.items() if v}
    given |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # Dynamo's own, and the allocator's
    done = subprocess.run([sys.executable, "-c", script], env=clean | given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines(text: str) -> set[tuple[str, str]]:
    found = [LINE.match(line) for line in text.splitlines()]
    assert all(found), text
    return {(line[1], line[2]) for line in found if line}


@pytest.mark.parametrize(
    ("setting", "levels"), [("+memplan", "VIW"), ("", "W"), pytest.param("-memplan", "", marks=pytest.mark.slow)]
)
def test_torch_logs(setting: str, levels: str, tmp_path: Path) -> None:
    """Debug lines, plans and warnings when asked for; warnings alone when not. Of a run that is traced too, the plans
    are in the trace.
    """
    traced = {"TORCH_TRACE": str(tmp_path)} if levels == "W" else {}
    seen = lines(run(TORCH_LOGS=setting, **traced))
    assert {level for level, _ in seen} == set(levels)
    assert any(level == "W" and "a graph break at" in message for level, message in seen) == ("W" in levels)
    assert any(level == "I" and "fits: peak" in message for level, message in seen) == ("I" in levels)
    if not traced:
        return
    (log,) = tmp_path.iterdir()
    metadata, payload = re.findall(r"^V.*\] (\{.*\"memplan_plan\".*\})\n((?:\t.*\n)+)", log.read_text(), re.M)[-1]
    assert '"encoding": "json"' in metadata
    plan = from_json(payload.replace("\t", ""), Plan)
    assert plan.fits and plan.budget.bytes == 10**6 and len(plan.step.graphs) == 4  # of both graphs: the last adopted
