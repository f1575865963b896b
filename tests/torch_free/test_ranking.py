"""Rankings: the same judge for all, overheads that never rise with the budget, and policies that misbehave named."""

import dataclasses
import itertools
import json
import math
import re
import time
from pathlib import Path

import pytest

from memplan.errors import MemplanError
from memplan.ir import Budget, Decisions, Machine, Recompute, Step
from memplan.passes.pipeline import make_plan
from memplan.passes.policies import policy
from memplan.passes.policies.greedy import Greedy
from memplan.ranking import rank
from memplan.report import Ranking
from tests.torch_free.conftest import MACHINE, SIZE, make_step

BUS = dataclasses.replace(MACHINE, host_bandwidth=1e9, unified=False)


@policy("hasty")
def hasty(step: Step, budget: Budget, machine: Machine) -> Decisions:
    """With much room it does worse than with less."""
    if budget.available < step.base_bytes + 9 * SIZE:
        return Greedy()(step, budget, machine)
    return dict.fromkeys(step.read_in_backward, Recompute())


@policy("asleep")
def asleep(step: Step, budget: Budget, machine: Machine) -> Decisions:
    time.sleep(30)
    return {}


@policy("fickle")
def fickle(step: Step, budget: Budget, machine: Machine) -> Decisions:
    """With a fast bus it does worse than with a slow one."""
    if machine.host_bandwidth > 1.5e9:
        return dict.fromkeys(step.read_in_backward, Recompute())
    return Greedy(small=0)(step, budget, machine)


def deep() -> Step:
    """A step whose peak is activations: its gradients have no bytes."""
    step = make_step(12)
    tensors = (dataclasses.replace(t, bytes=0) if t.kind == "gradient" else t for t in step.tensors)
    return dataclasses.replace(step, tensors=tuple(tensors))


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    return rank({"toy": deep()}, [BUS], ["optimal", "greedy", "save-all", hasty], host_bytes=10**9)


def test_every_row_is_a_plan_that_the_pipeline_makes(ranking: Ranking) -> None:
    step = deep()
    rows = [row for row in ranking.rows if row.fits and not row.note]
    assert {row.policy for row in rows} == {"optimal", "greedy", "save-all", "hasty"}
    for row in rows:
        made = make_plan(
            step,
            hasty if row.policy == "hasty" else row.policy,
            Budget(row.budget, host_bytes=10**9),
            BUS,
            inner="eager",
        )
        assert (row.peak, row.overhead) == (made.peak, made.overhead)


def test_overheads_never_rise_with_the_bus() -> None:
    buses = [dataclasses.replace(BUS, name=f"{gb} GB/s", host_bandwidth=gb * 1e9) for gb in (4, 1, 2)]
    other = dataclasses.replace(BUS, name="slow", bandwidth=BUS.bandwidth / 2, host_bandwidth=1e8)
    rows = rank({"toy": deep()}, [*buses, other], [fickle], [deep().base_bytes + 8 * SIZE], host_bytes=10**9).rows
    assert [row.machine for row in rows] == ["4 GB/s", "1 GB/s", "2 GB/s", "slow"] and all(row.fits for row in rows)
    fast, slow, middle, alone = rows
    assert fast.overhead <= middle.overhead <= slow.overhead
    assert (slow.note, alone.note) == ("", "")
    assert middle.note == "the plan for 1 GB/s" and fast.note.startswith("the plan for ")


def test_overheads_never_rise_and_the_planner_leads(ranking: Ranking) -> None:
    for name in ("optimal", "greedy", "save-all", "hasty"):
        rows = [row for row in ranking.rows if row.policy == name and row.fits]
        assert rows
        for smaller, larger in itertools.pairwise(rows):
            assert smaller.budget < larger.budget
            assert larger.overhead <= smaller.overhead
    assert any(row.note.startswith("the plan for") for row in ranking.rows if row.policy == "hasty")
    for _, group in itertools.groupby(ranking.rows, key=lambda row: row.budget):
        here = {row.policy: row for row in group}
        assert here["optimal"].fits
        assert here["optimal"].overhead == min(row.overhead for row in here.values() if row.fits)
        assert all(row.gap > -1e-9 for row in here.values() if row.fits)


def test_a_policy_that_takes_too_long_is_stopped_and_named() -> None:
    start = time.perf_counter()
    found = rank({"toy": make_step(2)}, [BUS], [asleep, "save-all"], [10**9], limit=0.5)
    assert time.perf_counter() - start < 20
    stopped = next(row for row in found.rows if row.policy == "asleep")
    assert not stopped.fits
    assert stopped.note == "policy 'asleep' took longer than 0.5 seconds and was stopped"
    assert "asleep" in str(found)


@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_a_limit_of_nothing_is_refused(limit: float) -> None:
    with pytest.raises(MemplanError, match="give a positive number"):
        rank({"toy": make_step(2)}, [BUS], ["save-all"], [10**9], limit=limit)


def test_names_are_of_one_thing_each(tmp_path: Path) -> None:
    toy = {"$x^{$": make_step(2)}
    slower = dataclasses.replace(BUS, bandwidth=BUS.bandwidth / 2)
    with pytest.raises(MemplanError, match=f"two machines are called '{BUS.name}'"):
        rank(toy, [BUS, slower], ["save-all"], [10**9])
    found = rank(toy, [BUS, BUS], ["save-all", "save-all"], [10**9, 10**9])
    assert len(found.rows) == 1
    found.save(tmp_path / "names.png")  # nothing in a name is a formula
    for machines, policies in (([], ["save-all"]), ([BUS], [])):
        with pytest.raises(MemplanError, match="to rank: name one at least"):
            rank(toy, machines, policies, [10**9])


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(MemplanError, match=r"no policy is called 'optimum'.*optimal"):
        rank({"toy": make_step(2)}, [BUS], ["optimum"])


@pytest.mark.parametrize("suffix", ["json", "png", "html"])
def test_it_is_saved_whole(ranking: Ranking, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ranking.{suffix}"
    ranking.save(path)
    data = path.read_bytes()
    if suffix == "json":
        rows = json.loads(data)["rows"]
        assert [row["policy"] for row in rows] == [row.policy for row in ranking.rows]
        assert all(row["gap"] is None or math.isfinite(row["gap"]) for row in rows)
    elif suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        assert b"<svg" in data and b"optimal" in data
        assert not re.search(rb'(?:src|href)="https?:', data)  # nothing is fetched
    assert list(tmp_path.iterdir()) == [path]


def test_other_formats_are_refused(ranking: Ranking, tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match=re.escape("the formats are .json, .png and .html")):
        ranking.save(tmp_path / "ranking.csv")
    assert not list(tmp_path.iterdir())
