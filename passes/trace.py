"""A user's step and batch -> a Step, on fake tensors: no GPU, no weights, no trace left behind.

In: a callable that returns a loss (or calls .backward() on one), and its batch. Out: the same joint graph that
torch.compile would hand to the partitioner. Modules are found where Python can see them from the step; their
parameters and buffers are replaced by fake ones on the CPU for the time of the call (autograd on fake CUDA
tensors aborts in a CPU build of torch), so models on the meta device do as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._functorch.aot_autograd import aot_function
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import traceback as fx_traceback
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from memplan.errors import MemplanError
from memplan.ir import Step
from memplan.passes import capture
from memplan.passes.partition import Partitioner, mutated_inputs
from memplan.runtime.held import Watch

_TORCH, _HERE = os.path.dirname(torch.__file__), os.path.abspath(__file__)
T = TypeVar("T")
StepOf = Callable[[Partitioner], Step]  # the traced step under another partitioner: other sizes, or nothing measured
SEARCH_DEPTH = 4  # how far from the step a module may be hidden in closures, containers and attributes


class _Traced(Exception):
    """Carries what was made of the graph out of AOTAutograd, which has nothing left to do."""

    def __init__(self, made: Any) -> None:
        self.made = made


class _BackwardCalled(Exception):
    """Carries the loss out of a step that calls backward itself."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def trace(step: Callable[..., Any], batch: Sequence[Any], partitioner: Partitioner, optimizer: Any = None) -> Step:
    """The Step of `step(*batch)`, priced and measured as the partitioner says, with what its optimizer holds.
    MemplanError if it has no backward.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    leaves = [fake(mode, leaf) for leaf in pytree.tree_leaves(tuple(batch)) if isinstance(leaf, torch.Tensor)]
    return traced(step, batch, partitioner, optimizer, mode, leaves, lambda by, step_of: step_of(by))


def traced(
    step: Callable[..., Any],
    batch: Sequence[Any],
    partitioner: Partitioner,
    optimizer: Any,
    mode: FakeTensorMode,
    fake_batch: Sequence[torch.Tensor],
    then: Callable[[Partitioner, StepOf], T],
    symbols: Sequence[torch.SymInt] = (),
) -> T:
    """What `then` makes of the traced step: it is given the partitioner, which knows the step's names by then, and what
    makes a Step under it or one with other sizes. `fake_batch` are the batch's tensors, of `mode`, and `symbols` their
    sizes that are open: arguments like the tensors, as in Dynamo's graphs, or they would be read from activations.
    """
    step = _uncompiled(step)
    modules = find_modules(step)
    state = {f"{m}:{name}": t for m, module in enumerate(modules) for name, t in _state(module).items()}
    fakes = [fake(mode, t) for t in state.values()]
    leaves, spec = pytree.tree_flatten(tuple(batch))
    inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    arguments = [*fakes, *symbols, *fake_batch]
    given = (*map(str, symbols), *(f"batch[{i}]" for i in range(len(inputs))))
    names = (*(_name(modules, key) for key in state), *given)
    parameters = [t for t in state.values() if isinstance(t, nn.Parameter)]
    held = Watch(optimizer, measures=False).held(parameters)
    partitioner = dataclasses.replace(partitioner, names=names, held=held, title=_title(step))
    if partitioner.measure and any(t.is_meta for t in [*state.values(), *(leaves[i] for i in inputs)]):
        note = "the step is on the meta device, so no op was run here: the memory inside ops is left out"
        partitioner = dataclasses.replace(partitioner, measure=False, notes=(*partitioner.notes, note))

    def flat(*tensors: Any) -> Any:
        for i, leaf in zip(inputs, tensors[len(fakes) + len(symbols) :], strict=True):
            leaves[i] = leaf
        with contextlib.ExitStack() as stack:
            for m, module in enumerate(modules):
                replaced = dict(zip(state, tensors, strict=False))
                mine = {k.split(":", 1)[1]: t for k, t in replaced.items() if k.startswith(f"{m}:")}
                stack.enter_context(_reparametrize_module(module, mine, tie_weights=True))
                stack.enter_context(_layers(module))
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", _trap))
            stack.enter_context(_SourceLines())
            try:
                return step(*pytree.tree_unflatten(leaves, spec))
            except _BackwardCalled as called:
                return called.loss

    def stop(joint: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any) -> NoReturn:
        capture.prepare(joint)
        given = num_fwd_outputs, range(len(fakes)), mutated_inputs()
        tiled = partitioner.tiled(joint, *given)
        raise _Traced(then(partitioner, lambda by: by.step(tiled, *given)))

    inner = partitioner.inner
    with _as_compiled(), mode, fx_traceback.preserve_node_meta():
        try:
            aot_function(
                flat, fw_compiler=_refuse, bw_compiler=_refuse, partition_fn=stop, decompositions=_decompositions(inner)
            )(*arguments)
        except _Traced as found:
            return found.made  # type: ignore[no-any-return]
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            raise MemplanError(
                f"the step looks at a tensor's values at {_users_line(e)} ({e.func}), and a plan has none: "
                "choose with torch.where, or plan the part after that line"
            ) from e
    raise AssertionError("AOTAutograd returned without calling the partitioner")


def _uncompiled(step: Any) -> Callable[..., Any]:
    """The step itself where it was compiled already."""
    inner = getattr(step, "_orig_mod", None) or getattr(step, "_torchdynamo_orig_callable", None) or step
    if not callable(inner):
        raise MemplanError(f"{step!r:.80} is not a step: give a function or module that returns the loss of a batch")
    return inner  # type: ignore[no-any-return]


def _users_line(error: BaseException) -> str:
    """The innermost line outside torch in an error's traceback: "train.py:12 in loss"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_TORCH, _HERE))]
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else "a line"


