"""memplan::passed: what a planned graph calls at a mark of its plan, to tell a listener (room.py)."""

from __future__ import annotations

from typing import Any

import torch

from memplan.runtime import room


@torch.library.custom_op("memplan::passed", mutates_args=("x",))
def passed(x: torch.Tensor, listener: int, step: str, mark: int) -> None:
    """Tell the listener. It is said to write to `x`, made just before: so no compiler drops it, or moves it ahead."""
    if (there := room.listener(listener)) is not None:
        there.passed(step, mark)


@passed.register_fake
def _(x: torch.Tensor, listener: int, step: str, mark: int) -> None:
    return None


PASSED: Any = torch.ops.memplan.passed.default
