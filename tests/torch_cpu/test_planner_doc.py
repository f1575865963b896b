"""docs/planner.md: its figures are those of benchmarks/results, and its command ranks the example's policy."""

import html
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memplan.cli import main
from memplan.passes.policies.optimal import EVERY, NEAR

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "planner.md"
COLUMNS = ("optimal", "gap", "greedy", "block-checkpoint", "offload-layer-inputs", "torch's own")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table() -> Iterator[str]:
    """The recorded step: a line for each budget, from the largest."""
    yield f"| budget, GB | {' | '.join(COLUMNS)} |"
    yield "| --- " * (len(COLUMNS) + 1) + "|"
    rows = results("planner")["rows"]
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        here = {row["policy"]: row for row in rows if row["budget"] == budget and row["fits"]}
        torch = min((row["overhead"] for name, row in here.items() if name.startswith("torch-budget")))
        overheads = {name: row["overhead"] for name, row in here.items()} | {"torch's own": torch}
        overheads["gap"] = here["optimal"]["gap"]
        yield f"| {budget / 1e9:.2f} | {' | '.join(f'{100 * overheads[name]:.2f}' for name in COLUMNS)} |"


def small() -> str:
    found = results("planner")["graphs"]
    return (
        f"at {found['budgets']} budgets: {100 * found['within_2_percent']:.3g} % of the plans are within 2 % of the "
        f"best, the worst {100 * found['worst']:.2f} % above it; the bound is above the best plan "
        f"{found['bound_wrong']} times."
    )


def swept() -> Iterator[str]:
    """Every policy on recorded and generated steps."""
    yield "| step | ops | seconds to plan | worst gap, points | faster policies, or plans over their budget |"
    yield "| --- | --- | --- | --- | --- |"
    for name, of in results("policies")["steps"].items():
        took, gap = of["planned_in"]["cpu"], of["worst_gap"]
        yield f"| `{name}` | {of['ops']} | {took:.1f} | {100 * gap:.1f} | {len(of['broken'])} |"


def at_least_budgets() -> Iterator[str]:
    """Chains that an integer program knows the best plans of."""
    yield "| chain of | budget, MiB | plan | best known | no plan is below | bound |"
    yield "| --- " * 6 + "|"
    for row in results("least_budgets")["rows"]:
        overheads = (f"{100 * row[key]:.1f}" for key in ("planned", "best", "least", "bound"))
        yield f"| {row['length']} | {row['budget'] / 2**20:.2f} | {' | '.join(overheads)} |"


def judged() -> Iterator[str]:
    """What the integer programs say."""
    found = results("oracle")["summary"]
    yield f"| | {' | '.join(found)} |"
    yield "| --- " * (len(found) + 1) + "|"
    for words, key, percent in (
        ("steps", "graphs", False),
        ("of them solved to the end in 20 s", "solved", False),
        ("plans that are the best known", "found_best", False),
        ("plans within 2 % of the best known", "within_2_percent", False),
        ("most time above the best known, %", "worst_excess", True),
        ("bounds above the best known", "bound_wrong", False),
        ("plans over their budget", "over_budget", False),
        ("gap, median, points", "gap_median", True),
        ("gaps of at most 3 points", "gap_within_3_points", False),
        ("largest gap, points", "gap_worst", True),
    ):
        values = (f"{100 * of[key]:.2f}" if percent else str(of[key]) for of in found.values())
        yield f"| {words} | {' | '.join(values)} |"
    most = max(of["most_ops"] for of in found.values())
    yield f"random steps of up to {most} ops"


def test_the_figures_are_those_of_the_benchmarks() -> None:
    text = " ".join(DOC.read_text().split())
    for line in (*table(), small(), *judged(), *swept(), *at_least_budgets()):
        assert " ".join(line.split()) in text, line
    figures = re.findall(r"^\| \d+\.\d\d \|.*$", DOC.read_text(), re.MULTILINE)
    assert len(figures) == len(list(table())) - 2


def test_the_example_policy_enters_the_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(
        r"^memplan (compare --policies .*03_my_policy.*)$", DOC.read_text().replace("\\\n", ""), re.MULTILINE
    )
    assert command is not None
    out = tmp_path / "ranking.html"
    words = shlex.split(command[1].replace("greedy", "save-all").replace("ranking.html", str(out)))
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    printed = capsys.readouterr().out
    budgets = words[words.index("--budgets") + 1].split(",")
    assert len(re.findall(r"^  cheap .*\+\d", printed, re.MULTILINE)) == len(budgets) - 1
    assert "cheap" in html.unescape(out.read_text()) and "<svg" in out.read_text()
    example = (ROOT / "examples" / "03_my_policy.py").read_text()
    policy = example[example.index("@memplan.policy") : example.index("def main")]
    assert len(policy.strip().splitlines()) < 30


def test_what_cannot_be_ranked_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["compare", "--policies", "examples/03_my_policy.py:chaep"]) == 2
    assert "did you mean 'cheap'" in capsys.readouterr().err
    assert main(["compare", "--policies", "examples/04.py:cheap"]) == 2
    assert "is not a Python file that exists" in capsys.readouterr().err


def test_what_it_mentions_exists() -> None:
    for path in re.findall(r"`((?:passes|tests|examples|benchmarks)/[\w/]+\.py)", DOC.read_text()):
        assert (ROOT / path).is_file(), path
    assert (EVERY, NEAR) == ((1, 2, 4, 8, 16), 0.005)  # as the page says in words
