"""What a running step leaves of its budget, told as it runs to whoever shares the device with it.

    begun   the step runs from its start, and leaves so many bytes from each of its marks on
    passed  the mark is behind it: an op of the planned graph (passed.py)

In: marks, where the plan put them (passes/marks.py). Out: calls of a Listener, by a number that graphs can carry.
What must hold: what is left is told only after what was there is freed, and is left until the step ends, what its
optimizer takes included. So a step of which that is not known leaves nothing, and one whose backward runs a second time
passes its first mark again before it needs anything.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol


class Listener(Protocol):
    """Shares a device with steps. `wants`: it would make something of what they leave."""

    wants: bool

    def begun(self, step: str, left: Sequence[int]) -> None:
        """A step needs all of its budget, and so many bytes less from each of its marks on; without a name: what has
        begun passes no marks.
        """

    def passed(self, step: str, mark: int) -> None:
        """It has passed a mark: those of a backward in order, from 0."""


_listeners: weakref.WeakValueDictionary[int, Listener] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def listen(listener: Listener) -> int:
    """The number of a listener, for Budget.listener. It is forgotten with the listener."""
    number = next(_numbers)
    _listeners[number] = listener
    return number


def listener(number: int) -> Listener | None:
    """Who hears; None: nobody any more, or nobody at all, 0."""
    return _listeners.get(number)
