"""The orthogonal Q of a form that takes one matrix nearest to another.

In: W1, W2 [d, n], and a form. Out: c and Q for which |W2 - c Q W1| is small, and how small it can be at all.
With M = W2 W1' the best c leaves a relative error of sqrt(1 - r^2), r = <Q, M> / (|W1| |W2|): what is looked for is the
largest <Q, M>. Over every Q it is the sum of M's singular values (orthogonal Procrustes, Schönemann 1966), so no form
can be below that error. By blocks it is that of each block of M, exactly. Of reflections, one is exact when the others
stay: its vector is the lowest eigenvector of a symmetric d x d matrix; they are found in turn, and gone through again.
-Q is no product of as few, so they are found for -M too, where c is negative.
That is a local optimum; where W2 is such an image of W1, it is that image.
All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memplan.sharing.forms import Blocks, Form, Householder, Image, Reflections, Triangles, fold

SWEEPS, ENOUGH = 30, 1e-3  # the most, and the part of 1 - r that one more has to take away


def overlap(w1: Tensor, w2: Tensor) -> Tensor:
    """M, of matrices of length 1: M's singular values add up to r."""
    m: Tensor = (w2 / w2.norm()) @ (w1 / w1.norm()).t()
    return m


def relative(r: float) -> float:
    """The relative error that is left by the best c."""
    return float(max(0.0, 1 - r * r) ** 0.5)


def nearest(m: Tensor) -> tuple[Tensor, Tensor]:
    """The orthogonal matrix of the largest <Q, M>, and that; m [..., d, d]."""
    u, s, vh = torch.linalg.svd(m)
    return u @ vh, s.sum(-1)


def least_error(w1: Tensor, w2: Tensor) -> float:
    """What the best orthogonal Q leaves, in any form."""
    return relative(torch.linalg.svdvals(overlap(w1, w2)).sum().item())


def image(w1: Tensor, w2: Tensor, form: Form, right: bool, dtype: torch.dtype) -> tuple[Image, float]:
    """The image of w1 nearest to w2, stored in `dtype`, and its relative error as stored. If `right`, both are the
    transposes of the weights."""
    m = overlap(w1, w2)
    q = reflections(m, form) if isinstance(form, Householder) else triangles(m, form)
    q = q.to(dtype)
    with torch.no_grad():
        turned = q(w1)
        scale = (turned * w2).sum() / turned.square().sum()
        rows, columns = w2.t().shape if right else w2.shape
        made = Image(q, scale.to(dtype), (rows, columns), right)
        stored = made((w1.t() if right else w1).to(dtype)).double()
        target = w2.t() if right else w2
        return made, ((stored - target).norm() / target.norm()).item()


def triangles(m: Tensor, form: Blocks) -> Triangles:
    """Each block's nearest Q, taken apart into reflections by QR: what is left of it there is signs."""
    d = m.shape[0]
    b = form.of(d)
    rows = torch.arange(d, device=m.device).view(d // b, b)
    q, _ = nearest(m[rows[:, :, None], rows[:, None, :]])
    made = Triangles(fold(torch.geqrf(q)[0].tril(-1)), torch.ones_like(rows, dtype=torch.int8))
    with torch.no_grad():
        unsigned = made(torch.eye(b, dtype=m.dtype, device=m.device).repeat(d // b, 1)).view_as(q)
        made.signs.copy_((unsigned * q).sum(-2).sign())
    return made


def reflections(m: Tensor, form: Householder) -> Reflections:
    """Those of the best c, of either sign."""
    found = [largest(signed, form.reflectors) for signed in (m, -m)]
    vectors = max(found, key=lambda vectors: abs(overlap_of(m, vectors)))
    return Reflections(torch.stack(vectors, 1).flip(-1).contiguous())  # Q' = H(v1) ... H(vk)


def largest(m: Tensor, count: int) -> list[Tensor]:
    """Found in turn, for M or for its nearest Q, whichever is better; each then again while the others stay."""
    starts = [in_turn(a, count) for a in (m, nearest(m)[0])]
    vectors = max(starts, key=lambda vectors: overlap_of(m, vectors))
    for _ in range(SWEEPS):
        a, before = gained(m, vectors), overlap_of(m, vectors)
        for j in reversed(range(count)):  # a = H(vj+1) ... H(vk) M H(v1) ... H(vj)
            a = after(a, vectors[j])
            vectors[j] = lowest(a)
            a = after(a.t(), vectors[j]).t()
        if overlap_of(m, vectors) - before <= ENOUGH * (1 - before):
            break
    return vectors


def in_turn(a: Tensor, count: int) -> list[Tensor]:
    """Each the best that follows those before. A second one can always undo a first that has taken away."""
    vectors = []
    for _ in range(count):
        vectors.append(lowest(a))
        a = after(a, vectors[-1])
    return vectors


def gained(m: Tensor, vectors: list[Tensor]) -> Tensor:
    """M H(v1) ... H(vk)."""
    for v in vectors:
        m = after(m, v)
    return m


def overlap_of(m: Tensor, vectors: list[Tensor]) -> float:
    """<Q, M> of Q' = H(v1) ... H(vk)."""
    return gained(m, vectors).trace().item()


def after(a: Tensor, v: Tensor) -> Tensor:
    """A H(v), for v of length 1."""
    return a - 2 * torch.outer(a @ v, v)


def lowest(a: Tensor) -> Tensor:
    """The v of the largest trace of A H(v)."""
    v: Tensor = torch.linalg.eigh(a + a.t())[1][:, 0]
    return v
