"""Which objects of some classes are alive in this process. In: classes. Out: their instances, in no order of meaning.

Must hold: no code of the objects or of their classes runs, as isinstance() runs that of proxies and lazy modules.
What is of no such class costs no line of Python, because a process that trains has millions of objects.
"""

from __future__ import annotations

import gc
import itertools
from typing import Any


def instances(*classes: type) -> list[Any]:
    """Of the classes and of what derives from them, as far as the garbage collector knows them."""
    kinds, new = set[int](), list(classes)
    while new:
        kind = new.pop()
        if id(kind) not in kinds:
            kinds.add(id(kind))
            new += type.__subclasses__(kind)
    every = gc.get_objects()
    return list(itertools.compress(every, map(kinds.__contains__, map(id, map(type, every)))))
