"""LoRA: the engine's linear layers add what the trainer's adapters do, and read A and B where the trainer has them.

In: a transformers model with PEFT's LoRA in its linear layers, whose base is the engine's own memory. Out: hooks on the
engine's layers, y[rows] += B(A(x)) * scale, where rows are those of the base in a layer that vLLM has fused. Nothing is
copied, so there is nothing to keep up to date.
What must hold: the engine computes what PEFT's own forward would compute now, in evaluation: adapters that are disabled
or merged, others that are active, and another scale count from the next step of the engine on. So the reference policy
is the engine inside `model.disable_adapter()`. What PEFT computes in another way is refused by name.
vLLM's own LoRA is not used: it has buffers of its own, B times the scale, which would be a copy after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memplan.errors import MemplanError

_LINEAR = ("peft.tuners.lora.layer", "Linear")  # by name: whoever has no adapters needs no PEFT
_RUN = "UnquantizedLinearMethod"  # of vLLM's layers that compute x W^T + b


def base_of(model: nn.Module) -> nn.Module:
    """The model that PEFT has put its layers into; any other is itself. Raises MemplanError where PEFT adds more."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inside = {id(p) for p in base.parameters()}
    for name, p in model.named_parameters():
        if id(p) not in inside:
            raise MemplanError(
                f"parameter {name!r} is not in a layer of the model: of PEFT's adapters the engine runs LoRA alone"
            )
    return base


def layers_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers, by path. Raises MemplanError for its other kinds."""
    layers = dict[str, Any]()
    for path, module in model.named_modules():
        kind = type(module)
        if (kind.__module__, kind.__name__) == _LINEAR:
            layers[path] = module
            for name, variant in getattr(module, "lora_variant", {}).items():
                raise MemplanError(
                    f"the adapter {name!r} at {path!r} is a variant of LoRA, {type(variant).__name__}: the engine runs "
                    "plain LoRA (rslora too); merge it into the base, or leave the option out"
                )
        elif kind.__module__.partition(".")[0] == "peft":
            raise MemplanError(
                f"{path!r} is PEFT's {kind.__name__} of {kind.__module__}: the engine runs LoRA on linear layers and "
                "nothing else; leave it out of the adapter's configuration"
            )
    return layers


@dataclass
class Adapters:
    """Those of one model. `missed`: paths of layers that the engine has not run yet."""

    model: nn.Module
    layers: dict[str, Any]
    missed: set[str] = field(default_factory=set)
    _hooks: list[RemovableHandle] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> Adapters:
        found = Adapters(model, layers_of(model))
        for name, p in found.parameters().items():
            if p.is_meta:
                raise MemplanError(
                    f"parameter {name!r} is on meta, and no adapter is in a checkpoint: share the base, and add "
                    "adapters afterwards"
                )
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B, and their biases, by the model's names."""
        named = {f"{path}.{name}": p for path, layer in self.layers.items() for name, p in layer.named_parameters()}
        base = self.base_names()
        return {name: p for name, p in named.items() if name not in base}

    def base_names(self) -> dict[str, str]:
        """What parameters under an adapter are called without it, by the model's names."""
        return {
            f"{path}.base_layer.{name}": f"{path}.{name}"
            for path, layer in self.layers.items()
            for name, _ in layer.base_layer.named_parameters()
        }

    @property
    def bytes(self) -> int:
        """Of adapters, all of a layer's, active or not."""
        return sum(p.nbytes for p in self.parameters().values())

    def state(self) -> tuple[Any, ...]:
        """What PEFT would do now, beside the values. Raises MemplanError where the engine cannot do the same."""
        for path, layer in layers_of(self.model).items():
            if layer.merged and layer.disable_adapters:
                raise MemplanError(f"the adapter at {path!r} is merged and disabled: unmerge it first")
        return tuple(
            (layer.disable_adapters, *map(tuple, (layer.merged_adapters, layer.active_adapters, layer.scaling.items())))
            for layer in self.layers.values()
        )

    # ---- in the engine

    def places(self, engine: nn.Module, bases: Mapping[int, torch.Tensor | str]) -> dict[str, tuple[nn.Module, int]]:
        """The engine's layer that has each adapter's base, and the first row there. bases: where parameters are, or
        why they are nowhere, by id.
        """
        found = dict[str, tuple[nn.Module, int]]()
        for path, layer in self.layers.items():
            base = bases[id(layer.base_layer.weight)]
            owner = base if isinstance(base, str) else _owner(engine, base)
            if isinstance(owner, str):
                raise MemplanError(
                    f"the adapter at {path!r} has no place in the engine: {owner}; leave it out of target_modules"
                )
            found[path] = owner
        return found

    def run_in(self, places: Mapping[str, tuple[nn.Module, int]]) -> None:
        """Have these layers of the engine run them, until `remove`."""
        for path, (owner, row) in places.items():
            self._hooks.append(owner.register_forward_hook(self._adds(path, row)))
        self.missed = set(places)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check_run(self) -> None:
        """Call when the engine has run. Raises MemplanError where it has passed a layer by."""
        if missed := sorted(self.missed):
            raise MemplanError(
                f"the engine has not run the adapter at {missed[0]!r} (and {len(missed) - 1} others): vLLM does not "
                "call that layer as a module; leave it out of target_modules"
            )

    def _adds(self, path: str, row: int) -> Callable[..., None]:
        layer = self.layers[path]

        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            self.missed.discard(path)
            if layer.disable_adapters or layer.merged:
                return
            whole = output[0] if isinstance(output, tuple) else output  # vLLM's, with a bias that it has not added
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    whole.narrow(-1, row, layer.out_features).add_(_product(layer, name, inputs[0]))

        return add


def _product(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    """As PEFT computes it, without dropout: in the adapter's dtype, scaled at the end."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    down = nn.functional.linear(x.to(a.weight.dtype), a.weight)
    product: torch.Tensor = nn.functional.linear(down, b.weight, b.bias) * layer.scaling[name]
    return product


def _owner(engine: nn.Module, weight: torch.Tensor) -> tuple[nn.Module, int] | str:
    """The engine's layer whose weight these rows are in, and the first of them; or why there is none."""
    why = "no layer of vLLM's has it"
    for module in engine.modules():
        whole = module._parameters.get("weight")
        if whole is None or not whole.data_ptr() <= weight.data_ptr() < whole.data_ptr() + whole.nbytes:
            continue
        if type(getattr(module, "quant_method", None)).__name__ == _RUN:
            return module, (weight.data_ptr() - whole.data_ptr()) // weight[0].nbytes
        why = f"vLLM's {type(module).__name__} is no linear layer"
    return why
