"""Linear and integer programs, built a row at a time and solved by HiGHS (Huangfu, Hall 2018) through scipy.

In: variables with bounds, costs and integrality, rows low <= sum of coefficient * variable <= high. Out: a Solution.
What must hold: the same program gives the same solution on every run. HiGHS's own search for whole variables is not
used: it writes to stdout at times (1.12), and its limits are seconds and nodes of very different cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, csr_matrix

TOGETHER = 2  # of so many variables that are not whole one is made so at a time
STAYS = 10  # of so many that have come out as 1 one stays so: what is left is whole in fewer programs
WHOLE = 1e-6  # what is nearer to a whole number is one

Terms = Iterable[tuple[int, float]]  # (variable, coefficient)


@dataclass(frozen=True)
class Solution:
    """`values` of the variables, their total `cost`, and what one more of each row's `high` would add to that."""

    values: NDArray[np.float64]
    cost: float
    slopes: NDArray[np.float64]


@dataclass
class Program:
    """A program that is being built: minimise the cost. Variables and rows are numbered as they are added."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    _built: csr_matrix | None = None

    def variable(self, upper: float = math.inf, *, cost: float = 0.0, whole: bool = False) -> int:
        """A new variable of at least 0."""
        self.lower.append(0.0)
        self.upper.append(upper)
        self.cost.append(cost)
        self.whole.append(whole)
        return len(self.cost) - 1

    def row(self, terms: Terms, *, low: float = -math.inf, high: float = math.inf) -> int:
        """A new row; a variable that is named twice counts twice."""
        at = len(self.low)
        self._built = None
        self.entries += [(at, variable, coefficient) for variable, coefficient in terms]
        self.low.append(low)
        self.high.append(high)
        return at

    def relaxed(self) -> Solution | None:
        """The optimum when no variable has to be whole; None: there is no solution."""
        if not self.cost:  # nothing to choose
            return Solution(np.zeros(0), 0.0, np.zeros(len(self.low)))
        matrix, low, high = self._matrix(), np.array(self.low), np.array(self.high)
        equal, above, below = low == high, np.isfinite(high) & (low != high), np.isfinite(low) & (low != high)
        found = linprog(
            self.cost,
            A_ub=_stacked(matrix[above], -matrix[below]),
            b_ub=np.concatenate([high[above], -low[below]]),
            A_eq=matrix[equal],
            b_eq=low[equal],
            bounds=np.column_stack([self.lower, self.upper]),
            method="highs",
        )
        if found.status != 0:
            return None
        slopes = np.zeros(len(low))
        slopes[above] = found.ineqlin.marginals[: int(above.sum())]
        return Solution(found.x, float(found.fun), slopes)

    def dived(self) -> Solution | None:
        """A solution with whole variables, not always the best: the relaxation, solved again while of those that are
        not whole a share, the nearest to 1, are made 1, and of those that are 1 a share stays so; or, where that has no
        solution, the former, the nearest alone, or it 0. The bounds stay as they were. None: none was found.
        """
        bounds, found = (list(self.lower), list(self.upper)), self.relaxed()
        try:
            while found is not None and (nearest := self._nearest(found)):
                found = self._deeper(nearest, self._settled(found))
            return found
        finally:
            self.lower, self.upper = bounds

    def _deeper(self, nearest: list[int], settled: list[int]) -> Solution | None:
        """With all of them 1; else with the `nearest`; else with the first of these; else with that 0."""
        for some in dict.fromkeys(((*nearest, *settled), tuple(nearest), (nearest[0],))):
            before = list(self.lower)
            for v in some:
                self.lower[v] = 1.0
            found = self.relaxed()
            if found is not None:
                return found
            self.lower = before
        self.upper[nearest[0]] = 0.0
        return self.relaxed()

    def _nearest(self, found: Solution) -> list[int]:
        """Of the variables that should be whole and are not, the largest, one in `TOGETHER`; none: all are."""
        values = np.where(self.whole, found.values, 0.0)
        values[(values < WHOLE) | (values > 1 - WHOLE)] = 0.0
        order: list[int] = np.argsort(-values, kind="stable")[: math.ceil(np.count_nonzero(values) / TOGETHER)].tolist()
        return order

    def _settled(self, found: Solution) -> list[int]:
        """Of the variables that should be whole and are 1 by choice, one in `STAYS`, evenly spread."""
        chosen = self.whole & (found.values > 1 - WHOLE) & (np.array(self.lower) < 1)
        settled: list[int] = np.flatnonzero(chosen)[STAYS // 2 :: STAYS].tolist()
        return settled

    def _matrix(self) -> csr_matrix:
        if self._built is None:
            rows, columns, values = zip(*self.entries, strict=True) if self.entries else ((), (), ())
            self._built = coo_matrix((values, (rows, columns)), shape=(len(self.low), len(self.cost))).tocsr()
        return self._built


def _stacked(first: csr_matrix, second: csr_matrix) -> csr_matrix:
    from scipy.sparse import vstack

    return vstack([first, second], format="csr")
