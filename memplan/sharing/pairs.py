"""Which pairs there are, what each would leave and save, and which to take.

In: a model and a form of Q. Out: every candidate as a Pair with its image, where there is one; a choice of them.
Must hold: an image is stored in less than its target. No weight is in two pairs, so a source is never a target.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import networkx
from torch import Tensor, nn

from memplan.errors import MemplanError
from memplan.sharing.fit import image, least_error
from memplan.sharing.forms import Blocks, Form, Householder, Image
from memplan.sharing.layers import Kinds, Matrix, candidates
from memplan.sharing.report import Pair

Fitted = tuple[Pair, Image | None]
ROUNDING = 1e-6  # by so much an error as stored may be below the least one


def fit_all(model: nn.Module, form: Form, tolerance: float, kinds: Kinds | None, layers: str | None) -> list[Fitted]:
    """Every candidate, on each side where Q is smaller than the target, with its image where it may be under the
    tolerance. What cannot be is there once, with the reason."""
    if not isinstance(form, (Householder, Blocks)):
        raise MemplanError(f"{form!r} is no form of Q: give Householder(reflectors) or Blocks(size)")
    found = candidates(model, kinds, layers)
    room = {name: saving_sides(form, m) for name, m in {m.name: m for _, m, fitting in found if fitting}.items()}
    if not any(sides for sides, _ in room.values()):
        name, (_, why) = max(room.items(), key=lambda item: "values" in item[1][1])
        raise MemplanError(f"{form} saves nothing, here of {name}: {why}")
    fitted: list[Fitted] = []
    for source, target, fitting in found:
        sides, why = room[target.name] if fitting else ({}, f"{source.described} and {target.described} do not fit")
        if sides and not (read(source, target).any() and target.weight.any()):
            sides, why = {}, "all zeros"
        fitted += [fit(form, tolerance, source, target, right, stored) for right, stored in sides.items()]
        if not sides:
            fitted.append((_pair(form, source, target, why), None))
    return fitted


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
                f"have {d} x {d}): make Q smaller"
            )
    return sides, max(whys, key=lambda why: "values" in why, default="")


def fit(form: Form, tolerance: float, source: Matrix, target: Matrix, right: bool, stored: int) -> Fitted:
    """On one side; no image where no Q is under the tolerance, or none can be stored."""
    p = target.weight
    w1, w2 = read(source, target).double(), p.detach().double()
    w1, w2 = (w1.t(), w2.t()) if right else (w1, w2)
    least = least_error(w1, w2)
    pair = dataclasses.replace(
        _pair(form, source, target, ""), side="right" if right else "left", stored=stored, least=least
    )
    if least > tolerance + ROUNDING:
        return dataclasses.replace(pair, why="no Q is under the tolerance"), None
    made, error = image(w1, w2, form, right, p.dtype)
    if not math.isfinite(error):
        dtype = str(p.dtype).removeprefix("torch.")
        return dataclasses.replace(pair, why=f"c or what it makes is out of the range of {dtype}"), None
    return dataclasses.replace(pair, error=error), made.requires_grad_(p.requires_grad)


def read(source: Matrix, target: Matrix) -> Tensor:
    """The first rows and columns of the source, on which Q acts."""
    rows, columns = target.shape
    return source.weight.detach()[:rows, :columns]


def best_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Those that save the most bytes, no weight in two of them; of equal savings, those of the smaller errors."""
    graph, pairs = networkx.Graph(), list(pairs)
    weights = {pair: pair.saved - (pair.error or 0) / len(pairs) for pair in pairs}
    for pair in sorted(pairs, key=lambda pair: weights[pair]):  # of two sides, the better one stays
        graph.add_edge(pair.source, pair.target, weight=weights[pair], pair=pair)
    return [graph.edges[edge]["pair"] for edge in networkx.max_weight_matching(graph)]


def _pair(form: Form, source: Matrix, target: Matrix, why: str) -> Pair:
    name: Literal["Householder", "Blocks"] = "Householder" if isinstance(form, Householder) else "Blocks"
    size = form.reflectors if isinstance(form, Householder) else form.size
    held = target.weight.numel() * target.weight.element_size()
    return Pair(source.name, target.name, target.shape, held, form=name, size=size, why=why)
