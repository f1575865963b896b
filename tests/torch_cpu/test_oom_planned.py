"""Out of memory in a planned step: the note says what was planned where it happened, without any recording.

Real failures come from a limit on the process's addresses; where one op has to be the one that fails, it says so.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memplan
from memplan import oom, planned_oom
from memplan.backend import memplan_backend
from memplan.ir import Budget, Decisions, Machine, Plan, Recompute, Step
from memplan.units import human

ROOT = Path(__file__).parents[2]
ACTIVATION, SENTINEL = 128 * 128 * 4, 999_983  # bytes

SCRIPT = """
import resource, sys
import torch
import memplan

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(1024, 8192, bias=False), torch.nn.Linear(8192, 1024, bias=False)

    def forward(self, x):
        y = self.inner(x)
        return self.outer(torch.sin(y))  # SINE

model = torch.nn.Sequential(Layer())  # 34 MB each
x = torch.ones(2048, 1024)  # 8 MB; what is in between has 67 MB

def step(x):
    return model(x).sum()

inner, phase, out = sys.argv[1:]
run = torch.compile(step, backend="memplan", options={"inner": inner, "budget": "4GB", "out": out})
for _ in range(2):
    run(x).backward()
model.zero_grad()

def limit(room):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

if phase == "forward":
    limit(100_000_000)
    run(x)
else:
    loss = run(x)
    limit(25_000_000)
    loss.backward()
"""


@pytest.mark.parametrize(
    ("inner", "phase"),
    [
        ("eager", "forward"),
        pytest.param("eager", "backward", marks=pytest.mark.slow),
        pytest.param("inductor", "forward", marks=pytest.mark.slow),
        ("inductor", "backward"),
    ],
)
def test_a_step_under_a_limit(inner: str, phase: str, tmp_path: Path) -> None:
    script, out = tmp_path / "train.py", tmp_path / "plan.json"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), inner, phase, str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.PIPE)
    assert done.returncode == 1, done.stderr
    error, note = done.stderr.rsplit(oom.PLANNED, 1)
    assert error.rstrip().endswith(" bytes. Error code 12 (Cannot allocate memory)") and "DefaultCPUAllocator" in error
    assert re.match(r": asked for (67.11|33.55) MB where ", note) and f"in {phase}" in note.splitlines()[1]
    plan = Plan.load(tmp_path / "plan.oom.json")
    assert f"planned peak {human(plan.peak)} at " in note and "budget 4.000 GB, policy optimal" in note
    assert note.rstrip().endswith(f"the plan's timeline: {tmp_path / 'plan.oom.json'}")
    assert "out of memory" in plan.timeline.title and f"{oom.PLANNED}: asked for " in plan.timeline.notes[-1]
    free = float(note.split("where ")[1].split(" MB was free")[0])
    assert free < 67.2
    if inner == "eager":
        line = 1 + SCRIPT.split("\n").index("        return self.outer(torch.sin(y))  # SINE")
        assert f"train.py:{line} in forward" in note
    fits = int(note.split('"budget": "')[1].split('B"')[0])
    assert plan.timeline.base_bytes < fits < plan.peak


# ---- an op that fails when it is told to ----------------------------------------------------------------------------

_countdown = 0
_raised: list[BaseException] = []
_error: Callable[[], Exception] = RuntimeError


def out_of_memory() -> RuntimeError:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 65536 bytes.")


@torch.library.custom_op("memplan_tests::fragile", mutates_args=())
def fragile(x: torch.Tensor) -> torch.Tensor:
    global _countdown
    _countdown -= 1
    if _countdown == 0:
        _raised.append(_error())
        raise _raised[-1]
    return x.clone()


fragile.register_fake(torch.empty_like)
fragile.register_autograd(lambda _ctx, grad: fragile(grad))


def failing(run: Callable[[], Any], call: int, error: Callable[[], Exception] = out_of_memory) -> BaseException:
    """Run it, with that call of the op failing. Returns what left it, which is what was raised."""
    global _countdown, _error
    _countdown, _error = call, error
    with pytest.raises(BaseException) as caught:
        run()
    _countdown = 0
    assert caught.value is _raised[-1]
    return caught.value


def note_of(error: BaseException) -> str:
    (note,) = error.__notes__
    assert isinstance(note, str)
    return note


@dataclass(frozen=True)
class Again:
    """All that may run again does."""

    name: str = "again"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return dict.fromkeys(step.read_in_backward, Recompute())


class Net(nn.Module):
    """Activations of 64 KiB, and the op in the middle."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(self.before(x))
        if self.breaks:
            torch._dynamo.graph_break()
        x = torch.cos(fragile(x))
        return self.after(x).square().mean()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    global _countdown
    _countdown = 0
    _raised.clear()


