"""Machine files: what is written is read back, and what no machine has is refused, with the file and what to do."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli import main
from memplan.errors import MemplanError
from memplan.ir import Machine
from memplan.machines import file, machine
from memplan.options import Options

MINE = Machine(
    "mine",
    "cpu",
    10**10,
    2e10,
    (("float32", 1e11), ("bfloat16", 2e11)),
    host_bandwidth=5e9,
    disk_bandwidth=1e9,
    contention=0.25,
    unified=True,
    workspace_rules=(("aten.sort.default", 0.5),),
    attention=(("float32", 5e10),),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file.save(MINE, {"date": "2026-01-01", "figures": []}, tmp_path / "mine.json")
    return tmp_path / "mine.json"


def test_what_is_written_is_read(path: Path) -> None:
    assert machine(str(path)) == machine(path) == MINE
    assert Options.read({"machine": str(path)}, {}).machine == MINE
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]


def test_a_file_beside_you_needs_no_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    assert machine("mine.json") == MINE
    path.rename(path.with_name("mine"))
    assert machine("mine") == MINE
    path.with_name("mine").rename(path.with_name("h100"))
    assert machine("h100").device == "cuda"  # the table comes first


def changed(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text())
    document["value"] |= fields
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("rate", [0, 0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["bandwidth", "host_bandwidth", "disk_bandwidth", "flops", "attention"])
def test_rates_that_no_machine_has(name: str, rate: float, path: Path) -> None:
    changed(path, **{name: [["float32", rate]] if name in ("flops", "attention") else rate})
    with pytest.raises(
        MemplanError, match=rf"mine\.json' has {name}.* is a finite number above 0; write it again"
    ) as e:
        machine(path)
    assert f" {rate:g}: a rate" in str(e.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"memory_bytes": 0}, "has memory_bytes 0: "),
        ({"contention": -0.5}, "has contention -0.5: it is a finite number, 0 or above"),
        ({"context_bytes": -1}, "has context_bytes -1"),
        ({"workspace_rules": [["aten.sort.default", float("nan")]]}, "has workspace_rules.*nan"),
        ({"flops": [["bfloat16", 1e12]]}, "has no rate of float32"),
        ({"flops": []}, "has no rate of float32"),
        ({"flops": {"float32": 1e12}}, "is damaged: expected a list"),
        ({"bandwidth": "fast"}, "is damaged: expected float, found 'fast'"),
        ({"device": "tpu"}, "is damaged: 'tpu' is not one of"),
        ({"bandwith": 1e9}, "is damaged: Machine has no field 'bandwith'"),
    ],
)
def test_fields_that_no_machine_has(fields: dict[str, Any], says: str, path: Path) -> None:
    changed(path, **fields)
    with pytest.raises(MemplanError, match=says):
        machine(path)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Machine) if f.default is dataclasses.MISSING])
def test_missing_fields(name: str, path: Path) -> None:
    document = json.loads(path.read_text())
    del document["value"][name]
    path.write_text(json.dumps(document))
    with pytest.raises(MemplanError, match=f"is damaged: Machine lacks its field '{name}'"):
        machine(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ('{"memplan": "Machine", "schema": 3, "val', "is not JSON.*cut short"),
        ("[1, 2]", "was not written by memplan"),
        ('{"name": "mine"}', "was not written by memplan"),
        ('{"memplan": "Machine", "schema": 2, "value": {}}', "has schema 2, and this memplan reads schema 3"),
        ('{"memplan": "Machine", "schema": 99, "value": {}}', "has schema 99"),
        ('{"memplan": "Machine", "value": {}}', "has schema None"),
        ('{"memplan": "Plan", "schema": 3, "value": {}}', "holds a Plan, not a Machine"),
        ('{"memplan": "Machine", "schema": 3}', "is damaged: expected the fields of Machine"),
        ('{"memplan": "Machine", "schema": 3, "value": 7}', "is damaged: expected the fields of Machine"),
    ],
)
def test_other_files(text: str, says: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(MemplanError, match=rf"mine\.json' .*{says}|{says}"):
        machine(path)


def test_an_entry_that_is_not_known(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mesured": {}}))
    with pytest.raises(MemplanError, match="has an entry 'mesured' that is not known: there are measured, memplan"):
        machine(path)


def test_binary(path: Path) -> None:
    path.write_bytes(b"\x80\x81")
    with pytest.raises(MemplanError, match="it is not text"):
        machine(path)


def test_a_directory(path: Path) -> None:
    with pytest.raises(MemplanError, match="is a directory: give a file that `memplan calibrate` wrote"):
        machine(path.parent)
    with pytest.raises(MemplanError, match="is a directory"):
        machine(str(path.parent))


def test_no_such_file(path: Path) -> None:
    wrong = str(path.with_name("mien.json"))
    with pytest.raises(MemplanError, match=r"mien\.json' is not there: .*did you mean '.*mine\.json'"):
        machine(wrong)
    with pytest.raises(MemplanError, match="is not there"):
        machine("/no/such/folder/machine.json")
    with pytest.raises(MemplanError, match=r"is not there.*did you mean 'h100'"):
        machine("h100.json")


def test_a_name_of_neither() -> None:
    with pytest.raises(MemplanError, match=r"no machine 'abacus': the table has h100, .*; or give the path of a file"):
        machine("abacus")


def test_the_command_line_takes_a_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranked = ["compare", "--policies", "save-all", "--budgets", "40GB", "--steps", "llama8b_layers_4k_v32000"]
    assert main([*ranked, "--machines", str(path), "--cost", "fused"]) == 0
    assert "on mine, budget 40.00 GB, times by fused" in capsys.readouterr().out
    changed(path, bandwidth=0)
    assert main([*ranked, "--machines", str(path)]) == 2
    assert "has bandwidth 0: " in capsys.readouterr().err


def test_calibrate_loses_no_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_text()
    assert main(["calibrate", "-o", str(path)]) == 2
    assert "exists already: give -f" in capsys.readouterr().err
    assert main(["calibrate", "-o", str(path.with_suffix(".txt"))]) == 2
    assert "name a .json file" in capsys.readouterr().err
    assert path.read_text() == before
