"""The matrices of a model's layers, and which of adjacent layers may be a pair.

In: a model. Out: matrices by layer, and candidates (source, target) whose shapes fit. Raises MemplanError where a
matrix that was asked for cannot share.
Layers are the children of a ModuleList. A matrix's kind is its module's name within the layer: "self_attn.q_proj".
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from memplan.errors import MemplanError, did_you_mean

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Kinds = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions; `kind` within its layer, `name` within the model."""

    kind: str
    name: str
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def described(self) -> str:
        """Shape, dtype and device."""
        return f"{list(self.shape)} {str(self.weight.dtype).removeprefix('torch.')} {self.weight.device}"


def candidates(
    model: nn.Module, kinds: Kinds | None = None, layers: str | None = None
) -> list[tuple[Matrix, Matrix, bool]]:
    """(source, target, whether their shapes fit) of adjacent layers.

    The larger is the source, of equal ones that of the earlier layer. `kinds`: (of layer L, of layer L + 1), with
    wildcards; None: each kind with itself. `layers`: the name of the list of layers; None: every outermost one.
    """
    stacks = [[matrices(layer, name) for name, layer in stack] for stack in found_layers(model, layers)]
    known = sorted({m.kind for stack in stacks for layer in stack for m in layer})
    if not known:
        raise MemplanError("no layer has a matrix among its parameters: are they quantised, and so buffers?")
    wanted = asked(kinds, known)
    pairs = []
    for stack in stacks:
        for one, other in itertools.pairwise(stack):
            found = [(a, b) for a in one for b in other if (a.kind, b.kind) in wanted]
            pairs += [(*ordered(a, b), fits(a, b) or fits(b, a)) for a, b in found]
    if not pairs:
        raise MemplanError(
            f"no pair of kinds {sorted(wanted)[:3]} is in adjacent layers: they have to be in two layers that follow "
            "one another"
        )
    check_weights(model, {m.name: m for a, b, _ in pairs for m in (a, b)})
    if not any(fit for *_, fit in pairs):
        a, b, _ = pairs[0]
        raise MemplanError(
            f"no two fit, as {a.name}, {a.described}, and {b.name}, {b.described}: one has to have at least the "
            "other's rows and columns, and its dtype and device"
        )
    return pairs


def check_model(model: object) -> None:
    """Raises MemplanError for what has no weights."""
    if not isinstance(model, nn.Module):
        raise MemplanError(f"cannot share weights of a {type(model).__name__}: give a torch.nn.Module")


def found_layers(model: nn.Module, layers: str | None) -> list[list[tuple[str, nn.Module]]]:
    """Lists of (name, layer), each of two layers or more."""
    check_model(model)
    named = dict(model.named_modules())
    if layers is not None:
        if not isinstance(layers, str):
            raise MemplanError(
                f"layers={layers!r} is no name: give that of the module whose children are the layers, "
                "layers='model.blocks'"
            )
        if layers not in named:
            raise MemplanError(f"the model has no module {layers!r}{did_you_mean(layers, named)}")
        outermost = [layers]
    else:
        lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList)]
        outermost = [n for n in lists if not any(n.startswith(other and f"{other}.") for other in lists if other != n)]
    stacks = [
        [(f"{name}.{key}" if name else key, layer) for key, layer in named[name].named_children()] for name in outermost
    ]
    if not any(len(stack) > 1 for stack in stacks):
        raise MemplanError(
            f"{type(model).__name__} has no layers: no torch.nn.ModuleList of two or more. Name the module whose "
            "children are the layers, layers='model.blocks'"
        )
    return stacks


def matrices(layer: nn.Module, prefix: str) -> list[Matrix]:
    """All parameters of two dimensions, tied ones too; a parametrized one by what is stored for it."""
    found = []
    for name, p in layer.named_parameters(remove_duplicate=False):
        path, inside, rest = name.rpartition("parametrizations.")
        if p.dim() == 2 and (not inside or ".original" in rest):
            kind = path + rest.partition(".original")[0] if inside else name
            found.append(Matrix(kind.removesuffix(".weight"), f"{prefix}.{name}", p))
    return found


def asked(kinds: Kinds | None, known: Sequence[str]) -> set[tuple[str, str]]:
    """Pairs of kinds, wildcards resolved."""
    if kinds is None:
        return {(kind, kind) for kind in known}
    if not isinstance(kinds, Iterable):
        raise MemplanError(
            f"kinds={kinds!r}: give pairs of names, [('q_proj', 'k_proj')], or None for each with itself"
        )
    wanted = set()
    for pair in kinds:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(k, str) for k in pair):
            raise MemplanError(f"kinds has {pair!r}: give pairs of names, [('q_proj', 'k_proj')]")
        of = [[kind for kind in known if fnmatch(kind, k) or fnmatch(kind, f"*.{k}")] for k in pair]
        for k, matching in zip(pair, of, strict=True):
            if not matching:
                raise MemplanError(f"no matrix of a layer is called {k!r}{did_you_mean(k, known)}; there are {known}")
        wanted |= {(a, b) for a in of[0] for b in of[1]}
    if not wanted:
        raise MemplanError("kinds is empty: give pairs of names, [('q_proj', 'k_proj')], or None for each with itself")
    return wanted


def fits(source: Matrix, target: Matrix) -> bool:
    """Whether the source has as many rows and columns, in the same dtype and place."""
    s, t = source.weight, target.weight
    enough = all(a >= b for a, b in zip(source.shape, target.shape, strict=True))
    return enough and (s.dtype, s.device) == (t.dtype, t.device)


def ordered(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """The source first."""
    return (a, b) if fits(a, b) or not fits(b, a) else (b, a)


def check_weights(model: nn.Module, found: dict[str, Matrix]) -> None:
    """Raises MemplanError for the first that cannot share."""
    parametrized = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, parametrize.ParametrizationList)
    ]
    every = model.named_parameters(remove_duplicate=False)
    owners = Counter(p.untyped_storage()._cdata for _, p in every if p.numel())
    for name, m in found.items():
        p = m.weight
        if type(p.data) is not Tensor or p.dtype not in DTYPES:
            wrong = f"is a {type(p.data).__name__} of {p.dtype}: quantised weights cannot share, name other kinds"
        elif p.device.type == "meta":
            wrong = "is on the meta device: load its values first, there are none to compare"
        elif any(name.startswith(prefix) for prefix in parametrized):
            wrong = "is parametrized, or shared already: memplan.sharing.unshare(model) first, or name other kinds"
        elif owners[p.untyped_storage()._cdata] > 1:
            wrong = "is tied, or shared already: memplan.sharing.unshare(model) first, or name other kinds"
        elif not p.isfinite().all():
            wrong = "has values that are not finite: load it anew, or name other kinds"
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.RNNBase):
            wrong = "is an RNN's, which does not read it by its name: name other kinds"
        else:
            continue
        raise MemplanError(f"{name} {wrong}")
