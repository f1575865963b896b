"""What people do to a compiled step that a plan is not made for: each works as it does without memplan, or is refused
with a line that says what is wrong.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import MemplanError

# Dynamo's own, when it compiles a graph that begins with the result of another.
pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def network() -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 1))


ROWS = torch.linspace(-1, 1, 64 * 32).view(64, 32)
TIGHT = {"inner": "eager", "policy": "block-checkpoint"}


def planned(step: Callable, **options) -> Callable:
    return torch.compile(step, backend=memplan_backend, options=TIGHT | options)


def gradients(net: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return found


def expected(net: nn.Module, step: Callable) -> list[torch.Tensor]:
    torch.compile(step, backend="aot_eager")(ROWS).backward()
    torch._dynamo.reset()
    return gradients(net)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_break_inside_the_loss(made) -> None:
    net = network()

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = net(x).square()
        torch._dynamo.graph_break()
        return loss.mean()

    reference = expected(net, step)
    compiled = planned(step)
    for _ in range(3):
        compiled(ROWS).backward()
        assert same(gradients(net), reference)
    assert len(made[-1].step.graphs) == 4


def test_backward_twice_is_torchs_error() -> None:
    net = network()
    loss = planned(lambda x: net(x).square().mean())(ROWS)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_retain_graph() -> None:
    """A second backward through a graph that was retained recomputes from what was kept, to the same bits."""
    net = network()

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x).square().mean()

    reference = expected(net, step)
    loss = planned(step)(ROWS)
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert same(gradients(net), reference)


def test_two_steps_before_a_backward(made) -> None:
    """What both keep counts: they are planned as one step from the second time on."""
    net = network()

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x).square().mean()

    compiled = planned(step)
    for _ in range(3):
        first, second = compiled(ROWS), compiled(-ROWS)
        (first + second).backward()
        found = gradients(net)
    (torch.compile(step, backend="aot_eager")(ROWS) + torch.compile(step, backend="aot_eager")(-ROWS)).backward()
    assert same(found, gradients(net))
    assert len(made[-1].step.graphs) == 4


def test_results_kept_without_their_graph(made) -> None:
    """A forward whose backward nobody can call leaves nothing, so it is no part of a later step."""
    net = network()
    compiled = planned(lambda x: net(x).square().mean())
    compiled(ROWS).backward()
    kept = [compiled(ROWS).detach() for _ in range(5)]
    for old in kept:
        (compiled(ROWS) - old).square().backward()
    assert [len(p.step.graphs) for p in made] == [2]


def test_without_gradients(made) -> None:
    net = network()
    compiled = planned(lambda x: net(x).square().mean(), budget=10_000_000)
    with torch.no_grad():
        loss = compiled(ROWS)
    assert torch.equal(loss, net(ROWS).square().mean())
    assert not made  # nothing to plan
    compiled(ROWS).backward()
    assert len(made) == 1


def test_mode_is_not_taken() -> None:
    net = network()
    with pytest.raises(Exception, match=r"Either mode or options can be specified|memplan takes options"):
        torch.compile(net, backend="memplan", mode="max-autotune", options={"budget": "1GB"})(ROWS)
    with pytest.raises(Exception, match=r"torch.compile was given \['mode'\]; memplan takes options="):
        torch.compile(net, backend="memplan", mode="max-autotune")(ROWS)


def test_compiled_inside_compiled(made) -> None:
    """The inner torch.compile is traced through: one graph, one plan, with the outer's options."""
    net = network()
    inner = torch.compile(net, backend="aot_eager")

    def step(x: torch.Tensor) -> torch.Tensor:
        return inner(x).square().mean()

    reference = expected(net, lambda x: net(x).square().mean())
    planned(step)(ROWS).backward()
    assert same(gradients(net), reference)
    assert [len(p.step.graphs) for p in made] == [2]


def test_rows_that_a_mask_chooses(made) -> None:
    """A size that depends on data is planned at its bound."""
    net = network()

    def step(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return net(x[mask]).square().mean()

    masks = [torch.arange(64) % 3 == 0, torch.ones(64, dtype=torch.bool), torch.arange(64) < 2]
    resident = ROWS.nbytes + masks[0].nbytes + sum(p.nbytes for p in net.parameters())
    results, peaks = [], []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = planned(step)
        for mask in masks:
            compiled(ROWS, mask).backward()
            results.append(gradients(net))
            with memplan.record("cpu") as seen:
                compiled(ROWS, mask).backward()
            gradients(net)
            peaks.append(seen.timeline.peak_above_base + resident)
        compiled = torch.compile(step, backend="aot_eager")
        for mask, found in zip(masks, results, strict=True):
            compiled(ROWS, mask).backward()
            assert same(gradients(net), found)
    (plan,) = made
    assert max(peaks) <= plan.peak
    assert not all(op.fixed for op in plan.step.forward.ops)


def test_a_step_that_returns_nothing_to_plan() -> None:
    with pytest.raises(MemplanError, match="the step has no backward"):
        memplan.plan(lambda x: x * 2, ROWS, inner="eager")
