"""Predicted bytes are those of an executor that drops every name after its last use; recorded figures come out."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import steps
from memplan.errors import MemplanError
from memplan.ir import Budget, Keep, Machine, Plan, Polynomial, Recompute, Run, Step, Tensor
from memplan.passes.pipeline import evaluate
from memplan.passes.policies.torch_saved import recorded
from memplan.passes.schedule import schedule
from memplan.passes.simulate import peak, simulate
from memplan.passes.totals import totals
from tests.torch_free.random_steps import LAYOUTS, MACHINE, steps_and_saved

RECORDED = "llama8b_layers_4k_v32000"
ROOFLINE = Machine("roofline-v1", "cuda", 80 * 10**9, 2.6e12, (("bfloat16", 600e12), ("float32", 600e12)))


def executed(step: Step, forward: tuple[Run, ...], backward: tuple[Run, ...], saved: frozenset[int]) -> list[int]:
    """Bytes alive while each run runs, by executing the runs over two name spaces, one per graph."""
    totals, states = [], dict[int, int]()  # op -> bytes of the generator state kept for its second run
    held: dict[int, int] = {}  # the caller's: forward's outputs, and what it keeps for backward
    names: dict[int, int] = {}
    replayed = {run.op for run in backward if run.again}
    for graph, runs, returned in ((step.forward, forward, set(step.forward.outputs) | saved),
                                  (step.backward, backward, set(step.backward.outputs))):  # fmt: skip
        if graph is step.backward:
            wanted = {t for run in runs for t in step.ops[run.op].inputs} | returned
            names = {t: 0 if t in step.forward.outputs else size for t, size in held.items() if t in saved & wanted}
            held = {t: size for t, size in held.items() if t in step.forward.outputs}
            held |= {t: step.tensors[t].bytes for t in step.backward.inputs}
        for moment, run in enumerate(runs):
            op, inside = step.ops[run.op], 0
            for t in op.outputs:
                if t in names:
                    inside += step.tensors[t].bytes  # made anew beside the saved one, and dropped at once
                else:
                    names[t] = step.tensors[t].bytes
            inside += op.workspace_bytes
            if run.again:
                inside += op.rng_bytes
            elif run.op in replayed:
                states[run.op] = op.rng_bytes
            totals.append(step.base_bytes + sum(held.values()) + sum(names.values()) + sum(states.values()) + inside)
            if run.again:
                states.pop(run.op)
            later = {t for rest in runs[moment + 1 :] for t in step.ops[rest.op].inputs} | returned
            names = {t: size for t, size in names.items() if t in later}
        held |= names
    return totals


@settings(deadline=None, max_examples=60)
@given(steps_and_saved())
def test_bytes_are_an_executors(case: tuple[Step, frozenset[int]]) -> None:
    step, saved = case
    forward, backward = schedule(step, saved)
    read = {t for run in backward for t in step.ops[run.op].inputs} | set(step.backward.outputs)
    crossing = saved & read
    timeline = simulate(step, (forward, backward), crossing, MACHINE)
    expected = executed(step, forward, backward, crossing)
    assert list(timeline.totals) == expected
    assert timeline.peak == max(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_peak_is_the_timelines(fused: bool, layout: str) -> None:
    @settings(deadline=None, max_examples=40)
    @given(steps_and_saved(fused=fused, layout=layout))
    def check(case: tuple[Step, frozenset[int]]) -> None:
        step, saved = case
        assert peak(step, saved) == simulate(step, schedule(step, saved), saved, MACHINE).peak

    check()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(LAYOUTS)).flatmap(lambda layout: steps_and_saved(layout=layout)), st.integers(1, 3))
def test_fetches_are_there_as_long_as_lifetimes_say(case: tuple[Step, frozenset[int]], every: int) -> None:
    graphs = (
        dataclasses.replace(g, ops=tuple(dataclasses.replace(op, fetches=k % every == 0) for k, op in enumerate(g.ops)))
        for g in case[0].graphs
    )
    step, saved = dataclasses.replace(case[0], graphs=tuple(graphs)), case[1]
    runs = schedule(step, saved)
    assert (totals(step, runs, saved) + step.base_bytes).tolist() == list(simulate(step, runs, saved, MACHINE).totals)


@settings(deadline=None, max_examples=60)
@given(steps_and_saved())
def test_time_is_the_sum_of_the_runs(case: tuple[Step, frozenset[int]]) -> None:
    step, saved = case
    forward, backward = schedule(step, saved)
    timeline = simulate(step, (forward, backward), saved, MACHINE)
    assert timeline.seconds == pytest.approx(sum(MACHINE.seconds(step.ops[r.op]) for r in (*forward, *backward)))


def of_recorded(policy: str) -> Plan:
    step = steps.load(RECORDED)
    decisions = recorded(step, policy) if policy.startswith("torch") else {t: Keep() for t in step.read_in_backward}
    return evaluate(step, decisions, Budget(10**12), ROOFLINE, "eager", policy)


@pytest.mark.parametrize(
    ("policy", "gigabytes", "percent"),
    [
        ("save-all", 29.642, 0.0),
        ("torch-budget-0.8", 13.97, 4.36),
        ("torch-budget-0.4", 9.86, 13.55),
        ("torch-budget-0.3", 7.73, 16.86),
        ("torch-budget-0.2", 5.59, 19.97),
        ("torch-budget-0.1", 3.82, 23.25),
    ],
)
def test_figures_found_by_another_simulator(policy: str, gigabytes: float, percent: float) -> None:
    plan = of_recorded(policy)
    assert plan.peak / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert 100 * plan.overhead == pytest.approx(percent, abs=0.005)
    assert plan.base_seconds == pytest.approx(0.452, abs=0.0005)


def test_recorded_steps_are_found_by_name() -> None:
    assert RECORDED in steps.names()
    with pytest.raises(MemplanError, match=f"'llama8b'; did you mean '{RECORDED}'|there are .*{RECORDED}"):
        steps.load("llama8b")
    with pytest.raises(MemplanError, match=f"did you mean '{RECORDED}'"):
        steps.load(RECORDED.replace("32000", "3200"))


def test_sizes_follow_their_symbols(step: Step) -> None:
    polynomial = Polynomial(((4, (("b", 1), ("t", 2))), (8, (("t", 1),)), (3, ())))
    assert polynomial.at({"b": 5, "t": 10}) == 4 * 5 * 100 + 8 * 10 + 3
    grown = Tensor("x", 0, "activation", formula=polynomial)
    dynamic = dataclasses.replace(step, tensors=(*step.tensors, grown), sizes=(("b", 1), ("t", 1)))
    there = dynamic.at(b=5, t=10)
    assert there.tensors[-1].bytes == 2083
    assert there.tensors[:-1] == step.tensors  # what has no formula does not change
    assert there.at(b=1).sizes == (("b", 1), ("t", 10))
    with pytest.raises(MemplanError, match=r"\['s'\] are not in this step"):
        dynamic.at(s=3)


def test_decisions_name_what_is_alive(step: Step) -> None:
    kept = next(t for t, x in enumerate(step.tensors) if x.name == "tanh_0")
    decisions = {t: Recompute() for t in step.read_in_backward} | {kept: Keep()}
    plan = evaluate(step, decisions, Budget(2**30), MACHINE, "eager", "by hand")
    of = {b.decision: {x.name for x in plan.timeline.blocks if x.decision == b.decision} for b in plan.timeline.blocks}
    assert of["keep"] == {"tanh_0", "loss"}  # the loss is forward's result
    assert {step.tensors[t].name for t in step.read_in_backward - {kept}} < of["recompute"]
