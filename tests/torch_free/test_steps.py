"""The steps that come with memplan: all of them load, have the structure that they are there for, and plans."""

import dataclasses
import itertools

import pytest

from memplan import steps
from memplan.ir import Budget
from memplan.machines import machine
from memplan.passes.blocks import frontiers
from memplan.passes.pipeline import evaluate
from memplan.passes.policies.optimal import Optimal
from memplan.passes.simulate import peak
from memplan.steps.generated import UNIT, layered, least_ops, linear_chain

H100 = machine("h100")


@pytest.mark.parametrize("name", steps.names())
def test_a_recorded_step_is_whole(name: str) -> None:
    step = steps.load(name)
    assert step.name == name
    made = [t for op in step.ops for t in op.outputs]
    assert len(made) == len(set(made))  # every storage is made once
    there = {*step.resident, *step.backward.inputs}
    for op in step.ops:
        assert there.issuperset(op.inputs), op.name
        there.update(op.outputs)
    assert peak(step, step.read_in_backward) > step.base_bytes
    for _, saved in step.saved_by:
        assert step.saveable.issuperset(saved)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("llama70b_lora_8k", 2 * 80),
        ("llama405b_lora_8k", 2 * 126),
        ("t5_large", 24 + 24),
        ("lstm_128", 128),
        ("shared_blocks_2x2k", 2 * 12),
    ],
)
def test_blocks_are_found(name: str, least: int) -> None:
    """At least one boundary a layer, or a token of a scan, although what all of them read passes over each."""
    assert len(frontiers(steps.load(name))) >= least


@pytest.mark.parametrize(("length", "units", "ops"), [(8, 8, 18), (16, 10, 40), (32, 14, 84)])
def test_the_chains_of_checkmate(length: int, units: int, ops: int) -> None:
    """The optima of Jain et al. 2020 need nothing twice but once: the planner's class has them, and it finds them."""
    step, budget = linear_chain(length), Budget(units * UNIT)
    plan = evaluate(step, Optimal(small=0)(step, budget, H100), budget, H100, "eager", "optimal")
    assert plan.fits
    assert len(plan.forward) + len(plan.backward) - 1 == ops == least_ops(length, units)  # the loss is free


def test_the_least_ops_of_a_chain_are_those_of_the_best_of_all_plans() -> None:
    step = linear_chain(8)
    fewest = dict[int, int]()
    for kept in itertools.chain.from_iterable(itertools.combinations(sorted(step.saveable), n) for n in range(9)):
        units = peak(step, frozenset(kept)) // UNIT
        fewest[units] = min(fewest.get(units, 99), 2 * 8 + 8 - len(set(kept) & step.read_in_backward))
    assert {units: least_ops(8, units) for units in fewest} == fewest
    assert min(fewest) == 6


def test_layered_graphs_are_what_their_seed_says() -> None:
    assert layered(3) == layered(3) != layered(4)
    step = layered(3)
    for share in (0.6, 0.9):
        budget = Budget(int(share * peak(step, step.read_in_backward)))
        plan = evaluate(step, Optimal()(step, budget, H100), budget, H100, "eager", "optimal")
        assert plan.fits and plan.overhead > 0


def test_what_is_known_of_a_step_goes_with_it() -> None:
    step, calls = linear_chain(3), list[int]()

    def count(of: object, n: int) -> int:
        calls.append(n)
        return n

    assert [step.once(count, 1), step.once(count, 1), step.once(count, 2)] == [1, 1, 2]
    assert calls == [1, 2]
    assert dataclasses.replace(step).once(count, 1) == 1 and calls == [1, 2, 1]
    assert dataclasses.replace(step) == step
