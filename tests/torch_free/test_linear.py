"""linear.py: a dive ends in whole variables that every row allows, near the relaxation, in few programs."""

import dataclasses
from random import Random

import numpy as np
import pytest

from memplan import steps
from memplan.machines import machine
from memplan.passes.chain import chain
from memplan.passes.linear import WHOLE, Program, Solution
from memplan.passes.master import _Master
from memplan.passes.policies.offload import SMALL

NEAR = 0.01  # of the relaxation's cost


def whole_and_allowed(program: Program, found: Solution) -> bool:
    """Judged by the rows as they were added."""
    values = np.where(program.whole, np.round(found.values), found.values)
    sums = np.zeros(len(program.low))
    for row, variable, coefficient in program.entries:
        sums[row] += coefficient * values[variable]
    inside = np.all(sums >= np.array(program.low) - WHOLE) and np.all(sums <= np.array(program.high) + WHOLE)
    return bool(inside and np.all(np.abs(values - found.values) <= WHOLE))


def assignment(random: Random, blocks: int) -> Program:
    """An option for each block, inside of two rooms that some choice fits."""
    program, room = Program(), [list[tuple[int, float]](), list[tuple[int, float]]()]
    for _ in range(blocks):
        options = [program.variable(1, cost=random.random() * k, whole=True) for k in range(4)]
        program.row([(v, 1) for v in options], low=1, high=1)
        for terms in room:
            terms += [(v, (4 - k) * random.random()) for k, v in enumerate(options)]
    for terms in room:
        program.row(terms, high=1.4 * blocks)
    return program


@pytest.mark.parametrize("seed", range(8))
def test_what_a_dive_finds_is_allowed(seed: int) -> None:
    program = assignment(Random(seed), 40)
    least, bounds = program.relaxed(), (list(program.lower), list(program.upper))
    found = program.dived()
    assert least is not None and found is not None
    assert whole_and_allowed(program, found) and found.cost >= least.cost - WHOLE
    assert (program.lower, program.upper) == bounds
    assert found.values.tolist() == program.dived().values.tolist()  # type: ignore[union-attr]


def test_a_chain_of_many_blocks_takes_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    target = dataclasses.replace(machine("h100"), host_bandwidth=50e9)
    links = chain(steps.load("llama8b_layers_4k_v32000"), target, 1, SMALL)
    program = _Master(links, 11 * 10**9, 10**12, target).lp
    solved, relaxed = list[Program](), Program.relaxed
    monkeypatch.setattr(Program, "relaxed", lambda self: (solved.append(self), relaxed(self))[1])
    found, least = program.dived(), relaxed(program)
    assert found is not None and least is not None and whole_and_allowed(program, found)
    assert found.cost <= (1 + NEAR) * least.cost
    assert len(links.blocks) > 60 and len(solved) < len(links.blocks) / 2  # where nothing stays it takes about as many
