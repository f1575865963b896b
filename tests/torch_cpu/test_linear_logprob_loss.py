"""A loss with its gradient in the same pass: the same as log-probs first, and the loss on them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import memplan
from memplan.errors import MemplanError
from memplan.runtime.kernels.linear_logprob import head, linear_logprob, linear_logprob_loss, rows
from memplan.runtime.kernels.linear_logprob import loss as module


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    monkeypatch.setattr(head, "COLUMNS", 128)
    monkeypatch.setattr(module, "STRIP", 16 * 300 * 8)
    torch.manual_seed(0)
    yield


def clipped(logprob: Tensor, old: Tensor, gain: Tensor) -> Tensor:
    """DAPO's, of each row, with k3."""
    ratio, d = (logprob - old).exp(), old - 0.1 - logprob
    return (-torch.minimum(ratio * gain, ratio.clamp(0.8, 1.28) * gain) + 0.04 * (d.expm1() - d)) / 50


def batch(dtype: Any = torch.float64) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """Hidden, weight and bias; labels; old log-probs near the new ones, some clipped, and advantages."""
    hidden, weight, bias = (x.to(dtype) for x in (torch.randn(50, 20), torch.randn(300, 20), torch.randn(300)))
    labels = torch.randint(0, 300, (50,))
    now = linear_logprob(hidden, weight, labels, bias=bias)
    return [x.requires_grad_() for x in (hidden, weight, bias)], labels, (now + 0.3 * torch.randn(50), torch.randn(50))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [None, True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_it_is_the_loss_of_the_log_probs(
    softcap: float | None, masked: bool | None, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """masked: the rows that do not count are left out, or computed as on devices where their number is unknown."""
    monkeypatch.setattr(rows, "leaves_out", lambda device: masked is not False)
    (hidden, weight, bias), labels, data = batch()
    leaves = [hidden] if frozen else [hidden, weight, bias]
    for x in (weight, bias):
        x.requires_grad_(not frozen)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "temperature": 0.8}
    mask = torch.ones(50) if masked is None else (torch.arange(50) % 3 != 0).double()
    expected = linear_logprob(hidden, weight, labels, mask=mask, **options)
    exact = (clipped(expected, *data) * mask).sum()
    total, logprob = linear_logprob_loss(
        hidden, weight, labels, clipped, data, mask=None if masked is None else mask, **options
    )
    assert torch.equal(logprob, expected)
    assert not logprob.requires_grad
    torch.testing.assert_close(total, exact)
    torch.testing.assert_close(torch.autograd.grad(total * 3, leaves), torch.autograd.grad(exact * 3, leaves))


def test_equal_bits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, bias), labels, data = batch(torch.float32)
    with torch.no_grad():
        total, logprob = linear_logprob_loss(hidden, weight, labels, clipped, data, bias=bias)
    assert torch.equal(logprob, linear_logprob(hidden, weight, labels, bias=bias))
    assert not total.requires_grad


def test_float16_with_a_scaled_loss() -> None:
    """The coefficient is divided by 163,840 before it meets 65536: nothing is lost in between."""
    leaves, labels, _ = batch(torch.float16)
    gain = torch.randn(50).sign() * (0.5 + torch.rand(50))
    total, _ = linear_logprob_loss(*leaves[:2], labels, lambda x, a: x * a / 163_840, (gain,), bias=leaves[2])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logprobs = torch.nn.functional.linear(*exact).log_softmax(-1)
    right = (logprobs.gather(1, labels[:, None]).squeeze(1) * gain).sum() / 163_840
    found = torch.autograd.grad(total * 65_536, leaves)
    for a, b in zip(found, torch.autograd.grad(right * 65_536, exact), strict=True):
        assert a.dtype == torch.float16
        assert float((a.double() - b).norm() / b.norm()) < 1e-3
    assert (found[0] != 0).any(1).all()


def test_there_is_one_backward() -> None:
    leaves, labels, data = batch()
    total, _ = linear_logprob_loss(*leaves[:2], labels, clipped, data)
    total.backward(retain_graph=True)
    with pytest.raises(MemplanError, match="has one backward"):
        total.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks, after a break
def test_a_compiled_step_breaks_here(fresh_dynamo: None) -> None:
    leaves, labels, data = batch()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob_loss(hidden * 2, weight, labels, clipped, data)[0] * 3

    compiled = torch.compile(step, backend="aot_eager")
    found, exact = (torch.autograd.grad(f(*leaves[:2]), leaves[:2]) for f in (compiled, step))
    torch.testing.assert_close(found, exact)


def test_memory_is_gradients_and_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients become .grad without a copy."""
    monkeypatch.setattr(head, "COLUMNS", 2048)
    monkeypatch.setattr(module, "STRIP", 2**19)
    hidden, weight = torch.randn(512, 64, requires_grad=True), torch.randn(8192, 64, requires_grad=True)
    labels, gain = torch.randint(0, 8192, (512,)), torch.randn(512)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_logprob_loss(hidden, weight, labels, lambda x, a: x * a, (gain,))[0].backward()

    step()
    hidden.grad = weight.grad = None
    with memplan.record() as seen:
        step()
    assert seen.timeline.peak_above_base <= hidden.nbytes + weight.nbytes + 2**19 + 2**17


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    h, w, t = torch.randn(4, 3), torch.randn(9, 3), torch.zeros(4, dtype=torch.int64)
    run: Any = linear_logprob_loss
    yield r"data\[0\] \[3\] does not fit", lambda: run(h, w, t, lambda x, y: x, (torch.ones(3),))
    yield "wants a gradient", lambda: run(h, w, t, lambda x, y: x, (torch.ones(4, requires_grad=True),))
    yield r"return one value per row", lambda: run(h, w, t, lambda x: x.sum())
    yield "label 9 is no token", lambda: run(h, w, t + 9, lambda x: x)
    yield "temperature=0", lambda: run(h, w, t, lambda x: x, temperature=0)


@pytest.mark.parametrize(("message", "call"), list(refusals()))
def test_refusals(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(MemplanError, match=message):
        call()
