"""What Inductor's generated code will allocate: run it on ghosts, before it runs on memory.

In: the source of a generated wrapper and fake arguments. Out: a tape of allocations and frees, in order.
The wrapper is Python: it allocates buffers, calls kernels, deletes names. Here the allocators hand out ghosts
(a fake tensor and a reference-counted buffer that notes its own end), the kernels do nothing, and ops that
allocate their own results run on fake tensors. So frees are Python's own, exactly as in the real run.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses import FakeTensorMode

from memplan.passes.calls import Call
from memplan.runtime.offloaded import BACK, OFF, TO_DEVICE, TO_HOST
from memplan.runtime.passed import PASSED
from memplan.runtime.streamed import BRING, BROUGHT


@dataclass
class Tape:
    """Allocations as (time, bytes, name), the time each was freed, and calls whose workspace is still unknown.

    `away`: those that are off the device, with their tier. `marks`: when a mark is passed, in their order.
    """

    clock: int = 0
    allocated: list[tuple[int, int, str]] = field(default_factory=list)
    freed: dict[int, int] = field(default_factory=dict)
    away: dict[int, str] = field(default_factory=dict)
    calls: list[tuple[int, Call]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def tick(self) -> int:
        self.clock += 1
        return self.clock


class _Buffer:
    """A storage on the tape, freed when Python drops the last ghost that shows it."""

    def __init__(self, tape: Tape, size: int, name: str) -> None:
        self.tape, self.id = tape, len(tape.allocated)
        tape.allocated.append((tape.tick(), size, name))

    def __del__(self) -> None:
        self.tape.freed[self.id] = self.tape.tick()


class Ghost:
    """A tensor of the wrapper: a fake value, and the buffer behind it (None: memory that is not the step's)."""

    def __init__(self, value: torch.Tensor, buffer: _Buffer | None, tape: Tape) -> None:
        self.value, self.buffer, self.tape = value, buffer, tape

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ghosts = [g for g in pytree.tree_leaves((args, kwargs or {})) if isinstance(g, Ghost)]
        return _run_op(ghosts[0].tape, function, args, kwargs or {}, ghosts)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.value, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **kwargs: _run_op(self.tape, getattr(torch.Tensor, name), (self, *args), kwargs, [self])


def ghost(tape: Tape, value: Any, name: str | None) -> Any:
    """A ghost in the place of a fake argument; with a name it is counted, without one it is somebody else's."""
    if not isinstance(value, torch.Tensor):
        return value
    with tape.mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    buffer = _Buffer(tape, fake.untyped_storage().nbytes(), name) if name else None
    return Ghost(fake, buffer, tape)


def run_wrapper(source: str, tape: Tape, args: list[Any]) -> list[Any]:
    """Run the wrapper's `call` on ghosts; `args` is emptied, as in the real run. Returns its results."""
    start = source.index("class Runner") if "class Runner" in source else source.index("def call(")
    body = _without_helpers(source[start:])
    namespace = _stubs(source, tape, _buffer_names(body))
    exec(compile(body, "<generated wrapper>", "exec"), namespace)
    return list(namespace["call"](args))


def _buffer_names(body: str) -> dict[int, str]:
    """line number -> "buf3 (mm)": the buffer allocated there, and the kernel that first gets it."""
    lines = body.splitlines()
    names = {}
    for number, line in enumerate(lines, 1):
        if found := re.match(r"\s*(\w+) = empty_strided", line):
            uses = (u for u in lines[number:] if re.search(rf"\b{found[1]}\b.*\)", u) and "empty_strided" not in u)
            kernel = re.search(r"([\w.]+)\(", next(uses, ""))
            names[number] = f"{found[1]} ({kernel[1].split('.')[-1]})" if kernel else found[1]
    return names


def _without_helpers(body: str) -> str:
    """The code without the benchmark helpers at its end, which name things the stubs do not have."""
    ends = [body.find(mark) for mark in ("\ndef get_args(", "\ndef benchmark_compiled_module(")]
    return body[: min([e for e in ends if e >= 0], default=len(body))]


def _stubs(source: str, tape: Tape, names: dict[int, str]) -> dict[str, Any]:
    """What the wrapper's code refers to, with allocators that hand out ghosts and kernels that do nothing."""

    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Ghost:
        line = sys._getframe(1).f_lineno
        with tape.mode:
            value = torch.empty_strided(size, stride, dtype=dtype)
        return Ghost(value, _Buffer(tape, value.untyped_storage().nbytes(), names.get(line, "buffer")), tape)

    def reinterpret(of: Ghost, size: Sequence[int], stride: Sequence[int], offset: int) -> Ghost:
        with tape.mode:
            return Ghost(torch.empty_strided(size, stride, dtype=of.value.dtype), of.buffer, tape)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    kernel = types.SimpleNamespace(run=nothing)
    kernels: dict[str, Any] = {
        name: nothing if "cpp" in how else kernel
        for name, how in re.findall(r"^(\w+) = async_compile\.(\w+)\(", source, flags=re.MULTILINE)
    }
    given = {"torch": torch, "aten": torch.ops.aten, "inductor_ops": torch.ops.inductor, "device": torch.device}
    given |= {"math": math, "inf": math.inf, "nan": math.nan, "extern_kernels": _ExternKernels(tape)}
    given |= dict.fromkeys(("empty_strided_cpu", "empty_strided_cuda", "empty_strided_cpu_pinned"), allocate)
    given |= dict.fromkeys(
        ("assert_size_stride", "assert_alignment", "get_raw_stream", "run_intermediate_hooks"), nothing
    )
    return kernels | given | {"reinterpret_tensor": reinterpret}


class _ExternKernels:
    """Library kernels: those given `out` allocate nothing, the others are ops that make their own result."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "out" in kwargs:
                return kwargs["out"]
            function = getattr(torch.ops.aten, name).default
            ghosts = [g for g in pytree.tree_leaves((args, kwargs)) if isinstance(g, Ghost)]
            return _run_op(self.tape, function, args, kwargs, ghosts)

        return call


COPIES = {TO_HOST: OFF, TO_DEVICE: BACK, BRING: BROUGHT}  # what starts one -> what takes its result for the ticket


def _copy(tape: Tape, function: Any, args: Any) -> Ghost:
    """A ticket has the memory that is copied to, and hands it over."""
    if function in COPIES.values():
        value = _fake(tape, function, args)
        return Ghost(value, args[0].buffer, tape)
    ticket = _fake(tape, function, args)
    size = _fake(tape, COPIES[function], (ticket, *args)).untyped_storage().nbytes()
    buffer = _Buffer(tape, size, str(function))
    if function is TO_HOST:
        tape.away[buffer.id] = args[1]
    return Ghost(ticket, buffer, tape)


def _fake(tape: Tape, function: Any, args: Any) -> torch.Tensor:
    with tape.mode:
        made: torch.Tensor = function(*pytree.tree_map_only(Ghost, lambda g: g.value, args))
    return made


def _run_op(tape: Tape, function: Any, args: Any, kwargs: Any, ghosts: Sequence[Ghost]) -> Any:
    """Run an op on the fake values; each new storage among its results is a new buffer."""
    if function in COPIES or function in COPIES.values():
        return _copy(tape, function, args)
    if function is PASSED:
        return tape.marks.append(tape.tick())
    args, kwargs = pytree.tree_map_only(Ghost, lambda g: g.value, (args, kwargs))
    with tape.mode:
        result = function(*args, **kwargs)
    known = {g.value.untyped_storage()._cdata: g.buffer for g in ghosts}

    def wrap(value: torch.Tensor) -> Ghost:
        storage = value.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = _Buffer(tape, storage.nbytes(), str(function))
        return Ghost(value, known[storage._cdata], tape)

    wrapped = pytree.tree_map_only(torch.Tensor, wrap, result)
    if isinstance(function, torch._ops.OpOverload):  # its workspace is alive beside its results
        tape.calls.append((tape.tick(), Call(function, args, kwargs, result)))
    return wrapped