def compiled(net: nn.Module, **options: Any) -> Callable[[], None]:
    step = torch.compile(net, backend=memplan_backend, options={"budget": "1GB", "inner": "eager", **options})
    x = torch.ones(128, 128)

    def run() -> None:
        step(x).backward()

    for _ in range(3):
        run()
    return run


@pytest.mark.parametrize(("call", "name", "phase"), [(1, "", "forward"), (2, "", "backward"), (3, "_1", "backward")])
def test_what_is_planned_there_is_what_is_there(call: int, name: str, phase: str, tmp_path: Path) -> None:
    """To the byte: in forward, and in backward, where the op runs again first, and then for its gradient."""
    run = compiled(Net(), policy=Again(), out=str(tmp_path / "plan.json"))

    def error() -> Exception:
        torch.empty(SENTINEL, dtype=torch.uint8)
        return out_of_memory()

    with memplan.record("cpu") as seen:
        note = note_of(failing(run, call, error)).splitlines()
    timeline = Plan.load(tmp_path / "plan.oom.json").timeline
    at = next(i for i, m in enumerate(timeline.moments) if (m.name, m.phase) == (f"fragile{name}", phase))
    assert note[1].startswith(f"  planned at fragile{name} in {phase}: {human(timeline.totals[at])}: parameter ")
    (sentinel,) = (block for block in seen.timeline.blocks if block.bytes == SENTINEL)
    there = seen.timeline.totals[sentinel.start] - seen.timeline.base_bytes - SENTINEL
    assert there + ACTIVATION == pytest.approx(timeline.totals[at] - timeline.base_bytes, abs=100)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_generated_code_that_fails_in_an_op(phase: str) -> None:
    run = compiled(Net(), inner="inductor")
    note = note_of(failing(run, 1 if phase == "forward" else 2))
    assert f"  planned in {phase}, at most at event " in note  # of its buffers' names none is the op's


@pytest.mark.parametrize("call", [1, 2])
def test_one_graph_with_its_backward_inside(call: int) -> None:
    net, x = Net(), torch.ones(128, 128)

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = net(x)
        loss.backward()
        return loss.detach()

    run = memplan.compile(step, budget="1GB", inner="eager", fullgraph=True)
    run(x)
    note = note_of(failing(lambda: run(x), call))
    assert f"  planned at fragile{'_1' * (call == 2)} in {('forward', 'backward')[call - 1]}: " in note


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo asks
@pytest.mark.parametrize("call", [1, 2])
def test_several_graphs_are_one_step(call: int, tmp_path: Path) -> None:
    """What the first graph keeps is among what is planned where the second fails."""
    run = compiled(Net(breaks=True), out=str(tmp_path / "plan.json"), policy="save-all")
    whole = Plan.load(tmp_path / "plan.json")
    note = note_of(failing(run, call))
    assert f"  planned at fragile{'_1' * (call == 2)} in {('forward', 'backward')[call - 1]}: " in note
    assert " before " in note and ("2 graphs" in Plan.load(tmp_path / "plan.oom.json").timeline.title)
    if call == 2:
        assert f"planned peak {human(whole.peak)} at " in note


def test_other_errors_are_left_alone() -> None:
    run = compiled(Net())
    for call in (1, 2):
        error = failing(run, call, lambda: ValueError("shapes do not match"))
        assert not hasattr(error, "__notes__")
    run()


def test_a_failing_report_masks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    run = compiled(Net(), out=str(tmp_path / "gone" / "plan.json"))
    (tmp_path / "gone" / "plan.json").unlink()
    (tmp_path / "gone").rmdir()
    assert "\n  no timeline: MemplanError: cannot write" in note_of(failing(run, 1))
    monkeypatch.setattr("memplan.passes.dispatch.located", lambda *_: 1 / 0)
    assert note_of(failing(run, 2)).endswith("no more is known: ZeroDivisionError: division by zero")
    monkeypatch.setattr(planned_oom, "bytes_asked", lambda _: 1 / 0)
    assert not hasattr(failing(run, 1), "__notes__")


def test_a_recording_says_more(tmp_path: Path) -> None:
    """One note, that of what was measured; where nothing could be, that of what was planned."""
    run = compiled(Net())
    with pytest.raises(RuntimeError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        failing(run, 1)
        raise _raised[-1]
    note = note_of(caught.value)
    assert not note.startswith(oom.PLANNED) and "the timeline up to here" in note
    with pytest.raises(RuntimeError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        with memplan.record("cpu"):  # which on_oom gives way to, up to the next backward
            pass
        failing(run, 1)
        raise _raised[-1]
    assert note_of(caught.value).startswith(oom.PLANNED)


def test_no_profiler_runs_for_it() -> None:
    seen: list[bool] = []

    def error() -> RuntimeError:
        seen.append(torch._C._autograd._profiler_enabled())
        return out_of_memory()

    run = compiled(Net())
    for call in (1, 2):
        assert note_of(failing(run, call, error)).startswith(oom.PLANNED)
    assert seen == [False, False]
