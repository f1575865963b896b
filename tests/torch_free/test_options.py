"""Options are read once, from what is given and then from the environment; what is wrong is refused early."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan import memory
from memplan.errors import MemplanError
from memplan.ir import Budget, Machine
from memplan.machines import machine
from memplan.options import FRAGMENTATION_RESERVE, Options, parse_bytes, read_budget
from memplan.units import UNITS, human

GPU = Machine("gpu", "cuda", 24 * 10**9, 1e12, (("float32", 1e13),), context_bytes=5 * 10**8)
CPU = Machine("cpu", "cpu", 16 * 10**9, 1e10, (("float32", 1e10),))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("512MB", 512 * 10**6),
        ("512 MiB", 512 * 2**20),
        ("1.5GB", 15 * 10**8),
        (" .5gb ", 5 * 10**8),
        ("300KB", 300_000),
        ("7B", 7),
        (123, 123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(1, 10**9), st.sampled_from(sorted(UNITS)))
def test_sizes_are_exact(number: int, unit: str) -> None:
    assert parse_bytes(f"{number}{unit}") == number * UNITS[unit]


@given(st.integers(1, 10**14))
def test_human_is_exact_to_four_digits(size: int) -> None:
    assert parse_bytes(human(size)) == pytest.approx(size, rel=5.1e-4)


def test_human() -> None:
    sizes = (0, 999, 1000, 999_950, 24 * 10**9, 22_354_000_000, -1_500_000)
    assert [human(s) for s in sizes] == ["0 B", "999 B", "1.000 KB", "1.000 MB", "24.00 GB", "22.35 GB", "-1.500 MB"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("24", 'did you mean "24GB"'),
        ("25769803776", 'did you mean "25769803776B"'),
        ("0.5", 'did you mean "50%"'),
        ("24 parsecs", "unit 'parsecs', and the units are B, KB"),
        ("24G", "did you mean 'GB'"),
        ("", '"24GB"'),
        ("lots", '"24GB"'),
        ("9" * 5000 + "GB", '"24GB"'),
        ("0GB", "at least one byte"),
        ("-1", "at least one byte"),
        (-1, "at least one byte"),
        (0, "at least one byte"),
        (math.nan, "a float is a fraction"),
        (math.inf, "a float is a fraction"),
        (-0.5, "a float is a fraction"),
        (1.5, "a float is a fraction"),
        (24.0, 'did you mean "24GB"'),
        ("150%", "at most 100"),
        ("half%", "at most 100"),
        ("0%", "above 0"),
        (True, '"24GB"'),
        ([], '"24GB"'),
    ],
)
def test_bad_budgets(value: Any, says: str) -> None:
    """The first line stands alone: it holds the value, what is valid and the likely mistake."""
    for read in (lambda: read_budget(value, GPU), lambda: Options.read({"budget": value}, {})):
        with pytest.raises(MemplanError) as e:
            read()
        first = str(e.value).splitlines()[0]
        assert first.startswith(f"budget {value!r}")
        assert says in first


def test_budgets() -> None:
    for value in ("12GB", 12 * 10**9, 0.5, "50%", " 50 %"):
        budget = read_budget(value, GPU)
        assert (budget.bytes, budget.fixed_bytes, budget.note) == (12 * 10**9, 5 * 10**8, "")
        assert budget.reserve_bytes == int(FRAGMENTATION_RESERVE * budget.bytes)
    whole = read_budget(None, GPU)
    assert (whole.bytes, whole.note) == (24 * 10**9, "the whole device")
    assert read_budget(1.0, GPU).bytes == GPU.memory_bytes
    assert read_budget(0.5, GPU, device_total=10**9).bytes == 5 * 10**8
    clamped = read_budget("80GB", GPU)
    assert clamped.bytes == 24 * 10**9
    assert clamped.note == "clamped from 80.00 GB to the device's 24.00 GB"


def test_a_cpu_budget_is_all_for_the_step() -> None:
    budget = read_budget("1GB", CPU)
    assert budget.available == budget.bytes == 10**9


@given(st.integers(1, 48 * 10**9), st.integers(1, 48 * 10**9))
def test_available_grows_with_the_budget(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert read_budget(low, GPU).available <= read_budget(high, GPU).available


def test_what_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"MEMPLAN_BUDGET": "12GB", "MEMPLAN_POLICY": "save_all", "MEMPLAN_OUT": "plan.png"}
    assert Options.read(None, {}) == Options()
    assert Options.read({}, environ) == Options("12GB", "save_all", out="plan.png")
    assert Options.read({"budget": "24GB"}, environ) == Options("24GB", "save_all", out="plan.png")
    assert Options.read({"budget": None}, environ).budget == "12GB"
    assert Options.read({}, {"MEMPLAN_BUDGET": ""}).budget is None
    monkeypatch.setenv("MEMPLAN_BUDGET", "7GB")
    assert Options.read({}).budget == "7GB"


def test_a_budget_that_a_ledger_made() -> None:
    shared = Budget(12 * 10**9, others=(("engine", 10**9),))
    assert Options.read({"budget": shared}, {"MEMPLAN_BUDGET": "1GB"}).budget == shared
    assert read_budget(shared, CPU) == dataclasses.replace(read_budget("12GB", CPU), others=shared.others)
    assert read_budget(shared, GPU).available == read_budget("12GB", GPU).available - 10**9
    assert "clamped" in read_budget(dataclasses.replace(shared, bytes=80 * 10**9), GPU).note


def test_the_host_budget() -> None:
    """Half of what is free, unless host and device share one memory or it is said; 0 is none."""
    free = memory.available()
    assert 0.4 * free < read_budget("1GB", GPU).host_bytes < 0.6 * free
    shared = dataclasses.replace(CPU, unified=True)
    assert read_budget("1GB", shared).host_bytes == 0
    assert read_budget("1GB", shared, host="2GB").host_bytes == 2 * 10**9
    for nothing in (0, 0.0, "0", "0B", "0 GB", "0.0MB", "0%"):
        assert Options.read({"host_budget": nothing}, {}).host_budget == nothing
        assert read_budget("1GB", GPU, host=nothing).host_bytes == 0
    assert 0.2 * free < read_budget("1GB", shared, host="25%").host_bytes < 0.3 * free
    assert read_budget("1GB", GPU, host=10**9).available == read_budget("1GB", GPU, host=0).available


def test_options_are_frozen_and_hashable() -> None:
    options = Options.read({"inductor": {"max_autotune": True}, "machine": "RTX4090", "policy": print}, {})
    assert options.inductor == (("max_autotune", True),)
    assert options.machine == machine("rtx4090")
    assert hash(options) == hash(
        Options.read({"inductor": {"max_autotune": True}, "machine": "rtx4090", "policy": print}, {})
    )


def test_ops_are_priced_as_they_are_run() -> None:
    assert Options.read({}, {}).cost_model == "fused"
    assert Options.read({"inner": "eager"}, {}).cost_model == "roofline-v1"
    assert Options.read({"cost": "roofline-v1"}, {}).cost_model == "roofline-v1"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bugdet": "24GB"}, "no option 'bugdet'.*did you mean 'budget'"),
        ({7: 1}, "no option 7"),
        ({"host_budget": "64"}, "host_budget '64' has no unit.*did you mean \"64GB\""),
        ({"host_budget": -1}, "host_budget -1 is not a size"),
        ({"host_budget": "150%"}, "a percentage of the host is above 0"),
        ({"limits": {"token": 9}}, "did you mean 'tokens'"),
        ({"limits": {"tokens": 0}}, "an int of at least 1"),
        ({"limits": 20480}, "give a dict"),
        ({"optimizer": 3}, "'optimizer' is 3"),
        ({"tiles": ()}, r"'tiles' is \(\): give the most rows"),
        ({"tiles": 1}, "'tiles' is 1"),
        ({"tiles": -5}, "'tiles' is -5"),
        ({"tiles": True}, "'tiles' is True"),
        ({"tiles": "all"}, "'tiles' is 'all'"),
        ({"tiles": {}}, "'tiles' is {}: give the most rows"),
        ({"tiles": {"lm_head": 0}}, "'tiles' is 0 for 'lm_head': give the most rows"),
        (
            {"tiles": {"lm_head": "vocabulary"}},
            "'tiles' is 'vocabulary' for 'lm_head'.* give 'rows', 'vocab', 'vectors'",
        ),
        ({"policy": 3}, "'policy' is 3"),
        ({"machine": "rtx409"}, "did you mean 'rtx4090'"),
        ({"inner": "aot_eager"}, "'inductor' or 'eager'"),
        ({"cost": "fuse"}, "option 'cost' is 'fuse'.*did you mean 'fused'"),
        ({"cost": 1}, "option 'cost' is 1: it is 'roofline-v1' or 'fused'"),
        ({"cost": "fused", "inner": "eager"}, "which fuses nothing"),
        ({"inductor": "max_autotune"}, "give a dict"),
        ({"inner": "eager", "inductor": {"max_autotune": True}}, "no effect"),
        ({"inductor": {"joint_custom_post_pass": print}}, "where memplan plans"),
        ({"out": 3}, "path of a .json or .html file or a function of a plan"),
    ],
)
def test_bad_options(given: dict[Any, Any], says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        Options.read(given, {})


@given(st.integers(0, 10**12), st.integers(0, 10**9), st.sampled_from([0.0, 0.02, 0.3]))
def test_the_budget_needed_for_a_peak_is_the_smallest(peak: int, fixed: int, reserve: float) -> None:
    needed = Budget(1, fixed, reserve).needed_for(peak)
    assert Budget(needed, fixed, reserve).available >= peak > Budget(needed - 1, fixed, reserve).available
