"""What an engine changes in the process that it is in: kept apart from the trainer's.

In: a block that starts or runs the engine. Out: after it process groups, random states, the number of threads, the
garbage collector, warnings and the hook for exceptions are as the trainer left them, whether it has groups or not;
inside, the engine has its own. Another thread that draws random numbers meanwhile draws the engine's. What vLLM adds to
the environment stays: it reads it again.
"""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.distributed import distributed_c10d as c10d

# Of torch 2.11 to 2.13, which has one set of process groups in a process, under these names.
_TABLES = ("_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config", "_tags_to_pg", "_pg_to_tag")
_FIRST_NAME = 10**6  # groups are named by their number, and names are one set for both


class Beside:
    """One engine's process groups and random states."""

    def __init__(self) -> None:
        self._own: dict[str, Any] = {name: {} for name in _TABLES}
        self._own |= {"_default_pg_init_method": None, "_group_count": _FIRST_NAME}
        self._default: Any = None
        self._inside = False
        self._random = _random_states()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The engine's own inside the block, the trainer's again after it."""
        try:
            with _uninterrupted():
                self._swap()
            with torch.autocast("cpu", enabled=False):  # or vLLM rounds tables that it keeps
                yield
        finally:
            with _uninterrupted():
                if self._inside:
                    self._swap()

    def seed(self, number: int) -> None:
        """What the engine draws from now on follows from it. A device's own random state is the trainer's."""
        with self.running():
            random.seed(number)
            np.random.seed(number)
            torch.default_generator.manual_seed(number)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """The same, and what starting an engine changes besides."""
        set_threads, threads = torch.set_num_threads, torch.get_num_threads()
        hook = sys.excepthook
        try:
            with warnings.catch_warnings(), self.running():
                yield
        finally:
            torch.set_num_threads = set_threads
            set_threads(threads)
            sys.excepthook = hook
            gc.unfreeze()

    def _swap(self) -> None:
        for name, value in self._own.items():
            self._own[name] = getattr(c10d, name)
            setattr(c10d, name, value)
        self._default, c10d.GroupMember.WORLD = c10d.GroupMember.WORLD, self._default
        self._random, (python, numpy, cpu) = _random_states(), self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        self._inside = not self._inside


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interrupt from the keyboard comes after the block, and not in the middle of it."""
    came, known = list[Any](), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(known):
        yield
        return
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, known)
        if came:
            known(*came[0])


def _random_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()
