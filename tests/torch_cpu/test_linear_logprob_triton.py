"""The CUDA kernels against the reference, run on the CPU by triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

CODE = """
import dataclasses, itertools, sys
import torch
from memplan.runtime.kernels.linear_logprob import head, reference, triton
from memplan.runtime.kernels.linear_logprob.head import Form, Head
from memplan.runtime.kernels.linear_logprob.rows import Rows
from memplan.runtime.kernels.linear_logprob import rows as rows_module

head.ROWS, head.COLUMNS = 48, 128
rows_module.leaves_out = lambda device: False  # as on CUDA
torch.manual_seed(0)
dtype, multiply = getattr(torch, sys.argv[1]), sys.argv[2] == "True"
triton.WIDEST = 1024 if multiply else 0
cases = (None, False, False, False), (None, True, True, True), (3.0, True, False, True), (3.0, False, True, False)
for softcap, biased, masked, entropy in cases:
    hidden, weight = torch.randn(40, 40).to(dtype), torch.randn(150, 40).to(dtype)
    labels = torch.randint(0, 150, (40,))
    hidden[:5] = 4 * weight[labels[:5]]  # far margins
    bias = torch.randn(150).to(dtype) if biased else None
    mask = torch.arange(40) % 3 != 0 if masked else None
    whole = Head(weight, bias, None, Form(0.8, 1.2, softcap, dtype))
    assert triton.multiplies(hidden, whole) == multiply
    expected = reference.forward(hidden, whole, labels, mask, entropy=entropy, vectors=False)
    found = triton.forward(hidden, whole, labels, mask, entropy=entropy)
    for field in ("logprob_T", "total_T", "entropy_T"):
        a, b = getattr(found, field), getattr(expected, field)
        assert (a is None) == (b is None)
        if a is not None and field == "total_T" and mask is not None:
            a, b = a[mask], b[mask]
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    given = reference.Coefficients(torch.randn(40), torch.randn(40) if entropy else None, expected.logprob_T,
                                   expected.total_T, expected.entropy_T, labels)
    needs = (True, True, biased)
    every = [reference.backward(hidden, whole, Rows(40, mask), given, way="vocab", needs=needs, tile_gradient=compute)
             for compute in (None, triton.gradient_of_tile)]
    for a, b in zip(*every):
        assert (a is None) == (b is None)
        if a is not None:
            wrong = float((a.double() - b.double()).norm() / b.double().norm())
            assert wrong < max(1e-4, torch.finfo(dtype).eps), wrong

# what is not finite, and labels that are no token
for row, value in enumerate((float("nan"), float("inf"), float("-inf"))):
    for at in (0, 150):
        bias = torch.randn(200); bias[at] = value
        whole = Head(torch.zeros(200, 40), bias, None, Form())
        for label in (0, 7):
            found = triton.forward(torch.zeros(1, 40), whole, torch.tensor([label]), None, entropy=False).logprob_T
            torch.testing.assert_close(found, bias.log_softmax(0)[[label]], equal_nan=True)
assert triton.forward(torch.zeros(1, 40), whole, torch.tensor([200]), None, entropy=False).logprob_T.isnan().all()
nothing = torch.zeros(0, dtype=torch.int64)
assert triton.forward(torch.zeros(0, 40), whole, nothing, None, entropy=True).logprob_T.shape == (0,)
print("done")
"""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize(("dtype", "multiply"), [("float32", True), ("float16", True), ("float32", False)])
def test_kernels_are_the_reference(dtype: str, multiply: bool) -> None:
    """multiply: the kernels compute the logits themselves, or are given them."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, dtype, str(multiply)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "done", done.stderr[-3000:]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [64, 2048])
def test_on_cuda(width: int) -> None:
    from memplan.runtime.kernels.linear_logprob import linear_logprob

    hidden, weight = torch.randn(100, width) / width**0.5, torch.randn(1000, width)
    labels, mask = torch.randint(0, 1000, (100,)), torch.arange(100) % 3 != 0
    seen = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
        out = linear_logprob(*leaves, labels.to(device), mask=mask.to(device), entropy=True)
        seen.append([x.cpu() for x in (*out, *torch.autograd.grad((out[0] + out[1]).sum(), leaves))])
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-3, atol=1e-4)