def _refuse(gm: fx.GraphModule, example_inputs: Any) -> NoReturn:
    raise MemplanError(
        "the step has no backward: nothing it returns depends on a parameter that requires a gradient; return the loss"
    )


def _trap(loss: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
    raise _BackwardCalled(loss)


def find_modules(step: Any) -> list[nn.Module]:
    """The outermost modules that Python can see from the step: itself, closures, globals it names, attributes."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(step, 0)]
    while stack:
        value, depth = stack.pop()
        if id(value) in seen or depth > SEARCH_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        else:
            stack.extend((inner, depth + 1) for inner in _reachable(value))
    inner = {id(child) for m in found.values() for child in m.modules() if child is not m}
    return [m for key, m in found.items() if key not in inner]


def _reachable(value: Any) -> Iterator[Any]:
    if inspect.ismethod(value):
        yield value.__self__
        yield value.__func__
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(inspect.unwrap(value))
        yield from variables.nonlocals.values()
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from (v for v in variables.globals.values() if not inspect.ismodule(v))
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.Tensor)):
        yield from vars(value).values()


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _name(modules: Sequence[nn.Module], key: str) -> str:
    index, name = key.split(":", 1)
    return name if len(modules) == 1 else f"{type(modules[int(index)]).__name__}{index}.{name}"


def fake(mode: FakeTensorMode, tensor: torch.Tensor, layout: tuple[Any, Any] | None = None) -> torch.Tensor:
    """The tensor without its memory, on the CPU. `layout`: another shape and stride."""
    with mode:
        shape, stride = layout or (tensor.shape, tensor.stride())
        made = torch.empty_strided(shape, stride, dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def _layers(module: nn.Module) -> Iterator[None]:
    """Note each node's module path, as Dynamo would."""
    open_notes: list[Any] = []

    def enter(path: str, *_: Any) -> None:
        open_notes.append(fx_traceback.annotate({capture.LAYER: path}))
        open_notes[-1].__enter__()

    def leave(*_: Any) -> None:
        open_notes.pop().__exit__(None, None, None)

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(functools.partial(enter, path)))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while open_notes:  # a forward that raised
            leave()


class _SourceLines(TorchFunctionMode):
    """Note the user's line for each node, as Dynamo would: the innermost frame that is not torch's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        code = frame.f_code
        fx_traceback.set_stack_trace([f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n'])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _as_compiled() -> Iterator[None]:
    """Let models take the branches they take under torch.compile, and put the random generator back."""
    state = torch.get_rng_state()
    counters = {name: counter.copy() for name, counter in torch._dynamo.utils.counters.items()}
    try:
        with mock.patch.object(torch.compiler, "_is_compiling_flag", True):
            yield
    finally:
        torch.set_rng_state(state)
        torch._dynamo.utils.counters.clear()
        torch._dynamo.utils.counters.update(counters)


def _decompositions(inner: str) -> dict[Any, Any]:
    """The ops that the inner compiler takes apart before anything is planned."""
    if inner != "inductor":
        return {}
    from torch._inductor.decomposition import select_decomp_table

    return dict(select_decomp_table())


def _title(step: Any) -> str:
    return str(getattr(step, "__name__", None) or type(step).__name__)
