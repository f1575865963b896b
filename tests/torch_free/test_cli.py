"""The command's exit codes and streams; planning itself is replaced, so that no step is traced here."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import memplan
from memplan import report, steps
from memplan.cli import main
from memplan.errors import DoesNotFit, MemplanError
from memplan.ir import Budget, Plan, Step, Timeline
from memplan.machines import machine
from memplan.serialize import from_json

Calls = list[dict[str, Any]]


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A file that needs its neighbour, as `python FILE.py` would find it."""
    (tmp_path / "neighbour.py").write_text("BATCH = 3\n")
    path = tmp_path / "train.py"
    path.write_text(
        "import neighbour\n"
        "def make_step():\n    return (lambda batch: batch), neighbour.BATCH\n"
        "def make_one():\n    return 1\n"
        "def make_two(size):\n    return size, 2\n"
    )
    return str(path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> Calls:
    """What memplan.plan was called with; it returns the plan written by hand, or raises what a test puts there."""
    seen: Calls = []

    def fake(step: Any, batch: Any, **options: Any) -> Plan:
        seen.append({"batch": batch, **options})
        return plan

    for name in ("MEMPLAN_BUDGET", "MEMPLAN_POLICY", "MEMPLAN_OUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(vars(memplan), "plan", fake)  # not setattr, which would first import the real one
    return seen


def test_plan(script: str, calls: Calls, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", f"{script}:make_step", "--budget", "24GB", "--machine", "RTX4090"]
    code = main([*command, "--optimizer", "adamw", "--tiles", "256", "-o", str(out)])
    assert code == 0
    assert capsys.readouterr().out == f"{plan}\n"
    (given,) = calls
    assert given == {
        "batch": 3,
        "budget": "24GB",
        "machine": machine("rtx4090"),
        "policy": "optimal",
        "inner": "inductor",
        "optimizer": "adamw",
        "tiles": 256,
        "host_budget": None,
        "cost": None,
    }
    assert Plan.load(out) == plan


def test_plan_as_json(script: str, calls: Calls, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{script}:make_step", "--json"]) == 0
    assert from_json(capsys.readouterr().out, Plan) == plan


def test_plan_reads_the_environment(script: str, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_BUDGET", "12GB")
    monkeypatch.setenv("MEMPLAN_POLICY", "save_all")
    monkeypatch.setenv("MEMPLAN_OUT", str(tmp_path / "plan.png"))
    assert main(["plan", f"{script}:make_step"]) == 0
    assert main(["plan", f"{script}:make_step", "--budget", "24GB"]) == 0
    assert [(c["budget"], c["policy"]) for c in calls] == [("12GB", "save_all"), ("24GB", "save_all")]
    assert (tmp_path / "plan.png").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(DoesNotFit("24.00 GB is too little", budget=1, needed=2, smallest=2), 3), (MemplanError("no such thing"), 2)],
)
def test_errors_go_to_stderr(
    error: MemplanError,
    code: int,
    script: str,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Plan:
        raise error

    monkeypatch.setattr(memplan, "plan", fail)
    assert main(["plan", f"{script}:make_step"]) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"memplan: {error}\n")


def test_a_plan_that_does_not_fit_gates(script: str, calls: Calls, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(plan, budget=Budget(1))
    monkeypatch.setattr(memplan, "plan", lambda *_, **__: short)
    assert main(["plan", f"{script}:make_step"]) == 3


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("{}", [], "did you mean"),
        ("{}:make_stpe", [], "no function 'make_stpe'"),
        ("{}:make_one", [], "returned 1: return the pair"),
        ("{}:make_two", [], "missing a required argument: 'size'"),
        ("{}:makestep", [], "did you mean 'make_step'"),
        ("{}:make_step", ["-o", "plan.txt"], "the formats are .json, .html, .png, .pickle and .perfetto-trace"),
        ("absent.py:make_step", [], "not a Python file that exists"),
        ("{}:make_step", ["--budget", "24"], 'did you mean "24GB"'),
        ("{}:make_step", ["--machine", "h1000"], "did you mean 'h100'"),
    ],
)
def test_bad_input(
    target: str, options: list[str], says: str, script: str, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", target.format(script), *options]) == 2
    assert says in capsys.readouterr().err
    assert calls == []


def test_timeline_and_compare(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, image = (str(tmp_path / name) for name in ("a.json", "b.json", "b.png"))
    plan.save(a)
    plan.timeline.save(b)
    assert main(["timeline", a]) == 0
    assert "fits: peak" in capsys.readouterr().out
    assert main(["timeline", b, "-o", image]) == 0
    assert capsys.readouterr().out.startswith("toy, planned: predicted, 13 moments")
    assert Path(image).read_bytes().startswith(b"\x89PNG")
    assert main(["timeline", a, "-o", str(tmp_path / "c.json")]) == 0
    assert Plan.load(tmp_path / "c.json") == plan
    capsys.readouterr()
    assert main(["compare", a, b]) == 0
    assert "equal peaks" in capsys.readouterr().out
    for suffix in ("html", "pickle", "perfetto-trace"):
        assert main(["timeline", a, "-o", str(tmp_path / f"d.{suffix}")]) == 0
        assert main(["compare", a, b, "-o", str(tmp_path / f"e.{suffix}")]) == 0
        assert (tmp_path / f"e.{suffix}").stat().st_size > (tmp_path / f"d.{suffix}").stat().st_size
    capsys.readouterr()
    assert main(["timeline", b, "--json"]) == 0
    assert from_json(capsys.readouterr().out, Timeline) == plan.timeline
    assert main(["compare", a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_b"] == plan.peak
    assert main(["compare", a, b, "-o", str(tmp_path / "e.json")]) == 2
    assert "the formats are .html" in capsys.readouterr().err


def test_compare_ranks_policies(step: Step, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "toy.json", tmp_path / "ranking.json"
    report.save(step, path)
    ranked = ["compare", "--policies", "optimal, save-all", "--steps", str(path), "--machines", "h100,a100-80"]
    assert main([*ranked, "--budgets", "1GB", "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("optimal") == text.count("save-all") == 2  # on each machine
    assert len(json.loads(out.read_text())["rows"]) == 4
    assert main([*ranked, "--budgets", "1kB"]) == 3  # nothing fits
    assert main([*ranked, "--budgets", "1GB", "--json"]) == 0
    capsys.readouterr()
    assert main(["compare", "--policies", "save-all", "--budgets", "80GB", "--json"]) == 0
    assert {row["step"] for row in json.loads(capsys.readouterr().out)["rows"]} == {steps.USUAL}
    for wrong, says in (
        (["compare", "a.json"], "needs two files"),
        (["compare", "a.json", "--policies", "greedy"], "leave one of them out"),
        ([*ranked, "--limit", "0"], "give a positive number"),
        ([*ranked, "-o", str(out)], "give -f to overwrite"),
        (["compare", "--policies", "greedy", "--steps", "llama"], "no recorded step is called 'llama'"),
        (["compare", "--policies", "greedy", "--machines", "h1000"], "did you mean"),
        (["compare", "--policies", "greedy", "--machines", ""], "--machines '' names none"),
        (["compare", "--policies", ","], "--policies ',' names none"),
        (["compare", "a.json", "b.json", "--budgets", "1GB"], "--budgets is for ranking"),
    ):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan {script}:make_step", "timeline {saved}", "compare {saved} {saved}"])
def test_an_existing_file_is_kept_unless_forced(
    command: str, script: str, calls: Calls, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out = tmp_path / "saved.json", tmp_path / "out.html"
    plan.save(saved)
    out.write_text("mine")
    arguments = [*command.format(script=script, saved=saved).split(), "-o", str(out)]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"memplan: {str(out)!r} exists already: give -f")
    assert calls == [] and out.read_text() == "mine"
    assert main([*arguments, "-f"]) == 0
    assert out.read_text() != "mine"
    out.unlink()
    assert main(arguments) == 0 and out.exists()


def test_what_cannot_be_written_is_said_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the saved files are even looked for."""
    for command in (["timeline", "absent.json"], ["compare", "absent.json", "absent.json"]):
        assert main([*command, "-o", "x.txt"]) == 2
        assert "the formats are" in capsys.readouterr().err


def test_files_that_are_not_timelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    for arguments in (["timeline", str(path)], ["compare", str(path), str(path)], ["timeline", "absent.json"]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("memplan: ")


def test_nobody_reads_what_is_printed(script: str, plan: Plan, tmp_path: Path) -> None:
    """`| head` is no error, and what was to be saved is there."""
    plan.save(tmp_path / "saved.json")
    command = f"{sys.executable} -u -m memplan timeline '{tmp_path}/saved.json' -o '{tmp_path}/out.html' | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out.html").exists()


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Calls = []
    fake = ModuleType("memplan.demo")
    monkeypatch.setattr(fake, "run", lambda **options: seen.append(options), raising=False)
    monkeypatch.setitem(sys.modules, "memplan.demo", fake)
    assert main(["demo", "--inner", "inductor", "-o", "results"]) == 0
    assert seen == [{"inner": "inductor", "out": Path("results")}]


def test_help_says_what_each_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["plan", "--help"])
    assert e.value.code == 0
    assert "exits 3 when it does not fit" in capsys.readouterr().out
    for command in ("plan", "timeline", "compare", "record-step", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        arguments = re.findall(r"^  (\S.*?)(?:  +(\S.*))?$((?:\n {4,}\S.*)*)", text.partition("arguments:")[2], re.M)
        assert all(first or more for _, first, more in arguments), f"{command} has an argument without a help"
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2


def test_loading_a_timeline_keeps_it(timeline: Timeline, tmp_path: Path) -> None:
    timeline.save(tmp_path / "t.json")
    assert main(["timeline", str(tmp_path / "t.json"), "-o", str(tmp_path / "u.json")]) == 0
    assert Timeline.load(tmp_path / "u.json") == timeline
