"""Gather's backward without zeros: the same bits, and left alone where more than one value may meet."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memplan.passes import one_hot


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def scatter(index, value):
    return torch.zeros(3, 5).scatter_add(1, index, value)


def test_one_value_per_row_has_the_same_bits() -> None:
    index, value = torch.tensor([[4], [0], [2]]), torch.tensor([[1.5], [-0.0], [-2.0]])
    graph = traced(scatter, index, value)
    assert one_hot.rewrite(graph) == 1
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.scatter_add.default)
    found, wanted = graph(index, value), scatter(index, value)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))  # the sign of zero too


def test_what_may_meet_is_left_alone() -> None:
    many = (torch.tensor([[4, 4], [0, 1], [2, 2]]), torch.ones(3, 2))
    fewer_rows = (torch.tensor([[4], [0]]), torch.ones(2, 1))
    for inputs in (many, fewer_rows):
        assert one_hot.rewrite(traced(scatter, *inputs)) == 0
    onto_values = traced(lambda base, i, v: base.scatter_add(1, i, v), torch.ones(2, 5), *fewer_rows)
    assert one_hot.rewrite(onto_values) == 0
