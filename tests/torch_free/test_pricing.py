"""Cost models: a fused chain pays its memory traffic once, boundaries are written, and bytes are what they were."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import steps as recorded_steps
from memplan.errors import MemplanError
from memplan.ir import Budget, Fusion, Graph, Machine, Op, Step, Tensor
from memplan.passes.blocks import frontiers
from memplan.passes.pipeline import evaluate
from memplan.passes.pricing import priced
from memplan.passes.simulate import peak
from tests.torch_free.random_steps import LAYOUTS, MACHINE, steps, steps_and_saved
from tests.torch_free.test_bound import ROOFLINE

N = 100  # bytes of a storage


class Forward:
    """A forward graph over storages of N bytes, written op by op; nothing runs backward. A wide storage is there from
    the first op to the last, so that no block boundary is between them.
    """

    def __init__(self) -> None:
        self.tensors = [Tensor("x", N, "input"), Tensor("wide", 100 * N, "activation")]
        self.ops = [Op("wide", "op", (0,), (1,), traffic=0, dtype="float32")]

    def op(self, fusion: Fusion, *inputs: int) -> int:
        self.tensors.append(Tensor(f"t{len(self.tensors)}", N, "activation"))
        out, traffic = len(self.tensors) - 1, N * (len(inputs) + 1)
        self.ops.append(Op(f"t{out}", "op", inputs, (out,), traffic=traffic, dtype="float32", fusion=fusion))
        return out

    def moved(self, *outputs: int) -> list[int]:
        """Bytes that each op is priced at, but for the first."""
        last = Op("last", "op", (1,), (), traffic=0, dtype="float32")
        graphs = (
            Graph("forward", (*self.ops, last), (0,), outputs),
            Graph("backward", (), (), (), "backward"),
        )
        found = priced(Step("by hand", tuple(self.tensors), graphs, (0,), fused=True), "fused")
        return [round(MACHINE.seconds(op) * MACHINE.bandwidth) for op in found.ops[1:-1]]


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_a_chain_pays_once(length: int) -> None:
    forward = Forward()
    below = forward.op("extern", 0)
    for _ in range(length):
        below = forward.op("pointwise", below)
    first, *chain, last = forward.moved(forward.op("extern", below))
    assert (first, last) == (2 * N, 2 * N)  # an extern op moves what it says
    assert chain == [0] * (length - 1) + [2 * N]


def test_what_is_read_by_several_kernels_is_read_by_each() -> None:
    forward = Forward()
    made = forward.op("extern", 0)
    inlined = forward.op("pointwise", made)
    ends = [forward.op("extern", forward.op("pointwise", inlined)) for _ in range(3)]
    assert forward.moved(*ends) == [2 * N, 0, *[2 * N, 2 * N] * 3]


def test_what_reads_much_is_written() -> None:
    """Nine products added up one by one: a fusing compiler writes a sum once its kernel would read more than it may."""
    forward = Forward()
    products = [forward.op("extern", 0) for _ in range(9)]
    total = products[0]
    for other in products[1:]:
        total = forward.op("pointwise", total, other)
    sums = forward.moved(forward.op("reduction", total))[len(products) :]
    assert sums == [0] * 7 + [(9 + 1) * N, 2 * N]


def test_a_table_is_read_where_it_is_looked_up() -> None:
    """A lookup that is fused reads as many elements as it has, not the table."""
    forward = Forward()
    forward.tensors.append(Tensor("table", 4 * 10**6, "parameter", (10**6,), "float32"))
    looked_up = forward.op("pointwise", 2)
    out = forward.op("pointwise", looked_up)
    forward.tensors[out] = dataclasses.replace(forward.tensors[out], shape=(N // 4,), dtype="float32")
    assert forward.moved(out) == [0, 2 * N]


def test_block_boundaries_are_written() -> None:
    """A residual stream is read by the next layer alone: nothing else would write it."""
    step = recorded_steps.load("llama8b_layers_4k_v32000")
    found = priced(step, "fused")
    written = {t for op in found.ops if op.priced is None or op.priced for t in op.outputs}
    assert len(frontiers(step)) > 32
    assert frozenset().union(*frontiers(step)) <= written


def test_the_recorded_step_takes_less_by_its_pointwise_ops() -> None:
    step = recorded_steps.load("llama8b_layers_4k_v32000")
    found = priced(step, "fused")
    for before, after in zip(step.ops, found.ops, strict=True):
        if before.fusion == "extern":
            assert ROOFLINE.seconds(after) == ROOFLINE.seconds(before)
    alone, fused = (sum(map(ROOFLINE.seconds, s.ops)) for s in (step, found))
    assert 0.7 * alone < fused < 0.9 * alone
    assert priced(found, "roofline-v1") == step


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(LAYOUTS)).flatmap(lambda layout: steps_and_saved(fused=True, layout=layout)))
def test_a_cost_model_changes_no_byte(pair: tuple[Step, frozenset[int]]) -> None:
    step, saved = pair
    found = priced(step, "fused")
    assert found.cost == "fused" and priced(found, "fused") == found
    assert priced(found, "roofline-v1") == step
    assert peak(found, saved) == peak(step, saved)
    for before, after in zip(step.ops, found.ops, strict=True):
        assert after.priced is None or after.priced >= 0
        assert dataclasses.replace(after, priced=None) == before


@settings(deadline=None, max_examples=30)
@given(steps(fused=True))
def test_the_simulator_adds_up_the_same_prices(step: Step) -> None:
    found = priced(step, "fused")
    plan = evaluate(found, {}, Budget(2**40), MACHINE, "inductor", "save-all")
    assert plan.base_seconds == pytest.approx(sum(MACHINE.seconds(op) for op in found.ops))
    again = sum(MACHINE.seconds(found.ops[run.op]) for runs in plan.runs for run in runs)
    assert plan.timeline.seconds == pytest.approx(again)


def test_a_step_that_says_nothing_of_fusion_is_refused(step: Step) -> None:
    graphs = tuple(
        dataclasses.replace(g, ops=tuple(dataclasses.replace(op, fusion="extern") for op in g.ops)) for g in step.graphs
    )
    silent = dataclasses.replace(step, graphs=graphs)
    with pytest.raises(MemplanError, match=r"no op of step 'toy' says that it can be fused.*cost='roofline-v1'"):
        priced(silent, "fused")
    assert priced(silent, "roofline-v1") == silent


def test_attention_has_a_rate_of_its_own() -> None:
    op = Op("a", "aten._scaled_dot_product_flash_attention.default", (), (), flops=10**12, dtype="bfloat16")
    other = dataclasses.replace(op, target="aten.mm.default")
    machine = Machine("m", "cpu", 1, 1e9, (("float32", 1e12), ("bfloat16", 2e12)), attention=(("bfloat16", 5e11),))
    assert (machine.seconds(op), machine.seconds(other)) == (2.0, 0.5)
    assert machine.seconds(dataclasses.replace(op, dtype="float32")) == 1.0  # none was measured: that of products
