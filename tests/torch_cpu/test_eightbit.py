"""torchao's and bitsandbytes' optimizers inside a budget: states, and what steps take, are what is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import bitsandbytes.optim as bnb
import pytest
import torch
import torchao.optim as ao
from torch import nn

import memplan
from memplan.backend import memplan_backend
from memplan.errors import DoesNotFit, MemplanError
from memplan.runtime.held import Watch
from memplan.runtime.optimizers import declared, foresee, states
from memplan.runtime.storages import nbytes
from memplan.runtime.tenants import moved_in

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "one_thread"),
    pytest.mark.filterwarnings("ignore:.* does not implement _stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

KINDS = [
    ao.AdamW8bit, ao.AdamW4bit, ao.AdamWFp8,
    bnb.AdamW8bit, bnb.PagedAdamW8bit, bnb.AdEMAMix8bit, bnb.Lion8bit, bnb.SGD8bit, bnb.AdamW,
]  # fmt: skip
MORE = {bnb.SGD8bit: {"momentum": 0.9}}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def made_by(kind: type, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return kind(parameters, lr=1e-3, **MORE.get(kind, {}))


def parameters() -> list[nn.Parameter]:
    """Two of which states are quantised, one of them large enough for pages, and one that is too small."""
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(*shape)) for shape in ((512, 256), (64, 128), (64,))]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def recorded(function: Callable[[], object]) -> tuple[int, int]:
    """What the allocator says of a call: the peak, and what is left of it."""
    gc.collect()
    with memplan.record("cpu") as seen:
        function()
    return seen.timeline.peak_above_base, seen.timeline.totals[-1] - seen.timeline.base_bytes


def reached(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Its states, and the tensors it has beside them: learning rates, tables of which no state is made."""
    beside = [*optimizer.param_groups[0].values(), *getattr(optimizer, "name2qmap", {}).values()]
    return states(optimizer) + [t for t in beside if isinstance(t, torch.Tensor)]


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torchao's step as it is written: its states are the same, and no test waits for a compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k.__module__.split('.')[0]}-{k.__name__}")
def test_states_are_foreseen_and_counted(kind: type) -> None:
    made_by(kind, parameters()).step()  # what a package keeps is there from now on
    ahead, made, found = declared(lambda p: made_by(kind, p), given := parameters()), [], []

    def first_step() -> None:
        made.append(made_by(kind, given))
        found.append(foresee(made[0]))
        made[0].step()

    _, left = recorded(first_step)
    assert left == nbytes(reached(made[0]), ("cpu",))
    assert left - 2048 < nbytes(states(made[0]), ("cpu",)) == ahead.states
    assert found == [ahead] == [foresee(made[0])]
    assert ahead.transient is None  # nobody knows


ROWS = torch.linspace(-1, 1, 4 * 128).view(4, 128)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (m for _ in range(4) for m in (nn.Linear(128, 128, bias=False), nn.Tanh()))
    return nn.Sequential(*layers)  # of one shape: torchao compiles for each


def planned(net: nn.Module, budget: int):
    options = {"budget": budget, "inner": "eager"}
    return torch.compile(lambda x: net(x).square().mean(), backend=memplan_backend, options=options)


