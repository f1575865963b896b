"""The one exception type users meet, and the one that says a step cannot fit.

The first line of every message stands alone: the value, what is valid, the likely mistake, what to do.
torch wraps errors raised inside a backend, and often shows only that line.
"""

import difflib
from collections.abc import Iterable


class MemplanError(Exception):
    """Bad input, or something memplan cannot do; the first line says what and what to do about it."""


class DoesNotFit(MemplanError):
    """No plan fits the budget.

    Attributes (bytes): `budget`, what was allowed; `needed`, the smallest budget that the chosen policy fits;
    `smallest`, the smallest that is known to fit: with a policy that looks for it, as `optimal` and `greedy` do, with
    that one, else with `optimal`.
    """

    def __init__(self, message: str, *, budget: int, needed: int, smallest: int) -> None:
        super().__init__(message)
        self.budget, self.needed, self.smallest = budget, needed, smallest


class Stopped(MemplanError):
    """A policy took longer than it may. One that catches this and returns what it has by then keeps its best so far."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
