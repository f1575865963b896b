"""The fused head as an op: what torch requires of one, under compilers, and the memory it takes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import memplan
from memplan.runtime.kernels.linear_logprob import head, linear_logprob, ops

MIB = 2**20


def arguments(
    way: str, *, masked: bool = True, bias: bool = True, trained: bool = True, **options: Any
) -> tuple[Any, ...]:
    """Those of the op, where all that is optional is there or not."""
    torch.manual_seed(0)
    wants = {"requires_grad": trained and way != "vectors"}
    return (
        torch.randn(30, 8, requires_grad=trained),
        torch.randn(40, 8, **wants),
        torch.randint(0, 40, (30,)),
        torch.randn(40, **wants) if bias else None,
        torch.arange(30) % 4 != 0 if masked else None,
        None,
        0.7,
        1.2,
        options.get("softcap"),
        torch.float32,
        options.get("entropy", False),
        way,
    )


@pytest.mark.parametrize("way", ["auto", "rows", "vocab", "vectors"])
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(way: str, entropy: bool) -> None:
    torch.library.opcheck(torch.ops.memplan.linear_logprob.default, arguments(way, entropy=entropy, softcap=3.0))
    torch.library.opcheck(
        torch.ops.memplan.linear_logprob.default,
        arguments(way, entropy=entropy, masked=False, bias=False),
    )


@pytest.mark.parametrize("way", ["auto", "rows", "vocab"])
@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False]])
def test_opcheck_of_backward(way: str, needs: list[bool]) -> None:
    hidden, weight, labels, bias, mask, scale, *form, entropy, _ = arguments("rows", entropy=True, trained=False)
    found = ops.linear_logprob(hidden, weight, labels, bias, mask, scale, *form, entropy, "rows")
    grads, given = (torch.randn(30), torch.randn(30)), (hidden, weight, labels, bias, mask, scale)
    torch.library.opcheck(
        torch.ops.memplan.linear_logprob_backward.default,
        (*grads, *given, found[0], found[1], found[2], *form, way, needs),
    )
    vectors = ops.linear_logprob(hidden, weight, labels, bias, mask, scale, *form, entropy, "vectors")[3:]
    torch.library.opcheck(torch.ops.memplan.scale_vectors.default, (*grads, *vectors, mask, torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("frozen", [False, True])
def test_one_graph_of_any_length(backend: str, frozen: bool, fresh_dynamo: None) -> None:
    weight = torch.randn(300, 16, requires_grad=not frozen)
    torch._dynamo.utils.counters.clear()

    def step(hidden: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logprob, entropy = linear_logprob(hidden * 2, weight, labels, mask=mask, entropy=True, temperature=0.9)
        return (logprob.exp() - 0.1 * entropy).sum() / 7

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (37, 5, 64):
        hidden, labels = torch.randn(2, tokens, 16, requires_grad=True), torch.randint(0, 300, (2, tokens))
        mask = torch.rand(2, tokens) < 0.7
        leaves = [hidden] if frozen else [hidden, weight]
        found = torch.autograd.grad(compiled(hidden, labels, mask), leaves)
        expected = torch.autograd.grad(step(hidden, labels, mask), leaves)
        torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast_inside_a_compiled_step(fresh_dynamo: None) -> None:
    weight, hidden, labels = torch.randn(300, 16), torch.randn(20, 16, requires_grad=True), torch.randint(0, 300, (20,))

    def step(hidden: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_logprob(hidden, weight, labels).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(*[torch.autograd.grad(f(hidden), hidden)[0] for f in (step, compiled)])


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[tuple[int, int, int]]:
    """T, D, V, with logits of 8 MiB, and tiles of 0.25 MiB."""
    monkeypatch.setattr(head, "ROWS", 128)
    monkeypatch.setattr(head, "COLUMNS", 512)
    yield 512, 32, 4096


def peak(step: Any, largest: int) -> int:
    """Bytes above what was there, and no block above `largest`."""
    step()
    with memplan.record() as seen:
        kept = step()
    del kept
    blocks = [b.bytes for b in seen.timeline.blocks if b.start > 0 or b.name != "allocated before"]
    assert max(blocks) <= largest
    return seen.timeline.peak_above_base


@pytest.mark.parametrize(("dtype", "entropy"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("way", ["rows", "vocab", "vectors"])
def test_never_all_logits(way: str, entropy: bool, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Gradients, the sums that api.py names, and a few tiles."""
    tokens, width, vocabulary = sizes
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=way != "vectors")
    labels = torch.randint(0, vocabulary, (tokens,))
    leaves = [hidden, weight] if weight.requires_grad else [hidden]

    def step() -> Any:
        out = linear_logprob(hidden, weight, labels, entropy=entropy, way=way)  # type: ignore[call-overload]
        return torch.autograd.grad(sum(o.sum() for o in (out if entropy else (out,))), leaves)

    floor = sum(x.nbytes for x in leaves)
    narrow = dtype != torch.float32
    sums = {
        "rows": 4 * weight.numel() * narrow,
        "vocab": 4 * hidden.numel() * narrow,
        "vectors": 4 * hidden.numel() * (1 + entropy),
    }[way]
    assert peak(step, max(weight.numel(), hidden.numel()) * 4) <= floor + sums + (1 + entropy) * MIB // 4 + MIB // 2


def test_log_probs_alone_take_a_tile(sizes: tuple[int, int, int]) -> None:
    tokens, width, vocabulary = sizes
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    labels = torch.randint(0, vocabulary, (tokens,))
    assert peak(lambda: linear_logprob(hidden, weight, labels), MIB // 4 + 64) <= MIB // 2
