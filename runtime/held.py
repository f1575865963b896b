"""What a training process holds beside a step's own tensors: gradients and optimizer states.

In: the parameters of a step. Out: bytes by kind, and what the optimizer's step takes beside them. Gradients appear with
the first backward, so they are looked at before every run. States appear with the first optimizer step: those of an
optimizer that is there, or declared, count from the start, where they can be foreseen (optimizers.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.ir import Gap, Held, Kind
from memplan.runtime import optimizers
from memplan.runtime.optimizers import Foreseen, declared, foresee

LOOKS = 3  # at how many calls optimizers are looked for, until they are found: walking all objects takes up to 0.3 s


@dataclass
class Watch:
    """Looks at what is held, call by call. `declared`: option `optimizer`, if it was given."""

    declared: Any = None
    looks: int = LOOKS
    optimizers: list[weakref.ref[torch.optim.Optimizer]] = field(default_factory=list)
    looked_for: set[int] = field(default_factory=set)  # ids of parameters
    foreseen: tuple[Foreseen, ...] = ()
    notes: tuple[str, ...] = ()  # what could not be foreseen
    others: bool = False  # there is an optimizer of which nothing is foreseen

    @property
    def known(self) -> bool:
        """Whether it is known what updates the parameters, and what its step takes."""
        return bool(self.foreseen) and not self.notes and not self.others

    def updated(self) -> Iterator[torch.Tensor]:
        """The parameters of the optimizers that are there."""
        for optimizer in (ref() for ref in self.optimizers):
            if optimizer is not None:
                yield from (p for group in optimizer.param_groups for p in group["params"])

    def held(self, parameters: Sequence[torch.Tensor], arguments: Iterable[object] = ()) -> Held:
        """What is held for these parameters. States that are among the arguments of a step are its own."""
        ids = {id(p) for p in parameters}
        gone = any(ref() is None for ref in self.optimizers)
        if gone or not ids <= self.looked_for or (self.looks and not self.optimizers):
            self.looks -= ids <= self.looked_for
            self.looked_for |= ids
            self._look(parameters)
        grads = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        own = {id(a) for a in arguments}
        there = {id(state): state.nbytes for state in self._states()}
        states = max(sum(there.values()), sum(f.states for f in self.foreseen))
        states -= sum(size for key, size in there.items() if key in own)
        kinds: list[tuple[Kind, int]] = [("gradient", grads), ("optimizer_state", states)]
        most = max(self.foreseen, key=lambda f: f.transient, default=None)
        gaps = (Gap(most.name, most.transient),) if most is not None and most.transient else ()
        return Held(tuple((kind, size) for kind, size in kinds if size), gaps, self.notes)

    def _states(self) -> Iterator[torch.Tensor]:
        for optimizer in (ref() for ref in self.optimizers):
            if optimizer is not None:
                yield from optimizers.states(optimizer)

    def _look(self, parameters: Sequence[torch.Tensor]) -> None:
        if self.declared is not None:
            self.foreseen = (declared(self.declared, parameters),)
        self.optimizers = optimizers.optimizers_of(parameters)
        if self.declared is not None:
            return
        foreseen, notes, self.others = [], [], False
        for optimizer in (ref() for ref in self.optimizers):
            # Others' may do anything in their step.
            if optimizer is not None and type(optimizer).__module__.startswith(("torch.", "memplan.")):
                try:
                    foreseen.append(foresee(optimizer))
                except MemplanError as e:
                    notes.append(str(e))
            elif optimizer is not None:
                self.others = True
        self.foreseen, self.notes = tuple(foreseen), tuple(notes)
