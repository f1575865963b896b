"""Chunked checkpointing: executed, a model has the same gradients, bit for bit, and the page says what was measured."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chunked as benchmark
from memplan.ir import Offload, Recompute
from memplan.passes.policies.chunked import Chunked, chunks
from tests.models import CASES
from tests.planned import Joint

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "chunked-checkpointing.md"
WAYS = (
    Chunked(2**12, ("recompute",), 0.4),
    Chunked(2**12, ("load",), 0.4, in_flight=1, small=0),
    Chunked(2**12, share=0.1, segment=0, small=0),
    Chunked(2**12, ("recompute",), 0.1, segment=10**6),
)

LARGE = "chunks of 256 MiB, 0.4 kept"


def test_executed_it_has_the_same_bits_and_the_bytes_it_predicts() -> None:
    torch._dynamo.reset()
    sample = next(case for case in CASES if case.name == "llama").make(dropout=0.1)
    joint = Joint.of_step(sample.step, sample.batch)
    plans = [joint.plan("save-all"), *(joint.plan(policy) for policy in WAYS)]
    assert len(chunks(joint.step, 2**12)) > 20
    kinds = [{type(d) for _, d in plan.decisions} for plan in plans[1:]]
    assert Recompute in kinds[0] and Offload in kinds[1] and {Recompute, Offload} <= kinds[2] and Recompute in kinds[3]
    results, peaks = joint.run(plans, seed=3)
    for plan, result, peak in zip(plans, results, peaks, strict=True):
        assert peak == plan.timeline.peak_above_base
        for a, b in zip(result, results[0], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def results() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "chunked.json").read_text())


def at(figures: Any, depth: int) -> dict[str, Any]:
    return {row["rule"]: row for row in figures["rows"] if row["depth"] == depth}


def table(figures: Any) -> Iterator[str]:
    """A line for each rule: slopes, and at 32 layers what it is of none's."""
    here = at(figures, 32)
    none = here["none"]
    for rule, row in here.items():
        slopes = [figures["slopes"][rule][what] for what in ("device", "host", "peak")]
        cells = ["" if slope is None else f"{slope:.2f}" for slope in slopes]
        percent = (100 * row[what] / none[of] for what, of in (("device", "device"), ("peak", "peak")))
        cells += [f"{value:.1f}" for value in percent]
        yield f"| {rule} | {' | '.join(cells)} | {abs(100 * row['overhead']):.1f} |"


def test_the_figures_of_the_page_are_those_of_the_benchmark() -> None:
    figures = results()
    lines = list(table(figures))
    found = re.findall(r"^\| .*\d \|$", DOC.read_text(), re.MULTILINE)
    assert found == lines
    assert sorted({row["depth"] for row in figures["rows"]}) == [4, 8, 16, 32, 64]
    for name, of in figures["slopes"].items():
        rows = [row for row in figures["rows"] if row["rule"] == name]
        assert of == {what: benchmark.slope(rows, what) for what in ("device", "host", "peak")}
    assert (DOC.parent / "chunked-checkpointing.png").is_file()


def test_the_benchmark_is_of_this_code() -> None:
    known = [row for row in results()["rows"] if row["depth"] == 4]
    made = {row["rule"]: row for row in benchmark.rows(4, search=False)}
    assert set(made) == {row["rule"] for row in known if not row["rule"].startswith("optimal")}
    for row in known:
        if row["rule"] in made:
            found = made[row["rule"]]  # another torch may trace other ops
            for what in ("device", "host", "peak", "overhead"):
                assert found[what] == pytest.approx(row[what], rel=0.05, abs=0.01), (row["rule"], what)


def test_what_the_page_says_in_words() -> None:
    """The statements whose figures are not in the table."""
    figures = results()
    slopes = figures["slopes"]
    share, root = "chunks of 64 MiB, 0.4 kept", "an input for each sqrt(N) layers"
    for depth in (4, 8, 16, 32, 64):
        of = at(figures, depth)
        none, kept, every, segments = of["none"], of[share], of["an input for each layer"], of[root]
        assert round(100 * kept["device"] / none["device"]) in (42, 43)
        assert round(100 * kept["overhead"]) in (8, 9)
        assert 0.09 < of[benchmark.INSIDE]["overhead"] < 0.13
        assert 0.077 < of[f"{benchmark.INSIDE}, with a host"]["overhead"] <= 0.1
        assert every["peak"] < segments["peak"] and every["overhead"] < segments["overhead"]
        assert 0.46 < of[f"optimal, as fast as {root}"]["peak"] / segments["peak"] < 0.58
        assert 0.915 < of[f"optimal, as fast as {share}"]["peak"] / kept["peak"] < 0.95
        small, large = of["chunks of 16 MiB, 0.4 kept"], of[LARGE]
        assert small["overhead"] < kept["overhead"] < large["overhead"] and small["peak"] < 1.02 * kept["peak"]
        loaded = of["chunks of 64 MiB, all loaded"]
        assert loaded["device"] == 0 and loaded["host"] == none["device"] and 3.9 < 1 + loaded["overhead"] < 4.1
        assert 0.13 < of[f"{benchmark.INSIDE}, with a host"]["host"] / none["device"] < 0.17
    assert all(
        0.98 < slopes[name]["device"] < 1.02 for name in slopes if name.startswith("chunks") and "0.4 kept" in name
    )
    assert 0.45 < slopes[root]["device"] < 0.6 and 0.45 < slopes[benchmark.ROOT]["device"] < 0.6
    assert slopes[benchmark.ROOT]["peak"] > 1
    large, inside = (100 * at(figures, 32)[name]["overhead"] for name in (LARGE, benchmark.INSIDE))
    whole = 100 * at(figures, 64)[benchmark.ROOT]["peak"] / at(figures, 64)["none"]["peak"]
    text = " ".join(DOC.read_text().split())
    assert f"256 take {large:.1f} % at 32 layers, where 64 inside 0.4 of the peak take {inside:.1f} % and keep" in text
    assert f"at 64 layers the peak is {whole:.0f} % of that without a rule" in text
    sliced = [
        100 * at(figures, 32)[name]["peak"] / at(figures, 32)["none"]["peak"] for name in (root, benchmark.SLICES[root])
    ]
    assert f"from {sliced[0]:.1f} to {sliced[1]:.1f} %" in text


def test_how_it_ranks() -> None:
    """On all steps that the policies are ranked on."""
    steps = json.loads((ROOT / "benchmarks" / "results" / "policies.json").read_text())["steps"]
    groups = dict[Any, dict[str, Any]]()
    for name, of in steps.items():
        for row in of["rows"]:
            groups.setdefault((name, row["budget"], row["host"]), {})[row["policy"]] = row
    fits = [here for here in groups.values() if here["chunked"]["fits"]]
    faster = sum(here["chunked"]["overhead"] < here["greedy"]["overhead"] for here in fits)
    assert all(here["optimal"]["overhead"] <= here["chunked"]["overhead"] + 1e-9 for here in fits)
    says = (
        f"on {len(steps)} steps, at {len(groups)} budgets with and without a host, it fits at {len(fits)}, and is "
        f"faster than `greedy` at {faster}"
    )
    assert says in " ".join(DOC.read_text().split())
