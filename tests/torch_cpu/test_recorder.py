"""The recorder against sizes computed by hand, against torch's MemTracker, and on what can go wrong."""

import gc
import warnings

import pytest
import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.report.text import at_moment
from memplan.runtime.recorder import Event, Resident, build, record, traced
from tests.models import CASES, Sample, six_layer

MIB = 1 << 20
ROUNDING = 64  # bytes per block that the allocator may add


def sizes(timeline, kind=None):
    return sorted(b.bytes for b in timeline.blocks if b.bytes >= MIB and kind in (None, b.kind))


def at_end(timeline):
    return sum(b.bytes for b in timeline.blocks if b.end == len(timeline.moments))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
def test_after_a_custom_function_was_compiled():
    """Dynamo leaves tensors behind whose storage is gone."""
    torch._dynamo.reset()
    weight, x = nn.Parameter(torch.ones(64, 64)), torch.ones(8, 64)
    step = torch.compile(lambda x: Square.apply(Square.apply(x @ weight) @ weight).mean(), backend="aot_eager")
    step(x).backward()
    with record("cpu") as seen:
        step(x).backward()
    assert seen.timeline.peak_above_base > 0


# ---- exact ----------------------------------------------------------------------------------------------------------


def test_eager_sizes_and_lifetimes():
    with record("cpu") as seen:
        a = torch.ones(256, 1024)  # 1 MiB
        b = torch.cat([a, a])  # 2 MiB
        del a
        c = torch.cat([b, b])  # 4 MiB
        del b, c
    timeline = seen.timeline
    assert timeline.origin == "measured"
    assert sizes(timeline) == [1 * MIB, 2 * MIB, 4 * MIB]
    assert [t - timeline.base_bytes for t in timeline.totals] == [MIB, 3 * MIB, 2 * MIB, 6 * MIB, 4 * MIB, 0]
    assert [b.name for b in timeline.blocks] == ["aten::ones", "aten::cat", "aten::cat"]
    assert all(x.seconds <= y.seconds for x, y in zip(timeline.moments, timeline.moments[1:], strict=False))


def test_backward_sizes_and_kinds():
    weight = nn.Parameter(torch.ones(512, 512))  # 1 MiB
    x = torch.ones(1024, 512)  # 2 MiB
    with record("cpu") as seen:
        loss = (x @ weight).sin().sum()
        loss.backward()
    timeline = seen.timeline
    base = dict(timeline.base)
    assert base["parameter"] >= MIB and base["input"] >= 2 * MIB
    assert sizes(timeline, "gradient") == [MIB]
    assert sizes(timeline, "activation") == [2 * MIB]  # the product; its sine is freed before backward
    # forward: the product and its sine; backward: the product, its cosine and the product of that with the gradient
    assert timeline.peak_above_base == pytest.approx(6 * MIB, abs=10 * ROUNDING)
    assert timeline.moments[timeline.peak_moment].phase == "backward"
    assert at_end(timeline) == pytest.approx(MIB, abs=2 * ROUNDING)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code(backend):
    torch._dynamo.reset()
    weight = nn.Parameter(torch.ones(512, 512))
    x = torch.ones(1024, 512)

    @torch.compile(backend=backend)
    def step(x):
        return (x @ weight).sin().sum()

    step(x).backward()  # compiles
    weight.grad = None
    with record("cpu") as seen:
        step(x).backward()
    timeline = seen.timeline
    assert sizes(timeline, "gradient") == [MIB]
    assert sizes(timeline, "activation") == [2 * MIB]
    # aot_eager: a product and its sine, later a cosine and its multiple; the product dies with its last use.
    # Inductor: the sine is never written, and the multiple of the cosine is written over the product.
    expected = 4 * MIB if backend == "aot_eager" else 3 * MIB
    assert timeline.peak_above_base == pytest.approx(expected, rel=1e-3)


def test_peak_agrees_with_memtracker():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed._tools.mem_tracker import MemTracker

    sample = six_layer()
    tracker = MemTracker()
    tracker.track_external(sample.module)
    with tracker:
        sample.step(sample.batch).backward()
    oracle = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    sample.module.zero_grad()
    with record("cpu") as seen:
        sample.step(sample.batch).backward()
    parameters = sum(p.nbytes for p in sample.module.parameters())
    assert seen.timeline.peak_above_base + parameters == pytest.approx(oracle, rel=1e-3)


