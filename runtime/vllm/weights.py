"""One copy of the weights: a transformers model's parameters become views of vLLM's.

In: the trainer's model, and vLLM's of the same configuration. Out: the same parameters, in vLLM's memory, where an
optimizer writes what the engine reads. vLLM keeps some side by side in one (q, k, v; gate and up) and pads the
vocabulary; all of these are rows, so that each is a contiguous view. Of a model with adapters that is its base, and the
engine runs the adapters (adapters.py).
What must hold: where a parameter is, is what vLLM's own loader does with it: the one copy that it makes is looked at
and not made. A parameter of which it makes something else (several copies, a transposed one) is not shared but copied
by that loader, each time before the engine runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.errors import MemplanError
from memplan.runtime.vllm.adapters import Adapters

_SAME = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "tie_word_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "sliding_window", "rope_parameters",
)  # fmt: skip
_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")  # vLLM's, that keep weights as they are loaded


@dataclass
class Shared:
    """What `model` shares with `engine`, vLLM's: addresses by parameter. `copied`: those it does not, and why."""

    model: nn.Module
    engine: nn.Module
    adapters: Adapters
    addresses: dict[str, int] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    seen: tuple[Any, ...] = ()  # of what the engine has

    def changed(self) -> bool:
        """Has anything that autograd sees been written since `seen`, or other adapters been chosen? Raises MemplanError
        where one has moved away.
        """
        named = dict(self.model.named_parameters())
        for name, address in self.addresses.items():
            if name not in named or named[name].data_ptr() != address:
                raise MemplanError(
                    f"parameter {name!r} is not in the engine's memory any more, as after model.to() or assign=True: "
                    "share() the model again"
                )
        return self.versions() != self.seen

    def copy(self) -> None:
        """Bring the engine what is not shared."""
        plain = self.adapters.base_names()
        for name in self.copied:
            _load(self.engine, plain.get(name, name), self.model.get_parameter(name).detach())

    def sizes(self) -> tuple[int, int]:
        """Bytes of the parameters that are the engine's memory, and of those that it has copies of."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        both = {address: named[name].nbytes for name, address in self.addresses.items()}
        return sum(both.values()), sum({id(named[name]): named[name].nbytes for name in self.copied}.values())

    def report(self) -> str:
        """What is shared, which adapters are run, and what is copied, a line each."""
        lines = [f"{name} is copied before each rollout: {why}" for name, why in self.copied.items()]
        if (found := self.adapters).layers:
            size = found.bytes
            lines.insert(
                0, f"{len(found.layers)} adapters are run by the engine where the trainer has them, {size} bytes"
            )
        return "\n".join([f"{len(self.addresses)} parameters are the engine's own memory", *lines])

    def versions(self) -> tuple[Any, ...]:
        """What there is: parameters, where they are, how often autograd saw them written, and what adapters do."""
        return self.adapters.state(), *((id(p), p.data_ptr(), p._version) for p in self.model.parameters())


def share(model: nn.Module, engine: nn.Module, config: Any) -> Shared:
    """Move a model's parameters into the engine's, and have it run the model's adapters. config: that the engine was
    made from. model: without PEFT's wrapper.

    Parameters stay the same objects, with their values; those on meta take the engine's values, and are new objects.
    Raises MemplanError, and moves nothing, where the model is not the engine's.
    """
    _check_same(model, config)
    if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
        model.tie_weights()  # type: ignore[operator]  # which a model that is made on meta has not done
    adapters, covered = Adapters.of(model), Counter[int]()
    shared, plain, aside = Shared(model, engine, adapters), adapters.base_names(), adapters.parameters()
    named = {name: p for name, p in model.named_parameters() if name not in aside}
    places = {name: _place(engine, plain.get(name, name), p, covered) for name, p in named.items()}
    for name, place in places.items():
        if isinstance(place, str):
            if named[name].is_meta:
                raise MemplanError(
                    f"parameter {name!r} is on meta and cannot be the engine's ({place}): give it values"
                )
            shared.copied[name] = place
    _check_covered(engine, covered)
    layers = adapters.places(engine, {id(p): places[name] for name, p in named.items()})
    for name, place in places.items():
        if isinstance(place, torch.Tensor):
            shared.addresses[name] = _moved(model, named[name], place).data_ptr()
    adapters.run_in(layers)
    return shared


def _check_same(model: nn.Module, config: Any) -> None:
    for key in _SAME:
        ours, theirs = getattr(getattr(model, "config", None), key, None), getattr(config, key, None)
        if ours is not None and ours != theirs:
            raise MemplanError(
                f"the engine is of another model, with {key} {theirs!r} and not {ours!r}: start it from a checkpoint "
                "of this one"
            )
    if meta := [name for name, b in model.named_buffers() if b.is_meta]:
        raise MemplanError(
            f"buffer {meta[0]!r} is on meta, and the engine has none to give: make the model under "
            "accelerate.init_empty_weights(), which leaves buffers where they are"
        )


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies into the engine's parameters are listed, and nothing is written to them."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {p.untyped_storage().data_ptr() for p in engine.parameters()}
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = args[0] if func._schema.is_mutable else None
        if not isinstance(written, torch.Tensor) or written.untyped_storage().data_ptr() not in self.storages:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copies.append((written, args[1]))
        elif func is not torch.ops.aten.fill_.Scalar:  # of the rows that pad a vocabulary
            raise MemplanError(f"it is written to by {func}")
        return written


def _check_covered(engine: nn.Module, covered: Counter[int]) -> None:
    """Every parameter of the engine has its values from the trainer, but for what pads a vocabulary."""
    for path, module in engine.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        for name, p in module.named_parameters(recurse=False):
            if method not in (*_PLAIN, "NoneType"):
                raise MemplanError(f"parameter {path}.{name!r} cannot be kept up to date: vLLM packs it ({method})")
            found = covered[p.untyped_storage().data_ptr()]
            if found != p.numel() and not (found and hasattr(module, "org_vocab_size")):
                raise MemplanError(
                    f"the engine is of another model: it has {path}.{name} {tuple(p.shape)}, and the trainer {found} "
                    f"numbers of {p.numel()}; start it from a checkpoint of this one"
                )


def _place(engine: nn.Module, name: str, p: torch.Tensor, covered: Counter[int]) -> torch.Tensor | str:
    """Where the engine has a parameter, or why that is no place for the trainer's. Counts numbers by storage."""
    probe = torch.empty(p.shape, dtype=p.dtype)  # never touched
    with _Watched(engine) as watched:
        _load(engine, name, probe)
    if (size := sum(to.numel() for to, _ in watched.copies)) != p.numel():
        raise MemplanError(
            f"the engine is of another model: of parameter {name!r} {tuple(p.shape)} it takes {size} numbers of "
            f"{p.numel()}; start it from a checkpoint of this one"
        )
    for written, _ in watched.copies:
        covered[written.untyped_storage().data_ptr()] += written.numel()
    if len(watched.copies) != 1:
        return f"vLLM keeps it in {len(watched.copies)} pieces"
    to: torch.Tensor
    to, loaded = watched.copies[0]
    if (loaded.data_ptr(), loaded.shape, loaded.stride()) != (probe.data_ptr(), probe.shape, probe.stride()):
        return "vLLM keeps it in another order"
    if to.dtype != p.dtype:
        return f"vLLM keeps it as {to.dtype}, and the trainer as {p.dtype}"
    if not to.is_contiguous() or to.shape != p.shape:
        return "vLLM keeps it with gaps"
    return to


def _load(engine: nn.Module, name: str, value: torch.Tensor) -> None:
    """By vLLM's own loader."""
    try:
        loaded = engine.load_weights([(name, value)])  # type: ignore[operator]
    except Exception as error:
        raise MemplanError(
            f"parameter {name!r} {tuple(value.shape)} is not taken by vLLM's {type(engine).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if loaded is not None and not loaded:
        raise MemplanError(f"vLLM's {type(engine).__name__} has no place for parameter {name!r} {tuple(value.shape)}")


def _moved(model: nn.Module, p: nn.Parameter, to: torch.Tensor) -> nn.Parameter:
    if not p.is_meta:
        p.data = to.copy_(p.detach())
        return p
    new = nn.Parameter(to, requires_grad=p.requires_grad)
    for module in model.modules():
        for key, there in module._parameters.items():
            if there is p:  # more than once, where it is tied
                module._parameters[key] = new
    return new
