"""Chunked checkpointing: chunks are what they are said to be, plans are valid, and its limits are other policies."""

import bisect
import dataclasses
import itertools
import math
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import steps as recorded_steps
from memplan.errors import MemplanError
from memplan.ir import Budget, Machine, Offload, Plan, Step
from memplan.machines import machine
from memplan.passes.blocks import boundaries, frontiers
from memplan.passes.check import check
from memplan.passes.pipeline import evaluate
from memplan.passes.policies import Policy, find, name_of
from memplan.passes.policies.block_checkpoint import BlockCheckpoint, SqrtN
from memplan.passes.policies.chunked import WAYS, Chunked, Way, chunks, most
from memplan.passes.policies.offload import SMALL
from memplan.passes.policies.save_all import SaveAll
from memplan.passes.simulate import peak
from memplan.ranking import rank
from memplan.steps.generated import linear_chain
from tests.torch_free.random_steps import any_steps
from tests.torch_free.test_bound import machines

TARGET = dataclasses.replace(machine("h100"), host_bandwidth=50e9)
AMPLE = Budget(2**60, host_bytes=2**60)
IN_CI = ("densenet121_224", "llama8b_layers_4k_v32000", "lstm_128", "qwen3_moe_30b_4k", "unet_256")
AGAIN: tuple[Way, ...] = ("recompute",)
LOAD: tuple[Way, ...] = ("load",)
LLAMA, SMALL_STEPS = "llama8b_layers_4k_v32000", ("densenet121_224", "shared_blocks_2x2k", "unet_256")


def planned(step: Step, policy: Policy, budget: Budget = AMPLE, on: Machine = TARGET) -> Plan:
    return evaluate(step, policy(step, budget, on), budget, on, "eager", name_of(policy))


def size_of(step: Step, storages: Any) -> int:
    return sum(step.tensors[t].bytes for t in storages)


def on_device(plan: Plan) -> int:
    return size_of(plan.step, plan.saved - plan.offloads.keys())


def check_chunks(step: Step, size: int) -> None:
    inputs = frozenset[int]().union(*frontiers(step))
    found = chunks(step, size, inputs)
    ends = [b.op for b in boundaries(step)]
    places = [[step.producer[t][0] for t in chunk] for chunk in found]
    assert sorted(itertools.chain(*found)) == sorted(step.read_in_backward | inputs)  # each of them once
    assert list(itertools.chain(*places)) == sorted(itertools.chain(*places))
    for chunk, ops in zip(found, places, strict=True):
        assert len(chunk) == 1 or size_of(step, chunk) <= size
        assert not any(ops[0] < end <= ops[-1] for end in ends)
    for (one, ops), (other, later) in itertools.pairwise(zip(found, places, strict=True)):
        if not any(ops[-1] < end <= later[0] for end in ends):  # the next storage had no room
            assert size_of(step, one) + step.tensors[other[0]].bytes > size


@settings(deadline=None, max_examples=60)
@given(any_steps(), st.sampled_from((1, 10, 100, 1000, 10**9)))
def test_chunks_of_random_steps(step: Step, size: int) -> None:
    check_chunks(step, size)


@pytest.mark.parametrize("size", [2**20, 2**26, 2**28, 2**50])
def test_chunks_of_a_recorded_step(size: int) -> None:
    step = recorded_steps.load(LLAMA)
    check_chunks(step, size)
    if size == 2**50:
        assert len(frontiers(step)) <= len(chunks(step, size)) <= len(frontiers(step)) + 1


@st.composite
def policies(draw: st.DrawFn) -> Chunked:
    return Chunked(
        chunk=draw(st.sampled_from((1, 50, 500, 10**9))),
        ways=draw(st.sampled_from((WAYS, AGAIN, LOAD))),
        share=draw(st.none() | st.floats(0, 1)),
        segment=draw(st.integers(0, 3)),
        in_flight=draw(st.sampled_from((None, 0, 1))),
        small=draw(st.sampled_from((0, 50))),
    )


