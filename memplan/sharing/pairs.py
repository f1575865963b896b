"""Which pairs there are, what each would leave and save, and which to take.

In: a model and a form of Q. Out: every candidate as a Pair with its image, where there is one; a choice of them.
Must hold: an image is stored in less than its target. No weight is in two pairs, so a source is never a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import networkx
from torch import nn

from memplan.errors import MemplanError
from memplan.sharing.fit import image, least_error
from memplan.sharing.forms import Blocks, Form, Householder, Image
from memplan.sharing.layers import Kinds, Matrix, candidates
from memplan.sharing.report import Pair

Fitted = tuple[Pair, Image | None]


def fit_all(model: nn.Module, form: Form, tolerance: float, kinds: Kinds | None, layers: str | None) -> list[Fitted]:
    """Every candidate, with its image where one is smaller than the target and may be under the tolerance."""
    if not isinstance(form, (Householder, Blocks)):
        raise MemplanError(f"{form!r} is no form of Q: give Householder(reflectors) or Blocks(size)")
    found = candidates(model, kinds, layers)
    room = {name: saving_sides(form, m) for name, m in {m.name: m for _, m, fitting in found if fitting}.items()}
    if not any(sides for sides, _ in room.values()):
        name, (_, why) = max(room.items(), key=lambda item: "values" in item[1][1])
        raise MemplanError(f"{form} saves nothing, here of {name}: {why}; make Q smaller")
    return [
        fit(form, tolerance, source, target, *room[target.name])
        if fitting
        else (_pair(form, source, target, f"{list(source.shape)} and {list(target.shape)} do not fit"), None)
        for source, target, fitting in found
    ]


def saving_sides(form: Form, target: Matrix) -> tuple[dict[bool, int], str]:
    """On which side (True: right) Q has less than the target, and its bytes with c; why not on the other."""
    p, sides, whys = target.weight, {}, []
    for right in (False, True):
        d, size = target.shape[right], p.numel() * p.element_size()
        stored = form.nbytes(d, p.dtype) + p.element_size()
        if why := form.wrong(d):
            whys.append(why)
        elif stored < size:
            sides[right] = stored
        else:
            whys.append(
                f"Q of {d} {'columns' if right else 'rows'} and c take {form.arithmetic(d)} and one, {stored:,} bytes, "
                f"and the weight has {target.shape[0]} x {target.shape[1]} values, {size:,} bytes (a dense Q would "
                f"have {d} x {d})"
            )
    return sides, max(whys, key=lambda why: "values" in why, default="")


def fit(form: Form, tolerance: float, source: Matrix, target: Matrix, sides: dict[bool, int], why: str) -> Fitted:
    """The side with the smaller error. Without an image: why."""
    p, shape = target.weight, target.shape
    w1, w2 = source.weight.detach()[: shape[0], : shape[1]].double(), p.detach().double()
    if not sides or not w1.any() or not w2.any():
        return _pair(form, source, target, "all zeros" if sides else why), None
    fitted: list[Fitted] = []
    for right, stored in sides.items():
        a, b = (w1.t(), w2.t()) if right else (w1, w2)
        least = least_error(a, b)
        pair = _pair(form, source, target, "no Q is under the tolerance")
        pair = dataclasses.replace(pair, side="right" if right else "left", stored=stored, least=least)
        if least <= tolerance:
            made, error = image(a, b, form, right, p.dtype)
            fitted.append((dataclasses.replace(pair, error=error, why=""), made.requires_grad_(p.requires_grad)))
        else:
            fitted.append((pair, None))
    return min(fitted, key=lambda one: (one[1] is None, one[0].error or one[0].least))


def best_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Those that save the most bytes, no weight in two of them; of equal savings, those of the smaller errors."""
    graph = networkx.Graph()
    pairs = list(pairs)
    for pair in pairs:
        graph.add_edge(pair.source, pair.target, weight=pair.saved - (pair.error or 0) / len(pairs), pair=pair)
    return [graph.edges[edge]["pair"] for edge in networkx.max_weight_matching(graph)]


def _pair(form: Form, source: Matrix, target: Matrix, why: str) -> Pair:
    name: Literal["Householder", "Blocks"] = "Householder" if isinstance(form, Householder) else "Blocks"
    size = form.reflectors if isinstance(form, Householder) else form.size
    held = target.weight.numel() * target.weight.element_size()
    return Pair(source.name, target.name, target.shape, held, form=name, size=size, why=why)
