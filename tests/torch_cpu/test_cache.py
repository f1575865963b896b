"""A warm cache across processes: code is found, plans are made and checked anew, and an edited policy is a new plan."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

POLICY = """
from memplan import Keep, Recompute

def mine(step, budget, machine):
    return {{t: {choice} for t in step.read_in_backward}}
"""
STEP = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import memplan
from mine import mine

torch.manual_seed(0)
net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 1))

def loss(x):
    return net(x).square().mean()

def whole(x):
    out = loss(x)
    out.backward()
    return out.detach()

options = {"policy": mine, "out": "plan.json"}
if sys.argv[1] == "whole":
    memplan.compile(whole, fullgraph=True, **options)(torch.ones(64, 32))
else:
    torch.compile(loss, backend="memplan", options=options)(torch.ones(64, 32)).backward()
found = counters["inductor"]
plan = memplan.Plan.load("plan.json")
print(json.dumps({
    "hits": found["fxgraph_cache_hit"], "misses": found["fxgraph_cache_miss"], "peak": plan.peak,
    "again": sum(run.again for run in plan.backward), "moments": len(plan.timeline.moments),
}))
"""


def run(folder: Path, how: str) -> dict[str, Any]:
    """The step in a process of its own, with a cache in the folder."""
    (folder / "plan.json").unlink(missing_ok=True)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error::UserWarning:memplan", str(folder / "step.py"), how]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("how", [pytest.param("pair", marks=pytest.mark.slow), "whole"])
def test_two_processes_and_an_edited_policy(tmp_path: Path, how: str) -> None:
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "mine.py").write_text(POLICY.format(choice="Keep()"))
    cold, warm = run(tmp_path, how), run(tmp_path, how)
    assert cold["misses"] > 0 and cold["hits"] == 0
    assert warm["hits"] > 0 and warm["misses"] == 0
    assert [warm[k] for k in ("peak", "again", "moments")] == [cold[k] for k in ("peak", "again", "moments")]
    (tmp_path / "mine.py").write_text(POLICY.format(choice="Recompute()"))
    edited = run(tmp_path, how)
    assert cold["again"] == 0 < edited["again"]
