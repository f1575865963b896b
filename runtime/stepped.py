"""What an optimizer's step takes beside its states, where nobody can say ahead: measured while it steps.

In: a live optimizer. Out: the peak inside `step()` beyond what is left of it, the largest of those that were looked at:
the first two that were seen whole, and two again where more parameters have gradients than in those, or a larger one. A
step is not seen where something is compiled in it (torchao's first), a closure runs backward, it runs inside of a
backward, or another profiler is there; then the next one is looked at. One that is compiled itself is never seen.
On CUDA a step is seen only where it is above all that was allocated at a time before.
What must hold: nothing of the step changes, and nothing is measured that has been seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.runtime.window import Session, Span, in_backward

STEPS = 2  # the first makes the states
Extent = tuple[int, int]  # bytes of parameters, of all and of the largest: what a step takes grows with either


@dataclass(eq=False)
class Stepped:
    """`peaks`: of each step that was looked at, in bytes; `updated`: the most that was updated in one of them."""

    name: str
    optimizer: weakref.ref[torch.optim.Optimizer]
    peaks: list[int] = field(default_factory=list)
    updated: Extent = (0, 0)
    to_come: int = STEPS  # steps to look at
    span: Span | None = None

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, *, look: bool) -> Stepped | None:
        """What is known of its steps, for all who ask. look: at them too, from the first call on."""
        own: dict[str, Any] = vars(optimizer)
        if look and "_memplan_stepped" not in own:
            seen = own["_memplan_stepped"] = Stepped(f"{type(optimizer).__name__}.step()", weakref.ref(optimizer))
            optimizer.register_step_pre_hook(lambda *_: seen.begins())
            optimizer.register_step_post_hook(lambda *_: seen.ends())
        return own.get("_memplan_stepped")

    @property
    def known(self) -> bool:
        """Whether it is known what a step takes that updates all that is trained."""
        return not self.to_come and self._was_seen(_extent(p for p in self._parameters() if p.requires_grad))

    def begins(self) -> None:
        if torch.compiler.is_compiling():  # whoever compiles the whole step finds nothing in it
            return
        now, self.span = self._now(), None
        if (self.to_come or not self._was_seen(now)) and not in_backward():
            self.span = Span.opened(Session())

    def ends(self) -> None:
        if torch.compiler.is_compiling() or self.span is None:
            return
        span, self.span = self.span, None
        span.close({})
        span.session.end()
        if span.whole and span.seen:
            peak, left = span.measured()
            self.peaks.append(max(0, peak - left))
            now = self._now()
            if not self._was_seen(now):
                self.updated = max(now[0], self.updated[0]), max(now[1], self.updated[1])
                self.to_come = STEPS
            self.to_come -= 1

    def _parameters(self) -> Iterator[torch.Tensor]:
        if (optimizer := self.optimizer()) is not None:
            yield from (p for group in optimizer.param_groups for p in group["params"])

    def _now(self) -> Extent:
        return _extent(p for p in self._parameters() if p.grad is not None)

    def _was_seen(self, extent: Extent) -> bool:
        return all(a <= b for a, b in zip(extent, self.updated, strict=True))


def _extent(parameters: Iterator[torch.Tensor]) -> Extent:
    sizes = [p.nbytes for p in parameters]
    return sum(sizes), max(sizes, default=0)
