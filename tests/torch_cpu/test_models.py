"""The zoo keeps its promises: one graph, no warnings, a gradient for every parameter, the same one each time."""

import pytest
import torch

from tests.models import CASES, Case


def gradients(step, batch, module):
    module.zero_grad()
    step(batch).backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole_and_keeps_its_gradients(case: Case) -> None:
    torch._dynamo.reset()
    sample = case.make()
    eager = gradients(sample.step, sample.batch, sample.module)
    step = torch.compile(sample.step, backend="aot_eager", fullgraph=True)
    for name, grad in gradients(step, sample.batch, sample.module).items():
        torch.testing.assert_close(grad, eager[name], rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_making_is_deterministic_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second = CASES[0].make(), CASES[0].make()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.step(first.batch), second.step(second.batch))
