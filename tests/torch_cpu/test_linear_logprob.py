"""Log-probs, entropies and gradients of the fused head against the formula, in float64 where it is exact."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memplan.errors import MemplanError
from memplan.runtime.kernels.linear_logprob import head, linear_logprob, reference, rows
from memplan.runtime.kernels.linear_logprob.head import Form, Head

WAYS = ("rows", "vocab", "vectors")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """Several tiles in both directions at these sizes."""
    monkeypatch.setattr(head, "ROWS", 24)
    monkeypatch.setattr(head, "COLUMNS", 128)
    torch.manual_seed(0)
    yield


@dataclass
class Case:
    """A head and some rows; `vectors` has it frozen."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None

    @staticmethod
    def make(
        tokens: int = 50, width: int = 20, vocabulary: int = 300, dtype: Any = torch.float64, **kw: bool
    ) -> "Case":
        hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
        bias = torch.randn(vocabulary).to(dtype) if kw.get("bias") else None
        return Case(hidden, weight, torch.randint(0, vocabulary, (tokens,)), bias)

    def leaves(self, way: str, dtype: Any = None) -> list[Tensor]:
        """Fresh tensors of these values that want gradients, in the order hidden, weight, bias."""
        wanted = [self.hidden] if way == "vectors" else [self.hidden, self.weight, self.bias]
        return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in wanted if x is not None]

    def run(self, way: str, *, leaves: Sequence[Tensor] = (), **options: Any) -> Any:
        """The fused head."""
        h, w, b = self.filled(leaves)
        return linear_logprob(h, w, self.labels, bias=b, way=way, **options)  # type: ignore[call-overload]

    def filled(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Hidden, weight and bias, where there are no leaves instead."""
        own = [self.hidden, self.weight, self.bias]
        return [*leaves, *own[len(leaves) :]]


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula, with all logits at once."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logprobs = (z / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


def gradients(outputs: Any, leaves: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=False))
    return list(torch.autograd.grad(total, leaves))


def error(found: Tensor, exact: Tensor) -> float:
    """Root mean square, relative."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "logit_scale": 1.3}, {"softcap": 2.5, "temperature": 0.7}]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_formula(way: str, bias: bool, entropy: bool, options: dict[str, Any]) -> None:
    case = Case.make(bias=bias)
    weights = [torch.randn(50), torch.randn(50)]
    leaves = case.leaves(way)
    found = case.run(way, leaves=leaves, entropy=entropy, **options)
    h, w, b = case.filled(leaves)
    exact = plain(h, w, case.labels, b, **options)[: 1 + entropy]
    torch.testing.assert_close(found if entropy else (found,), exact)
    torch.testing.assert_close(gradients(found, leaves, weights), gradients(exact, leaves, weights))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(way: str, softcap: float | None) -> None:
    case = Case.make(tokens=5, width=3, vocabulary=7, bias=True)

    def run(*leaves: Tensor) -> Any:
        return case.run(way, leaves=leaves, entropy=True, softcap=softcap, temperature=0.8)

    assert torch.autograd.gradcheck(run, case.leaves(way))


def test_entropy_alone_has_its_gradient() -> None:
    case = Case.make()
    for way in WAYS:
        leaves = case.leaves(way)
        h, w, _ = case.filled(leaves)
        found = torch.autograd.grad(case.run(way, leaves=leaves, entropy=True)[1].sum(), leaves)
        torch.testing.assert_close(found, torch.autograd.grad(plain(h, w, case.labels)[1].sum(), leaves))


@pytest.mark.parametrize("way", WAYS)
def test_tiles_change_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.make(tokens=100, vocabulary=1000)
    seen = []
    for r, c in ((1000, 2048), (16, 2048), (40, 256), (17, 128)):
        monkeypatch.setattr(head, "ROWS", r)
        monkeypatch.setattr(head, "COLUMNS", c)
        leaves = case.leaves(way)
        out = case.run(way, leaves=leaves)
        seen.append([out.detach(), *gradients(out, leaves, [torch.linspace(-1, 1, 100)])])
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_rows_have_equal_bits(dtype: torch.dtype) -> None:
    """Whatever the way, with gradients or without, and whatever else is in the batch."""
    torch.set_num_threads(2)
    case = Case.make(tokens=100, width=64, vocabulary=1000, dtype=dtype)
    with torch.no_grad():
        old = case.run("auto")
    assert all(torch.equal(case.run(way, leaves=case.leaves(way)), old) for way in WAYS)
    assert all(torch.equal(case.run(way, leaves=case.leaves(way), entropy=True)[0], old) for way in WAYS)
    for some in (slice(0, 1), slice(3, 8), slice(50, 100), slice(7, 90)):
        part = Case(case.hidden[some], case.weight, case.labels[some])
        assert torch.equal(part.run("auto"), old[some])
    mask = torch.arange(100) % 3 == 0
    assert torch.equal(case.run("auto", mask=mask)[mask], old[mask])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("margin", [0.0, 10.0, 20.0, 50.0, -20.0, -50.0])
def test_margins(way: str, margin: float) -> None:
    """Far beyond where log_softmax in float32 is 0 with gradient 0."""
    z = torch.randn(40, 300)
    labels = torch.randint(0, 300, (40,))
    lead = z.scatter(1, labels[:, None], -torch.inf).logsumexp(1) + margin
    case = Case(z.scatter(1, labels[:, None], lead[:, None]), torch.eye(300), labels)
    exact, leaves = case.leaves(way, torch.float64), case.leaves(way)
    h, w, _ = case.filled(exact)
    formula = -torch.nn.functional.softplus(
        (h @ w.double().T).scatter(1, labels[:, None], -torch.inf).logsumexp(1) - (h * w.double()[labels]).sum(1),
        threshold=1000,
    )
    found = case.run(way, leaves=leaves)
    assert error(found, formula) < 1e-4  # z itself has 50 * 2^-24
    for a, b in zip(
        gradients(found, leaves, [torch.ones(40)]), gradients(formula, exact, [torch.ones(40)]), strict=True
    ):
        assert float(b.norm()) > 0
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_gradients_scale_with_what_comes_back(way: str) -> None:
    """Exactly, for a power of two: nothing in between is rounded to less than float32."""
    case = Case.make(dtype=torch.float32)
    weights = torch.randn(50)
    leaves = case.leaves(way)
    once = gradients(case.run(way, leaves=leaves), leaves, [weights])
    scaled = gradients(case.run(way, leaves=leaves), leaves, [weights * 2**16])
    assert all(torch.equal(a * 2**16, b) for a, b in zip(once, scaled, strict=True))
    expanded = torch.autograd.grad(case.run(way, leaves=leaves).sum() * 3, leaves)
    torch.testing.assert_close(
        list(expanded), gradients(case.run(way, leaves=leaves), leaves, [torch.full((50,), 3.0)])
    )


@pytest.mark.parametrize("way", WAYS)
def test_float16_with_a_scaled_loss(way: str) -> None:
    """GradScaler's 65536, and a loss divided by 163,840 tokens: no row becomes 0."""
    case = Case.make(tokens=64, width=32, vocabulary=1000, dtype=torch.float16)
    gain = torch.randn(64).sign() * (0.5 + torch.rand(64))
    leaves, exact = case.leaves(way), case.leaves(way, torch.float64)
    out = case.run(way, leaves=leaves)
    assert out.dtype == torch.float32
    loss = (out * gain).sum() / 163_840 * 65_536
    h, w, _ = case.filled(exact)
    right = torch.autograd.grad((plain(h, w.double(), case.labels)[0] * gain).sum() / 163_840 * 65_536, exact)
    for a, b in zip(torch.autograd.grad(loss, leaves), right, strict=True):
        assert a.dtype == torch.float16
        assert error(a, b) < 1e-3
        assert not ((a == 0).all(1) & (b != 0).any(1)).any()


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_rounded_once(way: str) -> None:
    case = Case.make(tokens=200, width=64, vocabulary=1000, dtype=torch.bfloat16)
    case.weight = case.weight / 8
    leaves, exact = case.leaves(way), case.leaves(way, torch.float64)
    weights = [torch.randn(200)]
    out = case.run(way, leaves=leaves)
    h, w, _ = case.filled(exact)
    formula = plain(h, w.double(), case.labels)[0]
    assert out.dtype == torch.float32
    assert error(out, formula) < 1e-6
    for a, b in zip(gradients(out, leaves, weights), gradients(formula, exact, weights), strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, b) < 2.5e-3  # that of rounding to 8 bits: 1.7 to 1.8e-3


@pytest.mark.parametrize("per_row", [False, True])
def test_float8_weights(per_row: bool) -> None:
    case = Case.make(dtype=torch.float32)
    scale = case.weight.abs().amax(1 if per_row else (0, 1)) / 448
    narrow = (case.weight / (scale[:, None] if per_row else scale)).to(torch.float8_e4m3fn)
    wide = narrow.float() * (scale[:, None] if per_row else scale)
    for way in ("vectors", "rows"):
        h = case.hidden.clone().requires_grad_()
        out = linear_logprob(h, narrow, case.labels, weight_scale=scale, way=way)  # type: ignore[call-overload]
        exact = plain(h, wide, case.labels)[0]
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), h), torch.autograd.grad(exact.sum(), h))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masked_rows_take_no_part(way: str, left_out: bool, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where they are left out, nor as on devices where their number is unknown; whatever they hold."""
    monkeypatch.setattr(rows, "leaves_out", lambda device: left_out)
    case, mask = Case.make(dtype=dtype, bias=True), torch.arange(50) % 3 != 1
    some = Case(case.hidden[mask], case.weight, case.labels[mask], case.bias)
    case.hidden[~mask], case.labels[~mask] = torch.nan, -100
    weights = [torch.randn(50), torch.randn(50)]
    weights[0][~mask] = torch.inf
    leaves, others = case.leaves(way), some.leaves(way)
    out = case.run(way, leaves=leaves, mask=mask.float(), entropy=True)
    right = some.run(way, leaves=others, entropy=True)
    for a, b in zip(out, right, strict=True):
        assert (a[~mask] == 0).all()
        torch.testing.assert_close(a[mask], b)
    found = torch.autograd.grad(out, leaves, weights)
    expected = torch.autograd.grad(right, others, [w[mask] for w in weights])
    assert (found[0][~mask] == 0).all()
    torch.testing.assert_close((found[0][mask], *found[1:]), tuple(expected), rtol=2**-7, atol=1e-7)


def test_no_row_counts() -> None:
    case = Case.make()
    for way in WAYS:
        leaves = case.leaves(way)
        out = case.run(way, leaves=leaves, mask=torch.zeros(50))
        assert (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("way", WAYS)
def test_nobody_waits_for_the_device(way: str) -> None:
    """On tensors without data, whatever asks for a value raises. Masks and labels are where one would."""
    with torch.device("meta"):
        hidden, weight, labels = torch.empty(50, 20), torch.empty(300, 20), torch.empty(50, dtype=torch.int64)
        mask, grad = torch.empty(50, dtype=torch.bool), torch.empty(50)
    whole = Head(weight, None, None, Form(softcap=3.0))
    out = reference.forward(hidden, whole, labels, mask, entropy=True, vectors=way == "vectors")
    given = reference.Coefficients(grad, grad, out.logprob_T, out.total_T, out.entropy_T, labels)
    if way != "vectors":
        needs = (True, True, False)
        reference.backward(hidden, whole, rows.Rows(50, mask), given, way=way, needs=needs)
    with pytest.raises(RuntimeError):
        bool(out.logprob_T.sum())


@pytest.mark.parametrize("way", WAYS)
def test_autocast_holds_in_backward_too(way: str) -> None:
    case = Case.make(dtype=torch.float32)
    rounded = Case(case.hidden.bfloat16().double(), case.weight.bfloat16().double(), case.labels)
    leaves, exact = case.leaves(way), rounded.leaves(way)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(way, leaves=leaves)
    h, w, _ = rounded.filled(exact)
    formula = plain(h, w, case.labels)[0]
    assert error(out, formula) < 1e-6
    outside = gradients(out, leaves, [torch.ones(50)])
    for a, b in zip(outside, gradients(formula, exact, [torch.ones(50)]), strict=True):
        assert a.dtype == torch.float32
        assert error(a, b) < 1e-5
    for mask in (None, torch.arange(50) % 3 != 0):  # products take another way where rows are left out
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = case.run(way, leaves=leaves, mask=mask)
            within = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        assert all(map(torch.equal, within, torch.autograd.grad(out.sum(), leaves)))


def test_leading_dimensions_and_strides() -> None:
    case = Case.make(tokens=60)
    expected = case.run("rows")
    shaped = linear_logprob(case.hidden.view(3, 20, 20), case.weight, case.labels.view(3, 20))
    assert torch.equal(shaped, expected.view(3, 20))
    strided = linear_logprob(case.hidden.T.contiguous().T, case.weight.T.contiguous().T, case.labels.int())
    torch.testing.assert_close(strided, expected)
    shifted = linear_logprob(case.hidden.view(3, 20, 20)[:, :-1], case.weight, case.labels.view(3, 20)[:, 1:])
    torch.testing.assert_close(
        shifted, plain(case.hidden.view(3, 20, 20)[:, :-1], case.weight, case.labels.view(3, 20)[:, 1:])[0]
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(0, 300), (1, 300), (50, 1), (1, 1), (3, 129)])
def test_small_sizes(way: str, tokens: int, vocabulary: int) -> None:
    case = Case.make(tokens=tokens, vocabulary=vocabulary)
    leaves = case.leaves(way)
    out = case.run(way, leaves=leaves, entropy=True)
    h, w, _ = case.filled(leaves)
    exact = plain(h, w, case.labels)
    torch.testing.assert_close(out, exact)
    weights = [torch.ones(tokens), torch.ones(tokens)]
    torch.testing.assert_close(gradients(out, leaves, weights), gradients(exact, leaves, weights))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite(way: str) -> None:
    """nan and inf in logits give what log_softmax gives: in the target, before it, after it, and everywhere."""
    z = torch.randn(12, 300, dtype=torch.float64)
    labels = torch.full((12,), 150)
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        z[row, 150], z[3 + row, 2], z[6 + row, 299], z[9 + row] = value, value, value, value
    z[11, 150] = 0  # all but the target
    case = Case(torch.eye(12, dtype=torch.float64), torch.zeros(300, 12, dtype=torch.float64), labels)
    # A product with infinite weights would spread them: the logits come in through the bias, row by row.
    for row in range(12):
        one = Case(case.hidden[row : row + 1], case.weight, labels[:1], z[row])
        leaves = [one.hidden.clone().requires_grad_()]
        found = one.run("vectors" if way == "vectors" else way, leaves=leaves)
        torch.testing.assert_close(found, z[row].log_softmax(0)[labels[:1]], equal_nan=True)


def test_second_derivatives_are_refused() -> None:
    case = Case.make()
    for way in WAYS:
        leaves = case.leaves(way)
        (first, *_) = torch.autograd.grad(case.run(way, leaves=leaves).square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            first.sum().backward()


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    h, w, t = torch.randn(4, 3), torch.randn(9, 3), torch.zeros(4, dtype=torch.int64)
    trained = w.clone().requires_grad_()
    run: Any = linear_logprob
    yield "label 9 is no token", lambda: run(h, w, t + 9)
    yield "label -100 is no token.*mask=labels >= 0", lambda: run(h, w, t - 100)
    yield r"hidden \[4, 3\] and weight \[9, 4\] do not fit", lambda: run(h, torch.randn(9, 4), t)
    yield r"labels \[3\]", lambda: run(h, w, t[:3])
    yield "labels .* of torch.float32", lambda: run(h, w, t.float())
    yield r"mask \[3\] does not fit", lambda: run(h, w, t, mask=torch.ones(3))
    yield r"bias \[3\] does not fit", lambda: run(h, w, t, bias=torch.ones(3))
    yield "has no tokens", lambda: run(h, w[:0], t)
    yield "torch.int64 are not offered", lambda: run(h, t.view(1, 4)[:, :3], t)
    yield "temperature=0", lambda: run(h, w, t, temperature=0)
    yield "softcap=-1.*or None", lambda: run(h, w, t, softcap=-1)
    yield "logit_scale=nan", lambda: run(h, w, t, logit_scale=float("nan"))
    yield "'row' is not offered.*did you mean 'rows'", lambda: run(h, w, t, way="row")
    yield "frozen head", lambda: run(h, trained, t, way="vectors")
    yield "weight_scale goes with float8", lambda: run(h, w, t, weight_scale=torch.ones(1))
    yield "weight_scale goes with float8", lambda: run(h, w.to(torch.float8_e4m3fn), t)
    yield r"weight_scale \[2\]", lambda: run(h, w.to(torch.float8_e4m3fn), t, weight_scale=torch.ones(2))
    yield "one device", lambda: run(h, w, t.to("meta"))


@pytest.mark.parametrize(("message", "call"), list(refusals()))
def test_refusals(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(MemplanError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
