"""docs/trl.md: its table and figures are those of benchmarks/results."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl")

from benchmarks.trl_tests import page

ROOT = Path(__file__).parents[2]


def test_page_is_of_the_results():
    written = json.loads((ROOT / "benchmarks/results/trl_tests.json").read_text())
    found, counts = written["found"], written["counts"]
    text = (ROOT / "docs/trl.md").read_text()
    assert page(found) in text
    assert sum(counts.values()) == len(found)
    words = " ".join(text.split())
    assert f"{len(found)} cases have been run" in words
    for verdict, count in counts.items():
        assert f"{count} {verdict}" in words
    assert "fails planned" not in counts