@settings(deadline=None, max_examples=100)
@given(any_steps(), machines(), policies(), st.sampled_from((0, 100, 1000, 10**6)), st.sampled_from((0, 200, 10**9)))
def test_every_plan_is_valid(step: Step, on: Machine, policy: Chunked, room: int, host: int) -> None:
    budget = Budget(step.base_bytes + room, host_bytes=host)
    plan = planned(step, policy, budget, on)
    assert check(plan) == []
    assert plan.peak == peak(step, plan.saved, plan.offloads)
    assert plan.timeline.host_peak <= host
    if "load" not in policy.ways:
        assert not plan.offloads
    if "recompute" not in policy.ways:
        assert not any(run.again for run in plan.backward)
    none = planned(step, SaveAll(), budget, on)
    if policy.share is None and none.fits:
        assert plan.fits
    inputs = frozenset[int]().union(*frontiers(step))
    fixed = {t for op in step.ops if op.fixed for t in op.outputs}
    assert plan.saved <= step.read_in_backward | inputs | fixed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in IN_CI)) for name in recorded_steps.names()]
)
def test_recorded_steps(name: str) -> None:
    """At several budgets: valid, no more than is saved without it, and less with less room."""
    step = recorded_steps.load(name)
    none = planned(step, SaveAll())
    shares = ((0.6, 0), (0.6, 10**12), (0.2, 0), (0.2, 10**12)) if name in (LLAMA, *SMALL_STEPS) else ((0.3, 10**12),)
    seen = list[int]()
    for share, host in shares:
        room = int(share * (none.peak - step.base_bytes))
        plan = planned(step, Chunked(), Budget(step.base_bytes + room, host_bytes=host))  # raises if it is not valid
        assert plan.peak < none.peak
        assert on_device(plan) <= size_of(step, plan.saved) <= on_device(none)
        seen.append(on_device(plan))
    assert len(seen) == 1 or max(seen[2:]) < min(seen[:2])


def test_its_limits_are_other_policies() -> None:
    for step in (recorded_steps.load(LLAMA), recorded_steps.load("unet_256"), linear_chain(20)):
        for chunk in (2**26,) if step.name == LLAMA else (1, 2**26, 2**50):
            for mine, other in (
                (Chunked(chunk, AGAIN, 0.0), BlockCheckpoint()),
                (Chunked(chunk, AGAIN, 0.0, segment=3), BlockCheckpoint(3)),
                (Chunked(chunk, AGAIN, 0.0, segment=0), SqrtN()),
                (Chunked(chunk, AGAIN, 1.0), SaveAll()),
                (Chunked(chunk), SaveAll()),
            ):
                assert planned(step, mine).decisions == planned(step, other).decisions, (step.name, mine)


def test_storages_of_a_chunk_are_decided_alike() -> None:
    """As chunks grow to blocks and beyond, blocks are; as they shrink, single storages."""
    step = recorded_steps.load(LLAMA)
    inputs = frozenset[int]().union(*frontiers(step))
    for chunk in (2**26, 2**50):
        kept = planned(step, Chunked(chunk, AGAIN, 0.4)).saved
        for storages in chunks(step, chunk, inputs):
            rest = set(storages) - inputs
            assert rest <= kept or not rest & kept
    assert len(chunks(step, 1)) == len(step.read_in_backward)
    plan = planned(step, Chunked(ways=LOAD, share=0.0, small=0))
    assert plan.offloads.keys() == plan.saved & step.offloadable


def test_a_share_is_what_is_kept() -> None:
    step = recorded_steps.load(LLAMA)
    none, seconds = on_device(planned(step, SaveAll())), list[float]()
    for share in (0.2, 0.4, 0.6, 0.8):
        plan = planned(step, Chunked(ways=AGAIN, share=share))
        loaded = planned(step, Chunked(ways=LOAD, share=share, small=0))
        assert 0.9 * share * none < on_device(plan) <= 1.09 * share * none  # what is read again is among all chunks
        assert 0.9 * share * none < on_device(loaded) < 1.001 * share * none  # and the loss, which cannot leave
        seconds.append(plan.overhead)
    assert seconds == sorted(seconds, reverse=True)
    small, large = (planned(step, Chunked(2**b, AGAIN, 0.4)).overhead for b in (20, 28))
    assert small < large


