"""What really happened: memory, measured while any code runs, planned or not.

    with memplan.record() as seen:
        loss = step(batch)
        loss.backward()
    print(seen.timeline.peak)

In: the allocator's own events. On the CPU they come from torch's profiler, on CUDA from the caching allocator's
history. Out: a `Timeline` with origin "measured", whose moments are those events in order of time. A block is
alive from the event that allocates it up to the event that frees it, or to the end.

`base` is what was alive on the device at entry, by kind, found by walking Python's objects. A storage of the
base that is freed while recording becomes a block from moment 0. `others` is what a CUDA device had in use at entry
beside what torch's allocator had reserved (contexts, libraries, other processes); on the CPU it is empty.

Kinds: what a live object says at the end (a parameter, its .grad, an optimizer's state); otherwise "activation"
if it was allocated outside of backward and is still alive in it; otherwise "temporary".

What must hold: bytes are the allocator's, so totals may exceed the tensors' by its rounding (CPU: a few bytes
per block). Not seen: memory taken behind the allocator (MKL's workspaces), on the CPU also other threads' (those
of autograd are seen) and, at entry, storages that no Python object reaches.

Cost on the CPU, measured on 2 busy cores: 0.2 s at entry and at exit for a process of a million Python objects; per op
1 us and 2 KiB while it runs, and 20 us when the timeline is first read. With lines, 10 us more at exit. Nothing else is
kept.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.ir import KINDS, Block, Kind, Moment, Timeline
from memplan.runtime.alive import instances
from memplan.runtime.allocator import FREED, Event, allocator_profile, events, interrupt
from memplan.runtime.host_pool import off_device
from memplan.runtime.optimizers import states
from memplan.runtime.storages import plain


class Recording:
    """What `record()` hands out; `timeline` is there once the with-block has ended, also by an exception."""

    def __init__(self) -> None:
        self._build: Callable[[], Timeline] | None = None

    @functools.cached_property
    def timeline(self) -> Timeline:
        """What happened. It is built when first read."""
        if self._build is None:
            raise MemplanError("the recording has not ended: read its timeline after the with-block")
        timeline, self._build = self._build(), None
        return timeline


@contextlib.contextmanager
def record(device: torch.device | str | None = None, *, lines: bool = False) -> Iterator[Recording]:
    """Record the memory of one device (default: CUDA if there is one, otherwise the CPU) while the block runs.

    lines: on the CPU, also find the source line and the module of each allocation. On CUDA lines are always there.
    Raises MemplanError if another recording or profiler is running. Exceptions of the block pass through.
    """
    where = recordable(device)
    recording = Recording()
    with _cuda(where, recording) if where.type == "cuda" else _cpu(recording, lines):
        yield recording


def recordable(device: torch.device | str | None) -> torch.device:
    """The device to record (default: CUDA if there is one, otherwise the CPU). Raises MemplanError for another."""
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise MemplanError(f"cannot record on {device!r}: memory is recorded on 'cpu' and 'cuda'") from None
    if where.type not in ("cpu", "cuda"):
        raise MemplanError(f"cannot record on {str(where)!r}: memory is recorded on 'cpu' and 'cuda'")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise MemplanError(f"cannot record on {str(where)!r}: torch sees no CUDA device here")
    return where


# ---- the timeline that follows from events --------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """A storage that a live Python object reaches."""

    kind: Kind
    bytes: int


def build(
    title: str,
    events: list[Event],
    before: Mapping[int, Resident],
    after: Mapping[int, Resident],
    unreached: int = 0,
    others: int = 0,
) -> Timeline:
    """The timeline of `events`, given what was reached at entry and at the end, by address.

    `unreached` bytes were alive at entry too, but no object says what they are; `others` are not torch's.
    """
    if events and events[0].bytes <= 0:  # of the base, which has no moment to be alive at otherwise
        events = [Event(events[0].seconds, -1, 0, "start"), *events]
    backward = [i for i, e in enumerate(events) if e.phase == "backward"]
    alive: dict[int, int] = dict.fromkeys(before, -1)  # address -> index of the event that allocated it; -1: base
    base = dict.fromkeys(KINDS, 0)
    blocks: list[Block] = []

    def close(address: int, end: int) -> None:
        start = alive.pop(address)
        if start < 0:
            old = before[address]
            blocks.append(Block("allocated before", old.bytes, old.kind, 0, end))
            return
        event = events[start]
        used = bisect.bisect_left(backward, start)  # the first backward event from here on
        kind: Kind = "temporary"
        if event.phase != "backward" and used < len(backward) and backward[used] < end:
            kind = "activation"
        if end == len(events) and address in after and after[address].kind != "input":
            kind = after[address].kind
        blocks.append(Block(event.name, event.bytes, kind, start, end, source=event.source, layer=event.layer))

    freed: set[int] = set()  # a storage of the base may report its end twice: by its object, then by the allocator
    for i, event in enumerate(events):
        known = event.address in alive
        if event.bytes > 0:
            if known:  # its free was not reported
                close(event.address, i)
            freed.discard(event.address)
            alive[event.address] = i
        elif known and (event.bytes < 0 or alive[event.address] < 0):
            close(event.address, i)
            freed.add(event.address)
        elif event.bytes < 0 and event.address not in freed:
            blocks.append(Block("allocated before", -event.bytes, "temporary", 0, i))
            unreached = max(0, unreached + event.bytes)
    for address in list(alive):
        if alive[address] < 0:
            base[before[address].kind] += before[address].bytes
        else:
            close(address, len(events))
    base["temporary"] += unreached

    return Timeline(
        title=title,
        origin="measured",
        moments=tuple(Moment(e.name, e.seconds, e.phase) for e in events),
        blocks=tuple(sorted(blocks, key=lambda b: (b.start, b.end))),
        base=tuple((kind, size) for kind, size in base.items() if size),
        others=(Block("beside torch's allocator", others, "temporary", 0, len(events)),) if others else (),
    )


def _storages(device: torch.device) -> dict[int, tuple[Kind, torch.UntypedStorage]]:
    """The storages on `device` that Python objects reach, by address."""
    objects = instances(torch.Tensor, torch.optim.Optimizer)
    tensors = [o for o in objects if issubclass(type(o), torch.Tensor)]
    with torch._C.DisableTorchFunctionSubclass():
        grads = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        by_kind: dict[Kind, Iterable[Any]] = {
            "input": tensors,
            "optimizer_state": (
                value for o in objects if issubclass(type(o), torch.optim.Optimizer) for value in states(o)
            ),
            "gradient": grads,
            "parameter": (t for t in tensors if isinstance(t, torch.nn.Parameter)),
        }
        found: dict[int, tuple[Kind, torch.UntypedStorage]] = {}
        for kind, members in by_kind.items():  # the later kind says more
            for tensor in members:
                for part in (tensor,) if kind == "input" else plain(tensor):  # what is inside of inputs is one of them
                    if at := _storage(part, device):
                        found[at[0]] = kind, at[1]
    return found


def _storage(tensor: torch.Tensor, device: torch.device) -> tuple[int, torch.UntypedStorage] | None:
    """Where its storage is on the device, and the storage; None if it has none there.

    Sparse and opaque layouts, wrapper subclasses and tensors that a compiler has hollowed out have none at all. Fake
    ones are on meta.
    """
    try:
        storage = tensor.untyped_storage()
        there = storage.device == device and storage.nbytes() and not off_device(storage.data_ptr())
        return (storage.data_ptr(), storage) if there else None
    except (NotImplementedError, RuntimeError):
        return None


# ---- CPU: torch.profiler --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cpu(recording: Recording, lines: bool) -> Iterator[None]:
    interrupt()
    if torch._C._autograd._profiler_enabled():
        raise MemplanError("cannot record here: a profiler or another recording is running; end it first")
    cpu = torch.device("cpu")
    storages = _storages(cpu)
    before = {address: Resident(kind, s.nbytes()) for address, (kind, s) in storages.items()}
    # The profiler does not report frees of what was allocated before it started. The storage's Python object does: it
    # lives exactly as long as the storage, and its end is written into the profiler's own sequence of events.
    watches = [weakref.ref(s, _marker(address)) for address, (_, s) in storages.items()]
    del storages
    profile = allocator_profile(lines)
    profile.start()
    try:
        yield
    finally:
        profile.stop()
        watches.clear()
        after = {address: Resident(kind, s.nbytes()) for address, (kind, s) in _storages(cpu).items()}
        layers = _layers() if lines else {}
        recording._build = lambda: build("recorded on cpu", events(profile, layers), before, after)


def _layers() -> dict[int, str]:
    """The path of each module from the outermost that holds it, by its id."""
    modules = instances(torch.nn.Module)
    modules = [o for o in modules if not issubclass(type(o), torch.fx.GraphModule)]  # compilers' own
    inner = {id(child) for module in modules for child in module._modules.values()}
    roots = [module for module in modules if id(module) not in inner]
    return {id(module): name for root in roots for name, module in root.named_modules(prefix=type(root).__name__)}


def _marker(address: int) -> Any:
    name = f"{FREED}{address}"

    def mark(_: Any) -> None:
        with torch._C._profiler._RecordFunctionFast(name):
            pass

    return mark


# ---- CUDA: the caching allocator's history --------------------------------------------------------------------------


@contextlib.contextmanager
def _cuda(device: torch.device, recording: Recording) -> Iterator[None]:
    current = torch.cuda.current_device()  # starts CUDA too
    index = current if device.index is None else device.index
    device = torch.device("cuda", index)
    if torch._C._cuda_isHistoryEnabled():
        raise MemplanError("cannot record here: torch records its memory history already; end that first")
    before = {address: Resident(kind, _rounded(s.nbytes())) for address, (kind, s) in _storages(device).items()}
    unreached = max(0, torch.cuda.memory_allocated(device) - sum(r.bytes for r in before.values()))
    free, total = torch.cuda.mem_get_info(device)
    others = max(0, total - free - torch.cuda.memory_reserved(device))
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python")
    try:
        yield
    finally:
        trace = torch.cuda.memory._snapshot()["device_traces"][index]
        torch.cuda.memory._record_memory_history(enabled=None)
        after = {address: Resident(kind, s.nbytes()) for address, (kind, s) in _storages(device).items()}
        recording._build = lambda: build(f"recorded on {device}", traced(trace), before, after, unreached, others)


def _rounded(size: int) -> int:
    """What the caching allocator counts for a request: multiples of 512 bytes."""
    return -(-size // 512) * 512


def traced(trace: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The events of one device of torch.cuda.memory._snapshot()["device_traces"] that change memory_allocated().

    That is "alloc" and "free_requested"; "free_completed" follows when other streams are done with the block.
    Names come from the Python stack. The autograd thread has none, except below a function written in Python.
    """
    events: list[Event] = []
    origin = None
    for entry in trace:
        if entry["action"] not in ("alloc", "free_requested"):
            continue
        now = entry.get("time_us", 0)
        origin = now if origin is None else origin
        frames = entry.get("frames") or []  # innermost first
        files = [frame["filename"] for frame in frames]
        if entry["action"] == "free_requested":
            phase = ""  # context="alloc": frees carry no stack
        elif not frames or files[-1].endswith("torch/autograd/function.py"):
            phase = "backward"
        else:
            phase = "optimizer" if any("/torch/optim/" in file for file in files) else "forward"
        user = next((f for f in frames if "/torch/" not in f["filename"]), None)
        size = _rounded(entry["size"])
        events.append(
            Event(
                seconds=(now - origin) / 1e6,
                address=entry["addr"],
                bytes=size if entry["action"] == "alloc" else -size,
                name=frames[0]["name"] if frames else "autograd" if phase else "free",
                phase=phase,
                source=f"{user['filename']}:{user['line']} in {user['name']}" if user else "",
            )
        )
    return events
