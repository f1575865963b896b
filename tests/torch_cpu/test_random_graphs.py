"""The random programs keep their promises, and aot_eager computes what eager does, bit for bit."""

import torch
from hypothesis import given, settings

from tests.random_graphs import OPS, Call, Program, programs


def loss_and_gradients(run, program):
    tensors = program.inputs(seed=1)
    torch.manual_seed(2)
    loss = run(tensors)
    loss.backward()
    return [loss.detach(), *(t.grad for t in tensors if t.grad is not None)]


@settings(max_examples=50, deadline=None)
@given(programs())
def test_aot_eager_is_eager(program):
    torch._dynamo.reset()
    eager = loss_and_gradients(program.run, program)
    compiled = loss_and_gradients(torch.compile(program.run, backend="aot_eager", fullgraph=True), program)
    assert len(eager) == len(compiled)
    for a, b in zip(eager, compiled, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@settings(max_examples=100, deadline=None)
@given(programs())
def test_a_program_is_its_repr(program):
    assert eval(repr(program), {"Program": Program, "Call": Call}) == program


def test_every_op_runs():
    for name in OPS:
        program = Program(((4, 4),), (True,), tuple(Call(name, 0, 0, k) for k in range(4)))
        assert all(g.isfinite().all() for g in loss_and_gradients(program.run, program))
