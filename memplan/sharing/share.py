"""Pairs of weights are found, merged under a tolerance, and taken apart again.

In: a model whose layers have matrices. Out: the same model, in which the target of a merged pair is the source's own
Parameter, parametrized (torch.nn.utils.parametrize): reading `weight` computes c Q W1 anew, compiled or not, and
gradients go to W1, Q and c. Its own storage is gone. Everything is fitted before anything is changed.
A weight is in one pair at most, and pairs are chosen to save the most bytes.
In state_dict() a target is "parametrizations.weight.original", the source once more, and "parametrizations.weight.0.*".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from memplan.errors import MemplanError
from memplan.runtime.streamed import own_class
from memplan.sharing.forms import Blocks, Form, Householder, Image
from memplan.sharing.layers import Kinds, check_model
from memplan.sharing.pairs import best_pairs, fit_all
from memplan.sharing.report import Pair, Report


def share_lossy(
    model: nn.Module, *, form: Form, tolerance: float, kinds: Kinds | None = None, layers: str | None = None
) -> Report:
    """Merge pairs of weights in adjacent layers where that leaves a relative error (Frobenius) of `tolerance` at most.

    LOSSY: merged weights change. `form`: how Q is stored, Householder(k) or Blocks(b). `kinds`: pairs of names of what
    is compared, of layer L and of layer L + 1, with wildcards: [("q_proj", "k_proj")], [("*", "*")]; None: each kind
    with itself. `layers`: the module whose children are the layers. Make optimizers afterwards: parameters are others.
    Raises MemplanError for what cannot be done; then nothing has changed.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise MemplanError(
            f"tolerance {tolerance!r} is not a relative error between 0 and 1: an image of 0 times a weight has an "
            "error of 1"
        )
    fitted = fit_all(model, form, tolerance, kinds, layers)
    chosen = best_pairs([pair for pair, made in fitted if made and pair.error is not None and pair.error <= tolerance])
    before, pairs = held(model), []
    for pair, made in fitted:
        if pair in chosen and made:
            pair = dataclasses.replace(pair, merged=True)
            install(model, pair, made)
        elif made and not pair.why:
            over = pair.error is None or pair.error > tolerance
            pair = dataclasses.replace(pair, why="over the tolerance" if over else "other pairs save more")
        pairs.append(pair)
    return Report(tuple(pairs), tolerance, before, held(model))


def survey(model: nn.Module, *, form: Form, kinds: Kinds | None = None, layers: str | None = None) -> Report:
    """Errors and bytes of all pairs; nothing is merged, and no image is left out for its error."""
    pairs = tuple(pair for pair, _ in fit_all(model, form, 1.0, kinds, layers))
    return Report(pairs, 1.0, held(model), held(model))


def share_as(model: nn.Module, report: Report) -> nn.Module:
    """Give a model the pairs that `report` has merged, without values: load_state_dict of a shared model's comes next.

    Raises MemplanError where the model has not the report's weights; then nothing has changed.
    """
    check_model(model)
    if not isinstance(report, Report):
        raise MemplanError(
            f"a {type(report).__name__} is no report: give what share_lossy returned, or Report.load reads"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for pair in report.merged:
        for name in (pair.source, pair.target):
            if name not in parameters:
                raise MemplanError(f"the model has no parameter {name!r}, which the report has: is it another model?")
        source, target = (list(parameters[name].shape) for name in (pair.source, pair.target))
        if target != list(pair.shape) or any(s < t for s, t in zip(source, target, strict=True)):
            raise MemplanError(
                f"{pair.target} is {target}, with {pair.source} {source}, and {list(pair.shape)} in the report: is it "
                "another model?"
            )
    for pair in report.merged:
        p, right = parameters[pair.target], pair.side == "right"
        form: Form = Blocks(pair.size) if pair.form == "Blocks" else Householder(pair.size or 0)
        q = form.blank(pair.shape[right], p.dtype, p.device)
        made = Image(q, torch.ones((), dtype=p.dtype, device=p.device), pair.shape, right)
        install(model, pair, made.requires_grad_(p.requires_grad))
    return model


def unshare(model: nn.Module) -> nn.Module:
    """Give every shared weight a storage of its own again, with the values that it reads as; returns the module."""
    check_model(model)
    for owner in list(model.modules()):
        for name in list(getattr(owner, "parametrizations", ())):
            chain: Any = owner.parametrizations[name]  # type: ignore[index]
            if not any(isinstance(link, Image) for link in chain):
                continue
            if len(chain) > 1:
                raise MemplanError(f"a shared {name!r} is parametrized once more: remove that first")
            value, trains = getattr(owner, name).detach().clone(), chain[0].scale.requires_grad
            own_class(owner)
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            setattr(owner, name, nn.Parameter(value, requires_grad=trains))
    return model


def held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def install(model: nn.Module, pair: Pair, made: Image) -> None:
    """The target reads as the image of the source, whose Parameter it now has."""
    path, _, name = pair.target.rpartition(".")
    owner = model.get_submodule(path)
    setattr(owner, name, model.get_parameter(pair.source))
    parametrize.register_parametrization(owner, name, made, unsafe=True)