@pytest.mark.parametrize("kind", [ao.AdamW4bit, bnb.AdamW8bit], ids=lambda k: k.__module__)
def test_a_planned_step_with_its_optimizer(made, kind: type) -> None:
    """The states count before they are there, and what a step takes once it was seen; then the peak is the budget's."""
    net = network()
    held = sum(p.nbytes for p in net.parameters())
    optimizer = made_by(kind, net.parameters())
    step = planned(net, 10**8)

    def train() -> None:
        step(ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    ((kinds, notes),) = [(dict(p.step.held.kinds), p.step.notes + p.step.held.notes) for p in made]
    assert kinds == {"optimizer_state": nbytes(states(optimizer), ("cpu",))}
    assert f"what {kind.__name__}.step() takes beside its states is not known yet" in "".join(notes)
    for _ in range(3):
        train()
    assert len(made) == 1  # all fits

    step = planned(net, held)  # again, with what has been seen
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as refused:
        step(ROWS)
    error = refused.value.inner_exception
    assert isinstance(error, DoesNotFit) and f"{kind.__name__}.step()" in str(error)
    assert "not known" not in str(error)

    step = planned(net, error.smallest)
    train()
    gc.collect()
    with memplan.record("cpu") as seen:
        train()
    there = nbytes(reached(optimizer), ("cpu",)) + ROWS.nbytes + held
    measured = seen.timeline.peak_above_base + there
    assert 0.97 * error.smallest <= measured <= error.smallest
    assert dict(seen.timeline.base)["optimizer_state"] >= nbytes(states(optimizer), ("cpu",))


def test_options_for_single_parameters_are_foreseen() -> None:
    """bitsandbytes knows them by the ids of parameters; transformers' Trainer has them for embeddings."""
    net = nn.ModuleList([nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)])
    manager = bnb.GlobalOptimManager.get_instance()
    before = dict(vars(manager))
    try:
        manager.initialize()
        manager.register_module_override(net[0], "weight", {"optim_bits": 32})
        optimizer = bnb.AdamW8bit(net.parameters())
        ahead = foresee(optimizer)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert ahead.states == nbytes(states(optimizer), ("cpu",)) > 2 * net[0].weight.nbytes
        assert foresee(optimizer) == ahead
        with pytest.raises(MemplanError, match=r"GlobalOptimManager has options .*: give the optimizer itself"):
            declared(bnb.AdamW8bit, list(net.parameters()))
    finally:
        vars(manager).update(before)


def test_what_cannot_be_foreseen_is_said_and_learned() -> None:
    """LAMB looks at norms. Its note stays, and what it holds and takes counts after its first step."""
    optimizer = bnb.LAMB8bit(given := parameters())
    watch = Watch()
    before = watch.held(given)
    assert "LAMB8bit does not step on parameters without data" in before.notes[0]
    assert all("\n" not in note for note in before.notes)
    assert "optimizer_state" not in dict(before.kinds) and not before.gaps
    optimizer.step()
    peak, left = recorded(optimizer.step)
    after = watch.held(given)
    assert dict(after.kinds)["optimizer_state"] == nbytes(states(optimizer), ("cpu",))
    (gap,) = after.gaps
    assert gap.name == "LAMB8bit.step()" and gap.bytes >= 0.99 * (peak - left) > 0
    assert not watch.known  # as it was


@pytest.mark.parametrize("option", [None, bnb.AdamW8bit], ids=["found", "declared"])
def test_known_when_two_steps_were_seen(option: object) -> None:
    given = parameters()
    watch, alone = Watch(option), Watch(bnb.AdamW8bit)
    before = alone.held(given)  # declared, and not there yet
    optimizer = bnb.AdamW8bit(given)
    for known in (False, False, True):
        held = watch.held(given)
        assert watch.known is known is not any("not known yet" in note for note in held.notes)
        assert dict(held.kinds) == dict(before.kinds)
        optimizer.step()
    peak, _ = recorded(optimizer.step)
    assert [gap.bytes for gap in watch.held(given).gaps] == [peak]
    assert not before.gaps and "not known yet" in before.notes[0] and not alone.known


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", [ao.AdamW4bit, bnb.Lion8bit], ids=lambda k: k.__module__)
def test_states_move_into_an_arena_and_out(kind: type) -> None:
    """What a ledger sends away and brings back is the same states: the optimizer goes on as one that was let be."""
    made = [(given, made_by(kind, given)) for given in (parameters(), parameters())]
    for _, optimizer in made:
        optimizer.step()
    moved = made[0][1]
    tenant = moved_in(states(moved))
    assert tenant.arena.size >= nbytes(states(moved), ("cpu",))
    tenant.release()
    tenant.restore()
    for _, optimizer in made:
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(made[0][0], made[1][0], strict=True))
