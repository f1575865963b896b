"""Out of memory, forced by a limit on the process's addresses: the report is there, and the error is the one raised."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo import convert_frame
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler

import memplan
from memplan import oom
from memplan.errors import MemplanError
from memplan.ir import Timeline
from memplan.runtime import recorder, rolling
from memplan.units import parse_bytes

ROOT = Path(__file__).parents[2]
MB = 10**6
ROOM = {"inductor": 180 * MB, "memplan": 200 * MB}  # enough for the report alone

# The limit comes after a first step, so that compilers have done their work and each failure is the step's own.
SCRIPT = """
import resource, sys
import torch
import memplan

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(1024, 1024, bias=False)

    def forward(self, x):
        y = self.inner(x)
        return torch.sin(y)  # SINE

model = torch.nn.Sequential(Layer(), Layer())
x = torch.ones(16384, 1024)  # 67 MB, as is each activation

def step(x):
    return model(x).sum()

how, path, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"inner": "eager", "budget": "4GB"} if how == "memplan" else None
run = step if how == "eager" else torch.compile(step, backend=how, options=options)
raised = None

def train():
    global raised
    try:
        run(x).backward()
    except Exception as error:
        raised = error
        raise

for _ in range(3):
    train()
model.zero_grad()
with memplan.on_oom(path):  # what it imports, triton where that is installed, takes room of its own
    pass
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
try:
    with memplan.on_oom(path):
        for _ in range(3):
            train()
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert error is raised
    assert torch.autograd.backward.__module__ == "torch.autograd" and not torch._C._autograd._profiler_enabled()
    raise
"""


def run(tmp_path: Path, how: str, out: Path, room: int) -> str:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), how, str(out), str(room)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.PIPE)
    assert done.returncode == 1 and "AssertionError" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "how", ["eager", *(pytest.param(how, marks=pytest.mark.slow) for how in ("aot_eager", "inductor")), "memplan"]
)
def test_the_error_is_explained_and_raised(how: str, tmp_path: Path) -> None:
    out = tmp_path / "oom.json"
    said = run(tmp_path, how, out, ROOM.get(how, 235 * MB))
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 67108864 bytes" in said
    note = said[said.index("memplan: asked for 67.11 MB where ") :]
    assert "parameter 8.389 MB" in note and "input 67.11 MB" in note  # there before
    assert f"the timeline up to here: {out}" in note
    timeline = Timeline.load(out)
    large = [block for block in timeline.blocks if block.bytes > 60 * MB]
    assert large and all("train.py:" in block.source for block in large)
    assert f"{memplan.units.human(len(large) * 67_108_864)}  " in note or "  67.11 MB  " in note
    if how == "eager":
        line = 1 + SCRIPT.split("\n").index("        return torch.sin(y)  # SINE")
        assert f"train.py:{line} in forward" in note and (".*.inner" in note or ".0.inner" in note)
    free = float(note.split("where ")[1].split(" MB was free")[0])
    assert free < 67.2


def test_a_page(tmp_path: Path) -> None:
    said = run(tmp_path, "eager", tmp_path / "oom.html", 300 * MB)
    assert "the timeline up to here" in said
    assert "would fit here: memplan.plan" in (tmp_path / "oom.html").read_text()


@pytest.mark.parametrize("free", [999, 9_999_999, 22_885_999_999])
def test_the_budget_that_is_named_is_no_more_than_there_is(free: int) -> None:
    named = oom._describe(Timeline("t", "measured", (), ()), 1, free).split('budget="')[1].split('"')[0]
    assert 0.999 * free <= parse_bytes(named) <= free


def oom_error() -> RuntimeError:
    """torch's own: no machine has this much."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8)
    return caught.value


def test_a_failing_report_masks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = oom_error()
    with pytest.raises(RuntimeError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        torch.ones(1000)
        monkeypatch.setattr(oom.report, "save", lambda *_: 1 / 0)
        raise error
    assert caught.value is error
    assert "asked for 1125.9 TB" in error.__notes__[0] and "no timeline: ZeroDivisionError" in error.__notes__[0]


def test_errors_raised_from_it_are_explained_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        raise ValueError("while compiling") from oom_error()
    assert "memplan: asked for" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB", 20 << 20),
        ("CUDA out of memory. Tried to allocate 512 bytes. GPU 0 has", 512),
        ("CUDA out of memory.", 0),
    ],
)
def test_what_cuda_says(text: str, size: int) -> None:
    assert oom.bytes_asked(torch.OutOfMemoryError(text)) == size


