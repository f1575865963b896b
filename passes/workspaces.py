"""The memory inside ops, measured: each op is run once per shape, stride and dtype.

In: calls of ops with fake values on the CPU. Out: bytes beyond the op's inputs and outputs at its peak.
A kernel may cast, copy or pack inside (softmax of a strided input, attention's backward, bfloat16 next to
float32), and no trace can see it. The generator's state is put back; nothing of what ran is kept.
On a device that is not this one nothing can be run: the machine's workspace_rules apply instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch._C._profiler import _ProfilerEvent
from torch.profiler import record_function
from torch.utils._python_dispatch import _disable_current_modes

from memplan.errors import MemplanError
from memplan.ir import Machine
from memplan.passes import costs
from memplan.passes.calls import Call, name, tensors
from memplan.runtime import tiled
from memplan.runtime.allocator import allocator_profile, interrupt
from memplan.runtime.kernels.linear_logprob import work

_MARK = "memplan::workspace::"


class Inside(NamedTuple):
    """What running an op showed. `outputs`: the bytes of the storage behind each tensor it returns.

    Kernels may allocate more for a result than it shows, and keep it: `mse_loss` reduces in place of its unreduced
    result, `copy` clones the whole storage of a view.
    """

    workspace: int
    outputs: tuple[int, ...] = ()  # empty: not known


Known = dict[Any, Inside]  # by signature


def measure(calls: Sequence[Call], known: Known | None = None) -> list[int]:
    """Bytes at each call's peak beyond the storages that its fake result says it makes; 0 if it cannot run on zeros."""
    found = run_alone(calls, known)
    return [f.workspace + max(0, sum(f.outputs) - _fake_bytes(c)) for f, c in zip(found, calls, strict=True)]


def run_alone(calls: Sequence[Call], known: Known | None = None) -> list[Inside]:
    """What each call does inside; Inside(0) for ops that cannot be run alone on zeros. `known` is looked at first, and
    what is found is added to it.

    Raises MemplanError where something must run while another profiler does: torch has only one.
    """
    known = {} if known is None else known
    signatures = [_signature(call) if _runnable(call) else None for call in calls]
    new = {s: call for s, call in zip(signatures, calls, strict=True) if s is not None and s not in known}
    if new:
        known.update(zip(new, _measured(list(new.values())), strict=True))
    return [Inside(0) if s is None else known[s] for s in signatures]


def _measured(calls: Sequence[Call]) -> list[Inside]:
    interrupt()
    if torch.autograd.profiler._is_profiler_enabled:
        raise MemplanError(
            "a step was planned while a profiler or memplan.record() was running, and planning measures the memory "
            "inside ops with the same profiler: call the step once before recording it"
        )
    generator = torch.get_rng_state()
    try:
        with _disable_current_modes(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(calls)
    finally:
        torch.set_rng_state(generator)


def _fake_bytes(call: Call) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors(call.result))


def by_rule(call: Call, machine: Machine) -> int:
    """The machine's table: a multiple of the op's first output. Of a loop over slices, and of the
    fused head, what a slice holds."""
    if call.target is tiled.OP:
        return tiled.one_slice(*call.args).peak
    if (head := work.of(call.target, call.args)) is not None:
        return head.workspace()
    factor = dict(machine.workspace_rules).get(str(call.target))
    results = tensors(call.result)
    return int(factor * costs.nbytes(results[0])) if factor and results else 0


def _runnable(call: Call) -> bool:
    if not isinstance(call.target, torch._ops.OpOverload) or call.target.namespace not in ("aten", "prims", "memplan"):
        return False
    if "mkldnn_rnn_layer" in str(call.target):  # it reads addresses in one of its inputs, and here there are zeros
        return False
    inputs = tensors((call.args, call.kwargs))
    return all(t.device.type == "cpu" and t.layout is torch.strided for t in inputs)


def _signature(call: Call) -> Any:
    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (*_layout(value), str(value.dtype))
        return repr(value)

    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    return (str(call.target), str(spec), tuple(describe(leaf) for leaf in leaves))


def _run(calls: Sequence[Call]) -> list[Inside]:
    """Each call, run once; Inside(0) where that failed."""
    sizes: dict[int, tuple[int, ...]] = {}
    with allocator_profile() as trace:
        for i, call in enumerate(calls):
            try:
                args, kwargs = pytree.tree_map(_real, (call.args, call.kwargs))
                result = None
                if call.target is tiled.OP:
                    tiled.prepare(*args)
                with record_function(f"{_MARK}{i}"):
                    for _ in _routings(call, args, kwargs):
                        del result
                        result = call.target(*args, **kwargs)
                sizes[i] = tuple(t.untyped_storage().nbytes() for t in tensors(result))
                del args, kwargs, result
            except Exception:  # zeros are not valid input to every op; its workspace then stays unknown
                continue
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    found = [Inside(0)] * len(calls)
    stack = list(trace.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        if event.name.startswith(_MARK):
            i = int(event.name.removeprefix(_MARK))
            if i in sizes:
                found[i] = Inside(max(0, _peak_inside(event) - sum(sizes[i])), sizes[i])
        else:
            stack.extend(event.children)
    return found


def _peak_inside(event: _ProfilerEvent) -> int:
    changes: list[tuple[int, int]] = []
    stack = list(event.children)
    while stack:
        child = stack.pop()
        if child.name == "[memory]":
            changes.append((child.start_time_ns, child.extra_fields.alloc_size))  # type: ignore[union-attr]
        stack.extend(child.children)
    total = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        total += change
        peak = max(peak, total)
    return peak


def _routings(call: Call, args: Any, kwargs: Any) -> Iterator[None]:
    """Once for most ops. A grouped product runs several times: its groups are empty on zeros, and which rows real data
    puts where is not known, so equal groups, one group, and two halves stand for them."""
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if name(call.target) != "_grouped_mm" or offsets is None:
        yield
        return
    rows, groups = args[0].shape[-1 if args[1].dim() == 2 else 0], offsets.numel()
    order = torch.arange(1, groups + 1)
    for ends in (order * rows // groups, order * 0 + rows, torch.where(order < groups, rows // 2 - 1, rows)):
        offsets.copy_(ends)
        yield


def _real(value: Any) -> Any:
    """Zeros in the place of a fake value: a valid index, and a valid number."""
    if not isinstance(value, torch.Tensor):
        return value
    shape, stride, offset, size = _layout(value)
    return torch.zeros(size // value.dtype.itemsize, dtype=value.dtype).as_strided(shape, stride, offset)


def _layout(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Shape, stride, offset, and the bytes of the storage: some kernels clone all of it."""
    return tuple(value.shape), value.stride(), int(value.storage_offset()), value.untyped_storage().nbytes()
