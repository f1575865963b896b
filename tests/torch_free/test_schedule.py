"""The order of execution: program order, each recomputation once and just before its use."""

import dataclasses

from hypothesis import given, settings

from memplan.ir import Keep, Recompute, Run, Step, Tensor
from memplan.passes.schedule import closure, saved_by, schedule
from tests.torch_free.random_steps import steps, steps_and_saved


@settings(deadline=None, max_examples=60)
@given(steps_and_saved())
def test_every_op_runs_in_order_and_once_per_graph(case: tuple[Step, frozenset[int]]) -> None:
    step, saved = case
    forward, backward = schedule(step, saved)
    first = len(step.forward.ops)
    assert [run.op for run in forward if run.op < first] == list(range(first))
    own = [run.op for run in backward if step.saveable.isdisjoint(step.ops[run.op].outputs)]
    assert own == [first + k for k, op in enumerate(step.backward.ops) if step.saveable.isdisjoint(op.outputs)]
    for runs in (forward, backward):
        assert len({run.op for run in runs}) == len(runs)
    ahead = {run.op for run in forward}
    assert all(run.again == (run.op in ahead) for run in backward)
    assert not any(run.again for run in forward)


@settings(deadline=None, max_examples=60)
@given(steps_and_saved())
def test_what_runs_again_is_read_and_cannot_be_later(case: tuple[Step, frozenset[int]]) -> None:
    step, saved = case
    _, backward = schedule(step, saved)
    for moment, run in enumerate(backward):
        made = set(step.ops[run.op].outputs)
        if not run.again:
            continue
        rest = backward[moment + 1 :]
        assert any(made.intersection(step.ops[r.op].inputs) for r in rest) or made.intersection(step.backward.outputs)
        # Between it and the op it was made for run only ops that wait for the same op.
        waiting = [r for r in rest if step.saveable.isdisjoint(step.ops[r.op].outputs)][:1]
        if waiting:
            reads, available = step.ops[waiting[0].op].inputs, set(step.resident) | saved | set(step.backward.inputs)
            for r in backward[:moment]:
                available.update(step.ops[r.op].outputs)
            assert run.op in closure(step, reads, available)


@settings(deadline=None, max_examples=60)
@given(steps_and_saved())
def test_the_same_again(case: tuple[Step, frozenset[int]]) -> None:
    step, saved = case
    assert schedule(step, saved) == schedule(step, sorted(saved, reverse=True))


@settings(deadline=None, max_examples=60)
@given(steps())
def test_what_no_decision_mentions_is_kept(step: Step) -> None:
    assert saved_by(step, {}) == step.read_in_backward
    every = {t: Recompute() for t in step.read_in_backward}
    assert saved_by(step, every) == frozenset()
    assert saved_by(step, every | {t: Keep() for t in step.saveable}) == step.saveable


def test_a_recomputed_chain(step: Step) -> None:
    names = {t.name: i for i, t in enumerate(step.tensors)}
    kept = {names["tanh_1"], names["tanh_3"]}
    tangent = len(step.tensors)
    ops = tuple(dataclasses.replace(op, inputs=(*op.inputs, tangent)) for op in step.backward.ops)
    after = dataclasses.replace(step.backward, ops=ops, inputs=(tangent,))
    step = dataclasses.replace(
        step, tensors=(*step.tensors, Tensor("tangent", 4, "input")), graphs=(step.forward, after)
    )
    _, backward = schedule(step, kept)
    order = [("again " if run.again else "") + step.ops[run.op].name for run in backward]
    assert order == ["grad_3", "again mm_2", "again tanh_2", "grad_2", "grad_1", "again mm_0", "again tanh_0", "grad_0"]
    assert backward[0] == Run(len(step.forward.ops))
