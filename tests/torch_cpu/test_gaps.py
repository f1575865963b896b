"""What Python runs outside of compiled graphs, between them or after the last, counts against the budget from the
second call on.
"""

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit
from memplan.ir import Plan
from memplan.runtime.window import Session, Span

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WIDTH, ROWS = 32, 512
SIZE = 4 * WIDTH * ROWS


@torch._dynamo.disable(reason="a part that nobody compiles")
def outside(x: torch.Tensor) -> torch.Tensor:
    """Keeps eight times what it is given for its backward, and allocates twelve times."""
    wide = torch.cat([x, x, x, x], 1)
    return wide.exp().sin()[:, :WIDTH].contiguous() + 0 * torch.zeros(ROWS * 4, WIDTH).sum()


class Middle(nn.Module):
    """Two graphs, and something large between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(outside(self.first(x))).square().mean()


class Head(Middle):
    """One graph; the loss, whose logits are wide, is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, 8 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


LABELS = torch.arange(ROWS) % (8 * WIDTH)
CASES = {
    Middle: lambda model, x: model(x),
    Head: lambda model, x: nn.functional.cross_entropy(model(x).float().div(0.7), LABELS[: len(x)]),
}
Loss = Callable[[Callable, torch.Tensor], torch.Tensor]


def rows(count: int = ROWS) -> torch.Tensor:
    return torch.linspace(-1, 1, count * WIDTH).sin().view(count, WIDTH)


def peak_of(loss: Loss, model: Callable, net: nn.Module, x: torch.Tensor) -> int:
    gc.collect()
    with memplan.record("cpu") as seen:
        loss(model, x).backward()
    there = x.nbytes + LABELS.nbytes + sum(p.nbytes for p in net.parameters())
    return seen.timeline.peak_above_base + there


def least(kind: type[nn.Module], inner: str) -> int:
    """The budget that refusals ask for, until there is none."""
    budget, x = 10**5, rows()
    for _ in range(10):
        torch._dynamo.reset()
        net = kind()
        model = torch.compile(net, backend=memplan_backend, options={"inner": inner, "budget": budget})
        try:
            for _ in range(4):
                CASES[kind](model, x).backward()
                net.zero_grad()
            return budget
        except Exception as e:
            refused = getattr(e, "inner_exception", e)
            assert isinstance(refused, DoesNotFit), e
            budget = refused.smallest
    raise AssertionError("asked for more ten times")


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        (Middle, "eager"),
        pytest.param(Middle, "inductor", marks=pytest.mark.slow),
        (Head, "eager"),
        (Head, "inductor"),
    ],
)
def test_the_budget_holds_with_what_is_outside(kind, inner, made) -> None:
    loss, x, net = CASES[kind], rows(), kind()
    unplanned = torch.compile(net, backend="aot_eager")
    loss(unplanned, x).backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    everything = peak_of(loss, unplanned, net, x)
    smallest = least(kind, inner)
    assert smallest < 0.9 * everything
    for part in (0.0, 0.5):
        torch._dynamo.reset()
        made.clear()
        net, budget = kind(), int(smallest + part * (everything - smallest))
        model = torch.compile(net, backend=memplan_backend, options={"inner": inner, "budget": budget})
        for _ in range(3):
            net.zero_grad()
            loss(model, x).backward()
        for p, g in zip(net.parameters(), expected, strict=True):
            assert torch.equal(p.grad, g) if inner == "eager" else torch.allclose(p.grad, g, atol=1e-6)
        whole, count = made[-1], len(made)
        assert any("Python after graph 1" in b.name for b in whole.timeline.blocks)
        for _ in range(2):
            net.zero_grad()
            peak = peak_of(loss, model, net, x)
            assert peak <= whole.peak + LABELS.nbytes <= budget + LABELS.nbytes
            assert whole.peak - peak <= 3 * SIZE  # results are counted until the backward of their graph has run
        assert len(made) == count
    gap = whole.step.gaps[0]
    assert gap.bytes >= 12 * SIZE and (kind is Head or gap.kept >= 4 * SIZE)


