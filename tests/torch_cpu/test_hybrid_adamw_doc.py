"""docs/hybrid-adamw.md: its figures are those of benchmarks/results, and what README says of them too."""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "hybrid-adamw.md"


def results(name: str = "hybrid_adamw") -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def losses(found: Any) -> Iterator[str]:
    for problem, of in found["problems"].items():
        for rule, row in of["rules"].items():
            size, loss = statistics.mean(row["bytes_percent"]), row["loss_percent"]
            spread = f"{min(loss):+.3f} to {max(loss):+.3f}"
            yield f"| {problem} | {rule} | {size:+.1f} | {statistics.mean(loss):+.3f} | {spread} |"


def of_grpo(found: Any) -> Iterator[str]:
    for rule, runs in found["rules"].items():
        loss = [run["loss_percent"] for run in runs]
        size, reward = (statistics.mean(run[key] for run in runs) for key in ("bytes_percent", "reward"))
        spread = f"{min(loss):+.1f} to {max(loss):+.1f}"
        yield f"| GRPO: {rule} | {size:+.1f} | {statistics.mean(loss):+.1f} | {spread} | {reward:.3f} |"


def times(found: Any) -> Iterator[str]:
    for shapes, of in found["times"].items():
        ratios = " | ".join(f"{of[kind]['ratio']:.2f}" for kind in ("float32", "share 0.84", "share 1"))
        yield f"| {shapes} | {1e3 * of['AdamW']['seconds']:.1f} | {ratios} |"


def test_the_figures_are_those_of_the_benchmark() -> None:
    found = results()
    expected = [*losses(found), *of_grpo(results("hybrid_adamw_grpo")), *times(found)]
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("|") and re.search(r"\.\d+ \|$", line)]
    assert rows == expected
    assert found["seeds"] >= 5 and found["machine"]["cpu"]


def test_readme_says_the_same() -> None:
    found = results()
    text = " ".join((ROOT / "README.md").read_text().split())
    share = [of["rules"]["share 0.84"] for of in found["problems"].values()]
    size = [statistics.mean(row["bytes_percent"]) for row in share]
    worst = max(abs(loss) for row in share for loss in row["loss_percent"])
    slow = [of["share 0.84"]["ratio"] for of in found["times"].values()]
    assert f"{-max(size):.0f} to {-min(size):.0f} % fewer bytes" in text
    assert f"at most {worst:.3f} % from AdamW's" in text
    assert f"{min(slow):.1f} to {max(slow):.1f} times" in text
