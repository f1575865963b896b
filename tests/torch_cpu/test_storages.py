"""Bytes are those of storages that are there, each once, whatever a tensor says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.runtime.held import Watch
from memplan.runtime.optimizers import foresee, states
from memplan.runtime.storages import nbytes, plain


class Halves(torch.Tensor):
    """A wrapper of two tensors that says it is float64, as large as it likes."""

    @staticmethod
    def __new__(cls, first: torch.Tensor, second: torch.Tensor) -> Halves:
        made = torch.Tensor._make_wrapper_subclass(cls, (1000,), dtype=torch.float64, device=first.device)
        made.first, made.second = first, second
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["first", "second"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride) -> Halves:
        return Halves(inner["first"], inner["second"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_wrappers_count_what_is_inside_and_a_storage_counts_once() -> None:
    table, values = torch.zeros(16), torch.zeros(100, dtype=torch.uint8)
    inner = Halves(table, values)
    outer = Halves(inner, values[50:])
    assert [t.data_ptr() for t in plain(outer)] == [table.data_ptr(), values.data_ptr(), values[50:].data_ptr()]
    assert nbytes([outer, inner, table[:2]], ("cpu",)) == 64 + 100
    assert nbytes([outer], ("cuda",)) == 0
    assert nbytes([torch.zeros(4, device="meta"), table], ("meta",)) == 16
    assert nbytes([], ("cpu",)) == 0


class Wrapped(torch.optim.SGD):
    """Holds a wrapper of a table that all states share, and a buffer of its own; its step takes 4,000 bytes."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state[p]:
                self.table = getattr(self, "table", torch.zeros(256, device=p.device))
                self.state[p]["state"] = Halves(self.table, torch.zeros(p.numel(), dtype=torch.uint8, device=p.device))
            torch.ones(1000, device=p.device).sum()


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(300))]
    for p in made:
        p.grad = torch.zeros_like(p)
    return made


def test_any_optimizer_with_wrapped_states() -> None:
    """Others' is not stepped ahead unless it is declared: what it holds and takes counts when it has stepped."""
    optimizer = Wrapped(given := parameters(), lr=0.1)
    watch, ahead = Watch(), foresee(optimizer)
    assert (ahead.states, ahead.transient) == (1024 + 800, 4000 + 4)
    assert not hasattr(optimizer, "table") and not optimizer.state
    held = watch.held(given)
    assert dict(held.kinds) == {"gradient": 3200} and not held.gaps
    assert held.notes == (
        "what Wrapped will hold is not known before its first step: it counts from the call after it",
        "what Wrapped.step() takes beside its states is not known yet: it is measured while it runs, and counts from "
        "then on",
    )
    optimizer.step()
    held = watch.held(given)
    assert dict(held.kinds) == {"gradient": 3200, "optimizer_state": 1824}
    assert [gap.bytes for gap in held.gaps] == [4004]
    own = optimizer.state[given[0]]["state"]
    assert dict(watch.held(given, [own]).kinds)["optimizer_state"] == 300  # the other one is an argument of the step
    with memplan.record("cpu") as seen:
        pass
    assert dict(seen.timeline.base)["optimizer_state"] >= 1824
    assert nbytes(states(optimizer), ("cpu",)) == 1824


def test_a_step_that_cannot_be_seen_is_not_counted() -> None:
    """Where another profiler runs, or a closure runs backward, the next step is looked at; two are enough."""
    optimizer = Wrapped(given := parameters(), lr=0.1)
    watch = Watch()
    watch.held(given)
    (stepped,) = watch.stepped
    with memplan.record("cpu"):
        optimizer.step()
    assert stepped.peaks == []
    leaf = torch.zeros(1, requires_grad=True)
    optimizer.register_step_pre_hook(lambda *_: (2 * leaf).backward())
    optimizer.step()
    assert stepped.peaks == []
    optimizer._optimizer_step_pre_hooks.popitem()
    leaf.register_hook(lambda _: optimizer.step())
    (2 * leaf).backward()
    assert stepped.peaks == []
    for k in range(3):
        optimizer.step()
        assert stepped.peaks == [4004] * min(k + 1, 2)
        assert stepped.known is (k > 0)
    assert not any("not known yet" in note for note in watch.held(given).notes)
    again = Watch()
    assert [gap.bytes for gap in again.held(given).gaps] == [4004]  # what was seen is known to all