def test_what_the_bus_takes_in_time_is_loaded() -> None:
    step = recorded_steps.load(LLAMA)
    budget = Budget(step.base_bytes + 8 * 10**9, host_bytes=10**12)
    loads, again = (planned(step, Chunked(ways=ways), budget) for ways in (WAYS, AGAIN))
    assert loads.fits and again.fits and loads.overhead < again.overhead
    assert 0 < loads.timeline.stalled < 0.005 * loads.base_seconds
    slow, fast = (dataclasses.replace(TARGET, host_bandwidth=gb * 1e9) for gb in (5, 200))
    away = [size_of(step, planned(step, Chunked(), budget, on).offloads) for on in (slow, TARGET, fast)]
    assert 0 < away[0] < away[1] < away[2]
    host = dataclasses.replace(budget, host_bytes=10**9)
    assert 0 < planned(step, Chunked(), host).timeline.host_peak <= 10**9
    plan = planned(step, Chunked(share=0.0), host)  # what the host has no room for runs again
    kept = plan.saved - plan.offloads.keys() - frozenset[int]().union(*frontiers(step))
    assert plan.offloads and all(step.tensors[t].bytes < SMALL for t in kept)
    assert not any(
        isinstance(d, Offload) for d in Chunked()(step, dataclasses.replace(budget, host_bytes=0), TARGET).values()
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=300), st.integers(0, 300), st.integers(0, 60))
def test_the_most_that_fits(peaks: list[int], turn: int, room: int) -> None:
    """Exact where peaks fall and then rise, if a sixteenth of all numbers fits; room for the least is enough."""

    def found(of: list[int], room: int) -> int:
        tried = set[int]()
        most_of = most(lambda n: tried.add(n) or of[n], len(of) - 1, room)  # type: ignore[func-returns-value]
        assert len(tried) <= 50
        assert of[most_of] > room or most_of == len(of) - 1 or of[most_of + 1] > room
        return most_of

    assert peaks[found(peaks, -1)] > room or peaks[found(peaks, room)] <= room
    valley = sorted(peaks[:turn], reverse=True) + sorted(peaks[turn:])
    fitting = [n for n, size in enumerate(valley) if size <= room]
    assert not fitting or found(valley, room) == fitting[-1] or len(fitting) < len(valley) / 16
    rising = sorted(peaks)
    assert rising[0] > room or found(rising, room) == bisect.bisect(rising, room) - 1


def test_as_many_chunks_as_fit() -> None:
    """Of a step whose peak falls before it rises: no share that fits keeps more."""
    step = recorded_steps.load("unet_256")
    shares = [planned(step, Chunked(share=n / 16)) for n in range(17)]
    for room in (min(plan.peak for plan in shares), 8 * 10**9, 14 * 10**9):
        plan = planned(step, Chunked(), Budget(room))
        assert plan.fits and on_device(plan) >= max(on_device(p) for p in shares if p.peak <= room)
    least = planned(step, Chunked(), Budget(0))
    assert least.peak <= min(plan.peak for plan in shares) and planned(step, Chunked(), Budget(least.peak)).fits


def slope(depths: list[int], sizes: list[int]) -> float:
    return statistics.linear_regression([math.log(d) for d in depths], [math.log(s) for s in sizes]).slope


def test_what_crosses_against_depth() -> None:
    """A share of the chunks is 1 in log-log whatever the share is; only segments of sqrt(N) blocks are 1/2."""
    depths = [16, 32, 64, 128, 256]
    steps = [linear_chain(n) for n in depths]

    def of(policy: Policy) -> float:
        return slope(depths, [on_device(planned(step, policy)) for step in steps])

    assert of(Chunked(1, AGAIN, 0.4, segment=4)) == pytest.approx(1, abs=0.05)
    assert of(Chunked(1, AGAIN, 0.0, segment=0)) == pytest.approx(0.5, abs=0.05)
    loaded = [planned(step, Chunked(1, LOAD, 0.0, small=0)) for step in steps]
    assert [on_device(plan) for plan in loaded] == [0] * len(depths)
    assert slope(depths, [size_of(p.step, p.offloads) for p in loaded]) == pytest.approx(1, abs=0.05)


def test_it_is_ranked_with_the_others() -> None:
    step = recorded_steps.load("unet_256")
    rows = rank({"unet": step}, [TARGET], ["chunked", "optimal"], [15 * 10**9], host_bytes=10**12).rows
    here = {row.policy: row for row in rows}
    assert here["chunked"].fits and here["optimal"].overhead <= here["chunked"].overhead
    assert find("chunked") == Chunked()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        *(({"chunk": n}, "give a whole number of bytes, 1 or more") for n in (0, 1.5, math.nan, True, None, "64MB")),
        *(({"segment": n}, "give a whole number of blocks, 0 or more") for n in (-1, 1.5, None, "2")),
        *(({"small": n}, "give a whole number of bytes, 0 or more") for n in (-1, math.nan, None)),
        *(({"in_flight": n}, "give a whole number of copies, 0 or more") for n in (-1, math.nan, "1MB")),
        *(({"ways": n}, "is not what may become") for n in ((), 5, None, "load", ("keep",), (["load"],))),
        *(({"ways": n}, "give a tuple of 'recompute' and 'load'") for n in (["recompute"], {"load"})),
        *(({"share": n}, f"a share of {n!r}") for n in (-0.1, 1.5, math.nan, "40%", True)),
    ],
    ids=str,
)
def test_what_it_cannot_be_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        Chunked(**given)
