"""A call of what torch.compile made: refused in memplan's own words, and never run unplanned in silence.

In: a call under `own_errors()`. Out: its result. A MemplanError comes as it was raised, where torch wraps what a
backend raises; and where Dynamo would give up compiling, and run the step as it is, the call is refused, or named when
it is over: nobody knows it before.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

from memplan.errors import MemplanError

VARIANTS = 64  # of one function: with and without gradients, in training and evaluation, with and without adapters


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Around each call of a compiled function."""
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
            yield
    except BackendCompilerFailed as failed:
        if isinstance(failed.inner_exception, MemplanError):
            raise failed.inner_exception from None
        raise
    except FailOnRecompileLimitHit as failed:
        raise MemplanError(
            f"it was compiled {VARIANTS} times: something of the step or its model is another with each call, which "
            'TORCH_LOGS="recompiles" names; make it a tensor, or run it without memplan'
        ) from failed


class Asked:
    """A backend, equal to no other, that knows whether it was ever given a graph."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.once = backend, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.once = True
        return self.backend(*args, **kwargs)

    def refuse_unplanned(self, what: str) -> None:
        """After a call with gradients. Raises MemplanError if nothing of it came here: Dynamo skips what has a layer
        that it does not trace, or is told to let it be, without a word.
        """
        if not self.once and torch.is_grad_enabled():
            raise MemplanError(
                f"nothing of {what} was planned: Dynamo left it as it is, and so it has run, whatever it took; there "
                "may be an RNN in it, torch.compiler.disable, or torch._dynamo.config.disable"
            )


def of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own, as Dynamo keeps by code what it has compiled, counted and given up."""
    made: Any = function
    return types.FunctionType(made.__code__.replace(), made.__globals__, made.__name__, None, made.__closure__)