class OneByOne(torch.optim.SGD):
    """Its step takes as much as the largest parameter that has a gradient."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            torch.ones_like(p).sum()


def test_a_step_that_updates_more_than_those_before_is_looked_at() -> None:
    """A branch that is taken late, or a layer that is trained from some step on."""
    optimizer = OneByOne([*parameters(), late := nn.Parameter(torch.zeros(1000))], lr=0.1)
    watch = Watch()
    given = [p for group in optimizer.param_groups for p in group["params"]]
    late.requires_grad_(False)
    watch.held(given)
    (stepped,) = watch.stepped
    for _ in range(3):
        optimizer.step()
    assert stepped.peaks == [2004] * 2 and stepped.known
    late.requires_grad_(True)
    assert not stepped.known and any("not known yet" in note for note in watch.held(given).notes)
    optimizer.step()  # that it may have a gradient is no gradient
    assert stepped.peaks == [2004] * 2
    late.grad = torch.zeros(1000)
    for k in range(3):
        optimizer.step()
        assert stepped.peaks[2:] == [4004] * min(k + 1, 2)
    assert stepped.known and [gap.bytes for gap in watch.held(given).gaps] == [4004]
    late.grad = None  # what has been seen is not measured again
    optimizer.step()
    assert len(stepped.peaks) == 4 and stepped.known


def test_planning_leaves_the_optimizer_alone() -> None:
    net = nn.Linear(8, 1)
    optimizer = Wrapped(net.parameters(), lr=0.1)
    before = set(vars(optimizer))
    plan = memplan.plan(lambda x: net(x).sum(), torch.zeros(2, 8), inner="eager")
    assert set(vars(optimizer)) == before and not optimizer._optimizer_step_pre_hooks
    assert any("what Wrapped will hold is not known" in note for note in plan.step.held.notes)


def test_sparse_gradients_count() -> None:
    net = nn.Embedding(100, 8, sparse=True)
    net(torch.tensor([1, 2, 3])).sum().backward()
    assert dict(Watch().held(list(net.parameters())).kinds) == {"gradient": 3 * 8 + 3 * 8 * 4}
    with memplan.record("cpu") as seen:
        pass
    assert dict(seen.timeline.base)["gradient"] >= 120


class Around(torch.optim.Optimizer):
    """As accelerate's: an optimizer without states and hooks of its own. `shows`: what it lets through of the inner."""

    def __init__(self, inner: torch.optim.Optimizer, shows: tuple[str, ...]) -> None:
        self.inner, self.shows = inner, shows

    def __getattr__(self, name: str) -> object:
        if name in self.shows:
            return getattr(self.inner, name)
        raise AttributeError(name)


@pytest.mark.parametrize("shows", [("param_groups", "state"), ("param_groups",)], ids=str)
def test_what_is_around_an_optimizer(shows: tuple[str, ...]) -> None:
    """The states of the inner one count once, and torchao's offloading optimizer has none to show."""
    outer = Around(torch.optim.AdamW(given := parameters()), shows)
    watch = Watch()
    held = watch.held(given)
    assert dict(held.kinds)["optimizer_state"] == 2 * 3200 + 8
    assert held.notes == () and watch.stepped == ()
    outer.inner.step()
    assert watch.held(given) == held
    assert not watch.known  # it may do anything
    with memplan.record("cpu") as seen:
        pass
    assert dict(seen.timeline.base)["optimizer_state"] >= 2 * 3200 + 8


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_step_that_is_compiled_is_let_be() -> None:
    """Nothing is put into its graph, and nothing is measured."""
    optimizer = type("Own", (torch.optim.AdamW,), {})(given := parameters())
    watch = Watch()
    watch.held(given)
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        compiled()
    assert counted["stats"]["unique_graphs"] == 1
    assert sum(counted["graph_break"].values()) == 1  # torch's own
    (stepped,) = watch.stepped
    assert (stepped.peaks, stepped.span) == ([], None)
