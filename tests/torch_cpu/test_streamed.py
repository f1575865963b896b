"""Frozen parameters off the device: the same bits anywhere, far less memory in a planned step, and a way back."""

import copy
import gc

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.backend import memplan_backend
from memplan.errors import MemplanError
from memplan.machines import machine
from memplan.passes.check import check
from memplan.runtime.host_pool import arena

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Adapted(nn.Module):
    """A frozen product with a trained one of rank 4 beside it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) / 50)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) / 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (x @ self.down.t()) @ self.up.t()


def adapted_llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = dict(vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=layers)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, use_cache=False, **size))
    model.requires_grad_(False)
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(owner, name, Adapted(child))
    return model


def step_of(model: nn.Module):
    def step(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    return step


def gradients(step, model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    step(tokens).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def weights(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


TOKENS = torch.arange(64).remainder(256)[None]


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_lora_step_needs_less_than_its_weights(inner: str, made) -> None:
    """Peak and parameters that stay together are below the weights of the model, as planned, with the same bits."""
    model = adapted_llama(6)
    size = weights(model)
    expected = gradients(torch.compile(step_of(model), backend="aot_eager"), model, TOKENS)
    torch._dynamo.reset()
    gc.collect()
    before = arena("host").used
    assert memplan.stream(model) is model
    assert arena("host").used - before > 0.9 * size
    options = {"inner": inner, "policy": "block-checkpoint"}
    step = torch.compile(step_of(model), backend=memplan_backend, options=options)
    found = gradients(step, model, TOKENS)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if inner == "eager" else torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    plan = made[-1]
    assert check(plan) == []
    model.zero_grad()
    with memplan.record("cpu") as seen:
        step(TOKENS).backward()
    assert seen.timeline.peak_above_base == plan.timeline.peak_above_base
    assert plan.peak < size / 3
    assert plan.timeline.host_peak == 0  # of no budget of the step's
    fetched = [run for run in plan.backward if plan.step.ops[run.op].fetches]
    assert fetched and all(run.again for run in fetched)  # brought in once more, not kept


def test_one_copy_ahead(made) -> None:
    """While a weight is used the next is on its way: two are there at a time, and the time shows what is waited for."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)), nn.Linear(256, 1))
    net[:6].requires_grad_(False)
    memplan.stream(net)
    x = torch.randn(2, 256, requires_grad=True)

    def twice(step, budget, machine):
        return {t: memplan.Recompute() for op in step.ops if op.fetches for t in op.outputs}

    options = {"inner": "eager", "policy": memplan.policy("twice")(twice)}
    step = torch.compile(lambda x: net(x).sum(), backend=memplan_backend, options=options)
    step(x).backward()
    totals, base = made[-1].timeline.totals, made[-1].step.base_bytes
    assert 2 * 4 * 256**2 <= max(totals) - base < 3 * 4 * 256**2
    with memplan.record("cpu") as seen:
        step(x).backward()
    assert seen.timeline.peak_above_base == made[-1].timeline.peak_above_base
    assert made[-1].timeline.stalled > 0


def test_one_graph(made) -> None:
    model = adapted_llama(4)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for part in tokens.chunk(2, 1):
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            total = total + loss.detach()
        return total

    def run(compiled) -> list[torch.Tensor]:
        model.zero_grad()
        loss = compiled(TOKENS)
        return [loss, *(p.grad.clone() for p in trained)]

    expected = run(memplan.compile(step, inner="eager", policy="save-all", fullgraph=True))
    torch._dynamo.reset()
    memplan.stream(model)
    found = run(memplan.compile(step, inner="eager", policy="block-checkpoint", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert made[-1].peak < made[0].peak / 2


def test_there_and_back_uncompiled() -> None:
    model = adapted_llama(2)
    names, expected = list(model.state_dict()), gradients(step_of(model), model, TOKENS)
    gc.collect()
    before = arena("host").used
    memplan.stream(model)
    with pytest.raises(MemplanError, match="no frozen parameters to stream"):
        memplan.stream(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(step_of(model), model, TOKENS), expected, strict=True))
    assert memplan.unstream(model) is model
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(gradients(step_of(model), model, TOKENS), expected, strict=True))
    assert arena("host").used == before


def test_copies_of_a_module_go_their_own_ways() -> None:
    one = nn.Linear(8, 8).requires_grad_(False)
    memplan.stream(one)
    other, x = copy.deepcopy(one), torch.randn(2, 8)
    expected = one(x)
    memplan.unstream(other)
    assert torch.equal(one(x), expected) and torch.equal(other(x), expected)
    memplan.unstream(one)
    assert torch.equal(one(x), expected)


@pytest.mark.parametrize("weight", [torch.randn(64, 512)[:, :256], torch.randn(1, 256).expand(64, 256)])
def test_weights_that_came_from_elsewhere(weight: torch.Tensor) -> None:
    """Sharded or expanded: a parameter is whatever load_state_dict(assign=True) has made it."""
    layer = memplan.stream(nn.Linear(256, 64, bias=False).requires_grad_(False))
    layer.load_state_dict({"parametrizations.weight.original": weight}, assign=True)
    assert torch.equal(layer.weight, weight)
    x = torch.randn(2, 256, requires_grad=True)
    for inner in ("eager", "inductor"):
        planned = torch.compile(lambda x: layer(x).sum(), backend=memplan_backend, options={"inner": inner})
        (gradient,) = torch.autograd.grad(planned(x), x)
        torch.testing.assert_close(gradient, weight.sum(0).expand(2, 256))
        torch._dynamo.reset()


def test_layouts_come_back() -> None:
    layer = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    strides = layer.weight.stride()
    assert memplan.unstream(memplan.stream(layer)).weight.stride() == strides


def test_a_streamed_parameter_is_not_trained() -> None:
    layer = memplan.stream(nn.Linear(4, 4).requires_grad_(False))
    layer.requires_grad_(True)
    with pytest.raises(MemplanError, match=r"a streamed parameter \[4, 4\] requires a gradient: memplan.unstream"):
        layer(torch.randn(2, 4))
    assert memplan.unstream(layer).weight.requires_grad
    with pytest.raises(MemplanError, match="cannot stream a Tensor"):
        memplan.stream(torch.ones(2))


def test_what_is_trained_or_looked_up_stays() -> None:
    net = nn.ModuleDict({"trained": nn.Linear(4, 4), "frozen": nn.Linear(4, 4), "table": nn.Embedding(4, 4)})
    net["frozen"].requires_grad_(False)
    net["table"].requires_grad_(False)
    memplan.stream(net)
    assert [name for name, _ in net.named_parameters()] == [
        "trained.weight", "trained.bias", "frozen.parametrizations.weight.original",
        "frozen.parametrizations.bias.original", "table.weight",
    ]  # fmt: skip
    with pytest.raises(MemplanError, match="Linear has no frozen parameters"):
        memplan.stream(nn.Linear(2, 2))


def test_a_plan_for_another_machine_moves_nothing() -> None:
    """A model on meta, planned for a device with a bus of its own: what is streamed is not in the budget."""
    with torch.device("meta"):
        model = adapted_llama(6)
        tokens = torch.zeros(1, 64, dtype=torch.int64)
    gc.collect()
    size, before = weights(model), arena("host").used
    memplan.stream(model)
    plan = memplan.plan(step_of(model), tokens, budget="1GB", machine=machine("rtx4090"), policy="block-checkpoint")
    assert arena("host").used == before
    assert plan.peak < size / 3
    assert plan.timeline.seconds > 2 * 0.9 * size / plan.machine.host_bandwidth  # the bus is what it waits for
