"""Small random programs over matrices, for properties that must hold of any code.

    @given(programs())
    def test_something(program):
        loss = program.run(program.inputs(seed=0))

What must hold: a program is a plain value whose repr rebuilds it, every drawn program runs, values and gradients are
finite, and all that it computes reaches the loss. Random numbers come from the global generator: seed it before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

Tensor = torch.Tensor
Shape = tuple[int, int]


@dataclass(frozen=True)
class Op:
    """`run(a, b, k)` returns a matrix or several; `fits` says which b go with a; k varies the op."""

    run: Callable[[Tensor, Tensor, int], Tensor | tuple[Tensor, ...]]
    fits: Callable[[Shape, Shape], bool] = lambda a, b: a == b


def _same_columns(a: Shape, b: Shape) -> bool:
    return a[1] == b[1]


def _topk(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, ...]:
    values, indices = a.topk(min(k + 1, a.shape[1]), dim=1)
    return values, b.gather(1, indices)


def _max(a: Tensor, b: Tensor, k: int) -> Tensor:
    values, indices = a.max(dim=1, keepdim=True)
    return values * b.gather(1, indices)


def _in_place(a: Tensor, b: Tensor, k: int) -> Tensor:
    out = a * 0.5
    change = (lambda: out.mul_(b), out.sin_, lambda: out.add_(b).tanh_(), out.relu_)[k]
    return change()


def _in_place_through_view(a: Tensor, b: Tensor, k: int) -> Tensor:
    out = a * 0.5
    out[k % a.shape[0]].copy_(b[0])
    out.t()[:1].mul_(0.5)
    return out


# tanh keeps the values of what could grow within 1.
OPS: dict[str, Op] = {
    "add": Op(lambda a, b, k: (a + b).tanh()),
    "mul": Op(lambda a, b, k: a * b),
    "mm": Op(lambda a, b, k: (a @ b).tanh(), lambda a, b: a[1] == b[0]),
    "mm_transposed": Op(lambda a, b, k: (a @ b.t()).tanh(), _same_columns),
    "addmm": Op(lambda a, b, k: torch.addmm(a[0], a, b).tanh(), lambda a, b: a[1] == b[0] == b[1]),
    "bmm": Op(lambda a, b, k: torch.bmm(a[None], b.t()[None])[0].tanh(), _same_columns),
    "relu": Op(lambda a, b, k: a.relu()),
    "sin": Op(lambda a, b, k: a.sin()),
    "tanh": Op(lambda a, b, k: a.tanh()),
    "softmax": Op(lambda a, b, k: a.softmax(k % 2)),
    "sum": Op(lambda a, b, k: a.sum(k % 2, keepdim=True).tanh()),
    "layer_norm": Op(lambda a, b, k: F.layer_norm(a, a.shape[1:], weight=b[0]).tanh()),
    "transpose": Op(lambda a, b, k: a.t()),
    "reshape": Op(lambda a, b, k: a.reshape(a.shape[1], a.shape[0])),
    "slice": Op(lambda a, b, k: a[k % a.shape[0] :, :: k + 1]),
    "expand": Op(lambda a, b, k: a[:1].expand(k + 1, -1)),
    "cat": Op(lambda a, b, k: torch.cat([a, b]), _same_columns),
    "split": Op(lambda a, b, k: a.split([1, a.shape[0] - 1]) if a.shape[0] > 1 else (a,)),
    "dropout": Op(lambda a, b, k: F.dropout(a, (0.1, 0.3, 0.5, 0.9)[k]).tanh()),
    "topk": Op(_topk),
    "max": Op(_max),
    "gather": Op(lambda a, b, k: b.gather(1, a.argmax(1, keepdim=True))),
    "embedding": Op(lambda a, b, k: F.embedding(a.argmax(1), b), lambda a, b: a[1] == b[0]),
    "in_place": Op(_in_place),
    "in_place_through_view": Op(_in_place_through_view),
}


@dataclass(frozen=True)
class Call:
    """One op; `a` and `b` index the values so far: the inputs, then all results in order."""

    op: str
    a: int
    b: int
    k: int = 0

    def run(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        out = OPS[self.op].run(values[self.a], values[self.b], self.k)
        return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Program:
    shapes: tuple[Shape, ...]
    requires_grad: tuple[bool, ...]
    calls: tuple[Call, ...]

    def inputs(self, seed: int = 0) -> list[Tensor]:
        """Fresh float32 leaves with values in (-1, 1)."""
        generator = torch.Generator().manual_seed(seed)
        return [
            (torch.rand(shape, generator=generator) * 2 - 1).requires_grad_(grad)
            for shape, grad in zip(self.shapes, self.requires_grad, strict=True)
        ]

    def run(self, tensors: list[Tensor]) -> Tensor:
        """The loss: the first input, which requires a gradient, plus every value that no call reads."""
        values = list(tensors)
        for call in self.calls:
            values.extend(call.run(values))
        read = {i for call in self.calls for i in (call.a, call.b)}
        unread = [v for i, v in enumerate(values) if i not in read]
        return torch.stack([v.sum() for v in [tensors[0], *unread]]).mean()


LARGEST = 256  # elements of a value


@st.composite
def programs(draw: st.DrawFn, max_calls: int = 12) -> Program:
    """Programs of up to `max_calls` ops over one to three inputs, of which the first requires a gradient."""
    side = st.integers(1, 8)
    shapes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    requires_grad = [True] + [draw(st.booleans()) for _ in shapes[1:]]
    values = [torch.empty(shape, device="meta") for shape in shapes]
    calls: list[Call] = []
    for _ in range(draw(st.integers(1, max_calls))):
        a = draw(st.integers(0, len(values) - 1))
        fitting = {name: [b for b, v in enumerate(values) if _fit(name, values[a], v)] for name in OPS}
        op = draw(st.sampled_from([name for name, bs in fitting.items() if bs]))
        call = Call(op, a, draw(st.sampled_from(fitting[op])), draw(st.integers(0, 3)))
        results = call.run(values)
        if all(v.numel() <= LARGEST for v in results):
            calls.append(call)
            values.extend(results)
    return Program(tuple(shapes), tuple(requires_grad), tuple(calls))


def _fit(name: str, a: Tensor, b: Tensor) -> bool:
    return OPS[name].fits((a.shape[0], a.shape[1]), (b.shape[0], b.shape[1]))