def test_other_errors_and_none_leave_no_trace(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes do not match"), KeyboardInterrupt(), MemplanError("no")):
        with pytest.raises(type(error)) as caught, memplan.on_oom(tmp_path / "oom.json"):
            raise error
        assert caught.value is error and not hasattr(error, "__notes__")
    with memplan.on_oom(tmp_path / "oom.json"):
        torch.ones(3, requires_grad=True).sum().backward()
    assert [*tmp_path.iterdir()] == []
    with memplan.record("cpu"):  # the profiler is free again
        pass


def test_bad_input(tmp_path: Path) -> None:
    for path in ("oom.txt", tmp_path / "absent" / "oom.json"):
        with pytest.raises(MemplanError), memplan.on_oom(path):
            pass
    with torch.profiler.profile(), pytest.raises(MemplanError, match="profiler"), memplan.on_oom(tmp_path / "a.json"):
        pass


def test_recording_starts_anew_after_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "SECONDS", 0.0)
    weight = torch.ones(1000, requires_grad=True)
    with pytest.raises(RuntimeError), memplan.on_oom(tmp_path / "oom.json"):
        for _ in range(20):
            (weight * 2).sin().sum().backward()
        kept = weight * 3
        raise oom_error()
    blocks = [b for b in Timeline.load(tmp_path / "oom.json").blocks if b.bytes >= 4000]
    assert [b.name for b in blocks] == ["aten::mul"]  # 20 steps are forgotten
    del kept


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_what_is_compiled_inside_is_seen_from_its_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = []

    def record(*args: Any, **kwargs: Any) -> Any:
        callers.append([frame.filename for frame in traceback.extract_stack()])
        return recorder.record(*args, **kwargs)

    monkeypatch.setattr(rolling, "record", record)
    torch._dynamo.reset()
    weight = torch.ones(100, 1000, requires_grad=True)
    step = torch.compile(lambda x: (x * 2).sin().sum(), backend="aot_eager")
    with pytest.raises(RuntimeError), memplan.on_oom(tmp_path / "oom.json"):
        step(weight)
        raise oom_error()
    blocks = Timeline.load(tmp_path / "oom.json").blocks
    assert {"aten::mul", "aten::sin"} <= {b.name for b in blocks if b.bytes >= 400_000}
    assert len(blocks) < 50  # and nothing of the compiler's
    assert any("test_oom.py" in b.source for b in blocks)
    assert len(callers) == 2  # torch's profiler with Python's calls, started inside of Dynamo, corrupts the heap:
    assert not any(file == convert_frame.__file__ for files in callers for file in files)
    assert sys.getprofile() is None


def test_nothing_is_left_where_nothing_ran_after_compiling(tmp_path: Path) -> None:
    torch._dynamo.reset()
    with memplan.on_oom(tmp_path / "oom.json"):
        callback_handler.run_start_callbacks(CallbackArgs(CallbackTrigger.DYNAMO, "0"))
        callback_handler.run_end_callbacks(CallbackArgs(CallbackTrigger.DYNAMO, "0"))
    assert sys.getprofile() is None
    assert not torch._C._autograd._profiler_enabled()


def test_it_gives_way_to_other_recordings(tmp_path: Path) -> None:
    weight = torch.ones(1000, requires_grad=True)
    with pytest.raises(RuntimeError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        with recorder.record("cpu") as seen:
            (weight * 2).sum().backward()
        raise oom_error()
    assert seen.timeline.peak_above_base > 0
    with pytest.raises(RuntimeError) as caught, memplan.on_oom(tmp_path / "oom.json"):
        with recorder.record("cpu"):
            pass
        (weight * 2).sum().backward()
        kept = weight * 3
        raise oom_error()
    assert "aten::mul" in caught.value.__notes__[0]
    del kept