def totals_by_c10(profile: torch.profiler.profile) -> list[int]:
    """The CPU allocator's own running total ("Total Allocated"), at each of its events, from 0."""
    found, todo = [], list(profile.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo.extend(event.children)
        if isinstance(fields := event.extra_fields, torch._C._profiler._ExtraFields_Allocation):
            found.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
    found.sort(key=lambda e: e[0])
    _, total, size = found[0]
    return [t - (total - size) for _, t, _ in found]


def training(sample: Sample, step=None):
    """A call that trains for one step, after others that leave nothing new to allocate."""

    def one():
        (step or sample.step)(sample.batch).backward()
        sample.module.zero_grad()

    for _ in range(2):
        one()
    return one


def assert_kinds_add_up(timeline):
    for moment, total in enumerate(timeline.totals):
        assert sum(at_moment(timeline, moment).values()) == total, moment


@pytest.mark.parametrize(("case", "compiled"), [*((case, False) for case in CASES), (CASES[0], True)], ids=str)
def test_every_model_has_the_peak_that_the_allocator_states(case, compiled):
    torch._dynamo.reset()
    sample = case.make()
    one = training(sample, torch.compile(sample.step, fullgraph=True) if compiled else None)
    with torch.profiler.profile(profile_memory=True) as profile:
        one()
    stated = totals_by_c10(profile)
    with record("cpu") as seen:
        one()
    timeline = seen.timeline
    end = timeline.totals[-1] - timeline.base_bytes
    assert (timeline.peak_above_base, end, len(timeline.moments)) == (max(stated), stated[-1], len(stated))
    assert_kinds_add_up(timeline)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(256, 256)

    def forward(self, x):
        return torch.sin(self.inner(x))


LINE = Twice.forward.__code__.co_firstlineno


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_lines_and_modules(backend):
    """Of eager code each op's own line; of compiled code the line that calls it, and never a file of torch's."""
    torch._dynamo.reset()
    module, x = Twice(), torch.ones(1024, 256)

    def step(x):
        return module(x).sum()

    run = step if backend is None else torch.compile(step, backend=backend)
    run(x).backward()
    module.zero_grad()
    with record("cpu", lines=True) as seen:
        run(x).backward()
    blocks = [b for b in seen.timeline.blocks if b.bytes >= MIB / 4]
    assert blocks and all("test_recorder.py:" in b.source for b in blocks)
    if backend is None:
        sine = next(b for b in blocks if b.name == "aten::sin")
        product = next(b for b in blocks if b.name == "aten::addmm")
        assert sine.source.endswith(f"test_recorder.py:{LINE + 1} in forward")
        assert (sine.layer, product.layer) == ("Twice", "Twice.inner")
    with record("cpu") as plain:
        run(x).backward()
    assert not any(b.source for b in plain.timeline.blocks)


# ---- the base -------------------------------------------------------------------------------------------------------


def test_base_counts_each_storage_once_and_no_fake_ones():
    gc.collect()
    with record("cpu") as before:
        pass
    old = torch.ones(MIB // 4)
    views = [old[1:], old.view(-1, 4), old.detach()]
    meta = torch.ones(1 << 40, device="meta")
    with torch._subclasses.FakeTensorMode():
        fake = torch.ones(MIB)
    sparse = torch.eye(3).to_sparse()
    with record("cpu") as seen:
        pass
    assert seen.timeline.moments == () and seen.timeline.peak == seen.timeline.base_bytes
    grown = seen.timeline.base_bytes - before.timeline.base_bytes
    assert MIB <= grown <= MIB + 4 * ROUNDING
    del views, meta, fake, sparse


def test_base_names_gradients_and_optimizer_states():
    weight = nn.Parameter(torch.ones(MIB // 4))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    with record("cpu") as seen:
        pass
    base = dict(seen.timeline.base)
    assert base["parameter"] >= MIB and base["gradient"] >= MIB and base["optimizer_state"] >= 2 * MIB


def test_what_is_freed_while_recording_leaves_the_base_in_its_moment():
    weight = nn.Parameter(torch.ones(MIB // 4))
    weight.sum().backward()
    held = torch.ones(MIB // 2)
    view = held[1:]
    gc.collect()  # what earlier tests left is not to be freed in between
    with record("cpu") as seen:
        first = torch.ones(MIB // 4)
        weight.grad = None
        del held
        second = torch.ones(MIB)
        del view
    timeline = seen.timeline
    start = timeline.base_bytes + 3 * MIB
    assert list(timeline.totals) == [start + MIB, start, start + 4 * MIB, start + 2 * MIB]
    old = [b for b in timeline.blocks if b.name == "allocated before"]
    assert [(b.kind, b.bytes, b.start, b.end) for b in old] == [
        ("gradient", MIB, 0, 1),
        ("input", 2 * MIB, 0, 3),
    ]
    del first, second


def test_what_is_freed_first_was_alive_at_the_start():
    held = torch.ones(MIB // 4)
    gc.collect()
    with record("cpu") as seen:
        del held
        kept = torch.ones(10)
    timeline = seen.timeline
    assert timeline.moments[0].name == "start"
    assert timeline.peak == timeline.totals[0] == timeline.base_bytes + MIB
    assert timeline.totals[-1] == timeline.base_bytes + kept.nbytes


def test_a_second_recording_sees_frees_of_the_first_once():
    with record("cpu"):
        kept = torch.ones(MIB // 4)
    with record("cpu") as seen:
        marker = torch.ones(MIB // 4)
        del kept
    assert [(b.start, b.bytes) for b in seen.timeline.blocks] == [(0, MIB), (0, MIB)]
    assert seen.timeline.totals[-1] == seen.timeline.base_bytes + MIB
    del marker


def test_steps_of_an_optimizer_have_their_phase():
    weight = nn.Parameter(torch.ones(MIB // 4))
    optimizer = torch.optim.AdamW([weight])
    with record("cpu") as seen:
        weight.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {"forward", "backward", "optimizer"} <= {m.phase for m in seen.timeline.moments}
    assert sizes(seen.timeline, "optimizer_state") == [MIB, MIB]
    assert sizes(seen.timeline, "gradient") == []  # gone at the end


# ---- what can go wrong ----------------------------------------------------------------------------------------------


def test_an_exception_passes_through_and_the_timeline_is_there():
    with pytest.raises(ZeroDivisionError), record("cpu") as seen:
        kept = torch.ones(MIB // 4)
        1 / 0  # noqa: B018
    assert sizes(seen.timeline) == [MIB]
    del kept


def test_a_running_profiler_is_refused_and_left_alone():
    with torch.profiler.profile() as profile:
        with pytest.raises(MemplanError, match="profiler or another recording"), record("cpu"):
            pass
        torch.ones(3)
    assert any(e.key == "aten::ones" for e in profile.key_averages())
    with record("cpu"), pytest.raises(MemplanError), record("cpu"):
        pass


def test_the_timeline_is_refused_before_the_end():
    with record("cpu") as seen, pytest.raises(MemplanError, match="after the with-block"):
        _ = seen.timeline


def test_an_unknown_device_is_refused():
    for device in ("meta", "gpu", *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(MemplanError, match=f"cannot record on '{device}'"), record(device):
            pass


# ---- the timeline from events, and CUDA's history as events ---------------------------------------------------------


def test_an_unreported_free_ends_where_its_address_is_used_again():
    events = [Event(0.0, 7, 100, "a"), Event(1.0, 7, 200, "b"), Event(2.0, 9, 50, "c")]
    timeline = build("", events, before={9: Resident("input", 1000)}, after={})
    assert timeline.totals == (1100, 1200, 250)
    assert timeline.base == ()


def test_cuda_history_becomes_events():
    def frame(filename, name):
        return {"filename": filename, "line": 3, "name": name}

    python, torch_file = "/home/me/train.py", "/lib/torch/nn/functional.py"
    history = [
        {"action": "segment_alloc", "addr": 0, "size": 2 * MIB, "frames": [], "time_us": 5},
        {
            "action": "alloc",
            "addr": 0,
            "size": 1000,
            "frames": [frame(torch_file, "linear"), frame(python, "step")],
            "time_us": 10,
        },
        {"action": "alloc", "addr": 1024, "size": 512, "frames": [], "time_us": 20},
        {"action": "free_requested", "addr": 0, "size": 1000, "frames": [], "time_us": 30},
        {"action": "free_completed", "addr": 0, "size": 1000, "frames": [], "time_us": 31},
        {"action": "free_requested", "addr": 4096, "size": 600, "frames": [], "time_us": 40},
    ]
    events = traced(history)
    assert [e.bytes for e in events] == [1024, 512, -1024, -1024]
    assert [e.phase for e in events] == ["forward", "backward", "", ""]
    assert (events[0].name, events[0].source) == ("linear", "/home/me/train.py:3 in step")
    timeline = build("", events, before={}, after={1024: Resident("gradient", 512)}, unreached=3000, others=77)
    assert timeline.beside == (77,) * len(timeline.moments)
    assert timeline.totals == (4024, 4536, 3512, 2488)
    assert [b.kind for b in timeline.blocks] == ["activation", "temporary", "gradient"]
    assert timeline.base == (("temporary", 1976),)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one GPU")
def test_cuda_peak_is_the_allocators():
    weight = nn.Parameter(torch.ones(512, 512, device="cuda"))
    x = torch.ones(1024, 512, device="cuda")
    (x @ weight).sin().sum().backward()  # workspaces
    weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    with record("cuda") as seen:
        (x @ weight).sin().sum().backward()
    assert seen.timeline.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=1e-3)
    assert min(seen.timeline.beside) > 100 * MIB  # the context
    assert sizes(seen.timeline, "gradient") == [MIB]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_model_has_the_peak_that_the_allocator_states_on_cuda(case):
    made = case.make(dtype=torch.bfloat16)  # of which grouped products are made there
    module = made.module.to("cuda")  # in place: the step has the same one
    sample = Sample(module, made.step, type(made.batch)(*(t.to("cuda") for t in made.batch)))
    one = training(sample)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with record("cuda") as seen:
        one()
    assert seen.timeline.peak_above_base == torch.cuda.max_memory_allocated() - before > 0
    assert_kinds_add_up(seen.timeline)
