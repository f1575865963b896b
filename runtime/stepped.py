"""What an optimizer's step takes beside its states, where nobody can say ahead: measured while it steps.

In: a live optimizer. Out: the peak inside `step()` beyond what is left of it, the larger one of the first two that were
seen whole. A step is not where something is compiled in it (torchao's first), a closure runs backward, it runs inside
of a backward, or another profiler is there; then the next one is looked at. One that is compiled itself is never seen.
On CUDA a step is seen only where it is above all that was allocated at a time before.
What must hold: nothing of the step changes, and nothing is measured any more once it is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.runtime.window import Session, Span, in_backward

STEPS = 2  # the first makes the states


@dataclass(eq=False)
class Stepped:
    """`peaks`: of each step that was seen, in bytes."""

    name: str
    peaks: list[int] = field(default_factory=list)
    span: Span | None = None
    hooks: list[Any] = field(default_factory=list)

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, *, look: bool) -> Stepped | None:
        """What is known of its steps, for all who ask. look: at them too, from the first call on."""
        own: dict[str, Any] = vars(optimizer)
        if look and "_memplan_stepped" not in own:
            seen = own["_memplan_stepped"] = Stepped(f"{type(optimizer).__name__}.step()")
            seen.hooks.append(optimizer.register_step_pre_hook(lambda *_: seen.begins()))
            seen.hooks.append(optimizer.register_step_post_hook(lambda *_: seen.ends()))
        return own.get("_memplan_stepped")

    @property
    def known(self) -> bool:
        return len(self.peaks) >= STEPS

    def begins(self) -> None:
        if torch.compiler.is_compiling():  # whoever compiles the whole step finds nothing in it
            return
        self.span = None if in_backward() else Span.opened(Session())

    def ends(self) -> None:
        if torch.compiler.is_compiling() or self.span is None:
            return
        span, self.span = self.span, None
        span.close({})
        span.session.end()
        if span.whole and span.seen:
            peak, left = span.measured()
            self.peaks.append(max(0, peak - left))
        if self.known:
            while self.hooks:
                self.hooks.pop().remove()