class Beside(Head):
    """What comes back beside the logits, as a cache does, is what backward reads."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        beside = []
        for layer in self.first:
            beside.append(x := layer(x))
        return self.second(x), beside


def test_results_that_are_dropped_make_no_room(made: list[Plan]) -> None:
    """Though the caller drops them before its loss runs: this plan keeps them, or the next one does."""
    model = torch.compile(Beside(), backend=memplan_backend, options={"inner": "eager", "budget": 10**8})
    for _ in range(3):
        logits, beside = model(rows())
        del beside
        nn.functional.cross_entropy(logits, LABELS).backward()
    (gap,) = made[-1].step.gaps
    assert gap.bytes >= logits.nbytes  # of its log-probabilities


@pytest.mark.parametrize("stays", [False, True])
def test_a_result_that_is_dropped_makes_room_if_no_plan_may_keep_it(stays: bool) -> None:
    session = Session()
    dropped = torch.empty(3 * SIZE, dtype=torch.uint8)
    span = Span.opened(session, {dropped.data_ptr(): dropped.nbytes} if stays else {})
    del dropped
    new, left = torch.empty(4 * SIZE, dtype=torch.uint8), torch.empty(SIZE, dtype=torch.uint8)
    del new
    span.close({})
    session.end()
    assert span.whole and span.measured() == (5 * SIZE if stays else 2 * SIZE, SIZE) and left.nbytes == SIZE


def test_a_loss_inside_needs_no_second_plan(made) -> None:
    net, x = Middle(), rows()
    model = torch.compile(lambda x: net.first(x).square().mean(), backend=memplan_backend, options={"inner": "eager"})
    for _ in range(3):
        model(x).backward()
    assert len(made) == 1


def test_results_that_are_dropped_end_the_measuring(made) -> None:
    """The profiler is not left running."""
    net, x = Head(), rows()
    model = torch.compile(net, backend=memplan_backend, options={"inner": "eager"})
    out = model(x)
    assert torch._C._autograd._profiler_enabled()
    del out
    assert not torch._C._autograd._profiler_enabled()
    with memplan.record("cpu") as seen:  # neither is a recording refused
        CASES[Head](model, x).backward()
    assert seen.timeline.peak_above_base > 8 * SIZE


def test_lengths(made) -> None:
    """What runs outside is larger at larger sizes, and was not seen there: it is scaled, and then measured."""
    net = Head()
    smallest = least(Head, "eager")
    torch._dynamo.reset()
    made.clear()
    budget = int(1.6 * smallest)
    model = torch.compile(net, backend=memplan_backend, options={"inner": "eager", "budget": budget}, dynamic=True)
    for count in (100, 200, 100, ROWS, 300, ROWS, ROWS):
        CASES[Head](model, rows(count)).backward()
        net.zero_grad()
    assert peak_of(CASES[Head], model, net, rows()) <= budget + LABELS.nbytes
    assert len(made) <= 6


def clean() -> bool:
    """Nothing of a measurement is left."""
    return not torch._C._autograd._profiler_enabled() and not torch.autograd.profiler._is_profiler_enabled and (
        torch.autograd.backward.__module__ == "torch.autograd" and not hasattr(torch.autograd.backward, "__wrapped__")
    )  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_it(reentrant: bool) -> None:
    """Backward runs the forward graph again, and must see what it saw."""
    results = []
    for backend, options in (("aot_eager", {}), (memplan_backend, {"options": {"inner": "eager"}})):
        torch._dynamo.reset()
        net = Head()
        model = torch.compile(net, backend=backend, **options)
        for _ in range(3):
            net.zero_grad()
            x = rows().requires_grad_()
            logits = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            nn.functional.cross_entropy(logits, LABELS).backward()
            assert clean()
        results.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backward_by_other_ways() -> None:
    net, x = Head(), rows()
    model = torch.compile(net, backend=memplan_backend, options={"inner": "eager"})
    loss = CASES[Head](model, x)
    torch.autograd.grad(loss, list(net.parameters()))
    assert clean()
    loss = CASES[Head](model, x)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for _ in range(2):  # what another thread could not end, the next call does
        CASES[Head](model, x).backward()
    assert clean()


def test_the_users_profiler_sees_what_it_should() -> None:
    net, x = Head(), rows()
    model = torch.compile(net, backend=memplan_backend, options={"inner": "eager"})
    loss = CASES[Head](model, x)
    with torch.profiler.profile() as seen:
        loss.backward()
    assert any("mm" in event.name for event in seen.events())
    assert clean()


def test_the_users_own_backward_stays() -> None:
    net, x = Head(), rows()
    model = torch.compile(net, backend=memplan_backend, options={"inner": "eager"})
    loss = CASES[Head](model, x)
    before, calls = torch.autograd.backward, []

    def own(*args, **kwargs):
        calls.append(1)
        return before(*args, **kwargs)

    torch.autograd.backward = own
    try:
        loss.backward()
        assert calls and torch.autograd.backward is own
    finally:
        torch.autograd.backward = before.__wrapped__
    assert clean()
