"""A call of what torch.compile made: refused in memplan's own words, and never run unplanned in silence.

In: a call under `own_errors()`. Out: its result. A MemplanError comes as it was raised, where torch wraps what a
backend raises; and where Dynamo would give up compiling, and run the step as it is, the call is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
