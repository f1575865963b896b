"""docs/eight-bit-optimizers.md: its figures are those of benchmarks/results, and what is said of them holds."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "eight-bit-optimizers.md"
COLUMNS = ("states foreseen", "states", "step planned", "step", "least budget", "peak")


def test_the_figures_are_those_of_the_benchmark() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "eightbit.json").read_text())
    rows = [line for line in DOC.read_text().splitlines() if re.search(r"\.\d+ \|$", line)]
    assert rows == [
        f"| {name} | " + " | ".join(f"{of[column] / 2**20:.2f}" for column in COLUMNS) + " |"
        for name, of in found["bytes"].items()
    ]
    assert found["machine"]["cpu"] and 4.1e6 < found["values"] < 4.3e6
    for name, of in found["bytes"].items():
        assert of["peak"] <= of["least budget"]
        assert abs(of["states foreseen"] - of["states"]) <= 2048  # a table of which no state is made, a learning rate
        assert name.startswith("Hybrid") or abs(of["step planned"] - of["step"]) <= 2048
    saved = found["bytes"]["AdamW"]["states"] - found["bytes"]["torchao AdamW4bit"]["states"]
    assert found["bytes"]["torchao AdamW4bit"]["step"] > saved  # more than what the states save
