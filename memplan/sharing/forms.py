"""The forms in which an orthogonal Q is stored, and what each takes.

In: the number of rows d that Q acts on. Out: modules that compute Q x, whose parameters are Q, and their bytes.
Both forms are products of reflections H(v) = 1 - 2 v v' / v'v, so Q is orthogonal whatever the parameters are, and
stays so while they are trained (v must not be 0). A product of them is applied at once (Joffrain et al. 2006):
H(v1) ... H(vk) = 1 - V S^-1 V', S the upper triangle of V'V with its diagonal halved.

    Householder(k)  k vectors of d values. Q leaves all but k directions alone.
    Blocks(b)       d / b blocks of b rows, each of them any orthogonal matrix: b reflections, of which each leaves one
                    row more alone, so b (b - 1) / 2 values are stored, and the signs of b rows. With b = d: any Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memplan.errors import MemplanError


def reflected(v: Tensor, x: Tensor) -> Tensor:
    """H(v1) ... H(vk) x; v [..., d, k], its columns the vectors, x [..., d, n]."""
    gram = v.mT @ v
    s = gram.triu() - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
    turned: Tensor = x - v @ torch.linalg.solve_triangular(s, v.mT @ x, upper=True)
    return turned


class Reflections(nn.Module):
    """Q = H(v1) ... H(vk); `vectors` [d, k]."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)

    def forward(self, x: Tensor) -> Tensor:
        """Q x, for x [d, n] and of its dtype."""
        return reflected(self.vectors.to(x.dtype), x)


class Triangles(nn.Module):
    """Q of g blocks of b rows, each H(v1) ... H(vb) D; D, the signs, does not train.

    `folded` [g, b // 2, b - 1 + b % 2]: vi has zeros, a 1 in row i, and below it what is stored: a lower triangle, of
    which the upper half of the rows lies, turned round, behind the lower one. `signs` [g, b], int8.
    """

    signs: Tensor

    def __init__(self, folded: Tensor, signs: Tensor) -> None:
        super().__init__()
        self.folded = nn.Parameter(folded)
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """Q x, for x [d, n] and of its dtype."""
        v = unfold(self.folded.to(x.dtype)) + torch.eye(self.signs.shape[-1], dtype=x.dtype, device=x.device)
        blocks = x.view(*self.signs.shape, -1) * self.signs.to(x.dtype)[..., None]
        return reflected(v, blocks).flatten(0, 1)


def unfold(folded: Tensor) -> Tensor:
    """The strictly lower triangle [g, b, b], zeros elsewhere."""
    whole = torch.cat([folded.flip(-1), folded.flip(-2)], -2)
    odd = whole.shape[-1] == whole.shape[-2] + 1
    return F.pad(whole.tril(), (0, 0, 1, 0)) if odd else F.pad(whole.tril(-1), (0, 1))


def fold(lower: Tensor) -> Tensor:
    """What `unfold` reads; the values of `lower` [g, b, b] on its diagonal and above must be 0."""
    whole = lower[..., 1:, :] if lower.shape[-1] % 2 else lower[..., :-1]
    upper, below = whole.chunk(2, -2)
    return upper.flip(-1) + below.flip(-2)


@dataclass(frozen=True)
class Householder:
    """Q as a product of `reflectors` reflections."""

    reflectors: int

    def __post_init__(self) -> None:
        _positive(self, self.reflectors, 1)

    def wrong(self, d: int) -> str:
        """Why there is no such Q of d rows; empty: there is."""
        return f"any Q of {d} rows is at most {d} reflections: give fewer" if self.reflectors > d else ""

    def arithmetic(self, d: int) -> str:
        """What `nbytes` counts, for people."""
        return f"{self.reflectors} vectors of {d} values"

    def nbytes(self, d: int, dtype: torch.dtype) -> int:
        """What Q of d rows takes."""
        return self.reflectors * d * dtype.itemsize

    def blank(self, d: int, dtype: torch.dtype, device: torch.device) -> Reflections:
        """Some Q, to be loaded into."""
        return Reflections(torch.ones(d, self.reflectors, dtype=dtype, device=device))


@dataclass(frozen=True)
class Blocks:
    """Q of blocks of `size` rows on its diagonal; None: one block, so any Q."""

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            _positive(self, self.size, 2)

    def of(self, d: int) -> int:
        """Rows of a block."""
        return self.size or d

    def wrong(self, d: int) -> str:
        """Why there is no such Q of d rows; empty: there is."""
        b, sizes = self.of(d), [n for n in range(2, d + 1) if d % n == 0]
        if b in sizes:
            return ""
        near = " or ".join(map(str, sorted(sorted(sizes, key=lambda n: abs(n - b))[:2])))
        return f"blocks of {b} rows do not divide {d}: give {near}" if near else f"a Q of {d} row has no blocks"

    def arithmetic(self, d: int) -> str:
        """What `nbytes` counts, for people."""
        b = self.of(d)
        return f"{d // b} triangle{'s' * (b < d)} of {b * (b - 1) // 2} values and {d} signs"

    def nbytes(self, d: int, dtype: torch.dtype) -> int:
        """What Q of d rows takes."""
        return d * (self.of(d) - 1) // 2 * dtype.itemsize + d

    def blank(self, d: int, dtype: torch.dtype, device: torch.device) -> Triangles:
        """Some Q, to be loaded into."""
        b = self.of(d)
        folded = torch.zeros(d // b, b // 2, b - 1 + b % 2, dtype=dtype, device=device)
        return Triangles(folded, torch.ones(d // b, b, dtype=torch.int8, device=device))


Form = Householder | Blocks


def _positive(form: Form, size: object, least: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise MemplanError(f"{type(form).__name__}({size!r}): give a whole number, {least} or more")


class Image(nn.Module):
    """c Q W1, or c W1 Q, of the first rows and columns of W1: as a parametrization, what a shared weight reads as.

    `shape`: that of the result. `right`: Q' acts on the transpose, so on columns. `scale` is c.
    """

    def __init__(self, q: Reflections | Triangles, scale: Tensor, shape: tuple[int, int], right: bool) -> None:
        super().__init__()
        self.q = q
        self.scale = nn.Parameter(scale)
        self.shape, self.right = shape, right

    def forward(self, source: Tensor) -> Tensor:
        """In float32 at least, and rounded to W1's dtype.

        Backward needs what is on the way, several times the result. A compiled step's plan decides on it; eager, it is
        computed again.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.made(source)
        made: Tensor = checkpoint(self.made, source, use_reentrant=False, preserve_rng_state=False)
        return made

    def made(self, source: Tensor) -> Tensor:
        """What forward returns."""
        with torch.autocast(source.device.type, enabled=False):
            part = source[: self.shape[0], : self.shape[1]]
            dtype = torch.promote_types(source.dtype, torch.float32)
            x = (part.t() if self.right else part).to(dtype)
            image: Tensor = self.scale.to(dtype) * self.q(x)
            return (image.t() if self.right else image).to(source.dtype)
