"""docs/sharing.md: its figures are those of benchmarks/results and of the forms, and what README says of them too."""

import itertools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from memplan.sharing import Blocks, Householder

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "sharing.md"
SHAPES = {  # of Llama-3.1-8B, and the rows or columns that Q acts on
    "query, output: 4096 x 4096": (4096, 4096, 4096),
    "key, value: 1024 x 4096": (1024, 4096, 1024),
    "MLP: 14336 x 4096": (14336, 4096, 4096),
}


def results() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "sharing.json").read_text())


def spread(values: list[float], digits: int) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def arithmetic() -> Iterator[str]:
    """What Q takes, in % of the weight's values; float32."""
    for name, (rows, columns, d) in SHAPES.items():
        size = 4 * rows * columns
        forms = (Blocks(), Blocks(128), Householder(64))
        shares = [100 * 4 * d * d / size, *(100 * form.nbytes(d, torch.float32) / size for form in forms)]
        yield f"| {name} | " + " | ".join(f"{share:.1f}" for share in shares) + " |"


def least(runs: Any) -> Iterator[str]:
    for name in runs[0]["random"]["least"]:
        cells = []
        for weights in ("random", "trained"):
            found = [run[weights]["least"][name] for run in runs]
            cells.append(f"{statistics.mean(mean for mean, _ in found):.3f} ({min(low for _, low in found):.3f})")
        yield f"| {name} | {' | '.join(cells)} |"


def forms(runs: Any) -> Iterator[str]:
    for weights in ("random", "trained"):
        for name in runs[0][weights]["forms"]:
            found = [run[weights]["forms"][name] for run in runs]
            mean, low = statistics.mean(f["error"][0] for f in found), min(f["error"][1] for f in found)
            goals = [statistics.median(f["tolerance"][goal] for f in found) for goal in ("10", "30")]
            cells = [f"{mean:.3f} ({low:.3f})", *(f"{goal:.3f}" for goal in goals)]
            cells += [f"{statistics.mean(f['most'] for f in found):.1f}"]
            cells += [f"{statistics.mean(f['low_rank'] for f in found):.3f}"]
            yield f"| {name}, {weights} | {' | '.join(cells)} |"


def losses(runs: Any) -> Iterator[str]:
    for name in runs[0]["losses"]:
        found = [run["losses"][name] for run in runs]
        saved = statistics.mean(f["saved"] for f in found)
        cells = [f"{saved:.1f}", *(spread([f[key] for f in found], 3) for key in ("after", "tuned"))]
        yield f"| {name} | {' | '.join(cells)} |"


def memory(found: Any) -> Iterator[str]:
    for name, of in found["memory"].items():
        cells = [f"{of[key] / 1e6:.2f}" for key in ("parameters", "base", "smallest", "eager")]
        yield f"| {name} | {' | '.join(cells)} | {of['ratio']:.2f} |"


def test_the_figures_are_those_of_the_benchmark() -> None:
    found = results()
    runs = found["runs"]
    expected = [*arithmetic(), *least(runs), *forms(runs), *losses(runs), *memory(found)]
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("|") and re.search(r"\.\d+\)? \|$", line)]
    assert rows == expected
    assert found["seeds"] == len(runs) >= 3 and found["machine"]["cpu"]


def test_what_the_words_say() -> None:
    """Of the page and of README."""
    found = results()
    runs = found["runs"]
    text, readme = (" ".join(path.read_text().split()) for path in (DOC, ROOT / "README.md"))
    before = spread([run["trained"]["loss"] for run in runs], 3)
    assert f"the loss is {before} before" in text
    trained = [of for run in runs for of in run["trained"]["forms"].values()]
    first = min(of["error"][1] for of in trained)
    goal = min(of["tolerance"]["30"] for of in trained)
    assert f"No pair is under an error of {int(100 * first) / 100:.2f}" in text
    assert f"30 % are saved from an error of {goal:.2f} on" in text and f"from an error of {goal:.2f} on" in readme
    assert all(run["planted"]["merged"] == 14 for run in runs)
    planted = statistics.mean(run["planted"]["saved"] for run in runs)
    assert f"all 14 pairs are merged, and {planted:.1f} % of the model's bytes saved" in text
    losses = {name: [run["losses"][name] for run in runs] for name in runs[0]["losses"]}
    shared = [name for name in losses if name.endswith("%")]
    assert len(shared) == 6
    for name, run, key in itertools.product(shared, range(len(runs)), ("after", "tuned")):
        assert losses[name][run][key] < losses[f"{name}, left out"][run][key], (name, run, key)
        if "30 %" in name:
            assert losses[f"{name}, low rank"][run][key] < losses[name][run][key], (name, run, key)
