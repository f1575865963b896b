"""What a training process holds beside a step's own tensors: gradients and optimizer states.

In: the parameters of a step. Out: bytes by kind, and what the optimizer's step takes beside them. Gradients appear with
the first backward, so they are looked at before every run. States appear with the first optimizer step: those of an
optimizer that is there, or declared, count from the start, where they can be foreseen (optimizers.py). What its step
takes does too, or once it has been seen (stepped.py). Bytes are those of storages on the parameters' device.
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
from memplan.runtime.optimizers import Around, Foreseen, declared, foresee
from memplan.runtime.stepped import Stepped
from memplan.runtime.storages import nbytes

FORESEEN = ("torch.", "memplan.", *optimizers.STATES_ALONE)  # others' may do anything in their step
OTHERS = "what {} will hold is not known before its first step: it counts from the call after it"
UNSEEN = "what {} takes beside its states is not known yet: it is measured while it runs, and counts from then on"
LOOKS = 3  # at how many calls optimizers are looked for, until they are found: walking all objects takes up to 0.3 s


@dataclass
class Watch:
    """Looks at what is held, call by call. `declared`: option `optimizer`, if it was given. `around`: what the graphs
    of a step share, forgotten as each step begins; without it every look is a new one.
    """

    declared: Any = None
    around: Around | None = None
    measures: bool = True  # steps that are not foreseen, when they run
    looks: int = LOOKS
    optimizers: list[weakref.ref[torch.optim.Optimizer]] = field(default_factory=list)
    looked_for: set[int] = field(default_factory=set)  # ids of parameters
    foreseen: tuple[Foreseen, ...] = ()
    stepped: tuple[Stepped, ...] = ()  # those that are not foreseen, or not their step
    notes: tuple[str, ...] = ()  # what could not be foreseen
    others: bool = False  # there is an optimizer of which nothing is foreseen

    @property
    def known(self) -> bool:
        """Whether it is known what updates the parameters, and what its step takes."""
        return bool(self.foreseen) and not (self.notes or self.others or self._unseen())

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
        devices = {p.device.type for p in parameters}
        grads = nbytes((p.grad for p in parameters if p.grad is not None), devices)
        own = {id(a) for a in arguments}
        fresh = nbytes((p for p in parameters if p.requires_grad and p.grad is None), devices)
        there = list(self._states())
        states = max(nbytes(there, devices), sum(f.states for f in self.foreseen))
        states -= nbytes((state for state in there if id(state) in own), devices)
        kinds: list[tuple[Kind, int]] = [("gradient", grads), ("optimizer_state", states)]
        seen = [(max(s.peaks, default=0), s.name) for s in self.stepped]
        most, name = max([*seen, *((f.transient or 0, f.name) for f in self.foreseen)], default=(0, ""))
        gaps = (Gap(name, most),) if most else ()
        notes = (*self.notes, *(UNSEEN.format(name) for name in self._unseen()))
        return Held(tuple((kind, size) for kind, size in kinds if size), gaps, notes, fresh)

    def _unseen(self) -> list[str]:
        """The steps of which it is not known yet what they take."""
        ahead = {f.name for f in self.foreseen if f.transient is None} - {s.name for s in self.stepped}
        return sorted(ahead | {s.name for s in self.stepped if not s.known})

    def _states(self) -> Iterator[torch.Tensor]:
        for optimizer in (ref() for ref in self.optimizers):
            if optimizer is not None:
                yield from optimizers.states(optimizer)

    def _look(self, parameters: Sequence[torch.Tensor]) -> None:
        self.optimizers = (self.around or Around()).of(parameters)
        alive = [optimizer for ref in self.optimizers if (optimizer := ref()) is not None]
        if self.declared is not None:
            self.foreseen = (declared(self.declared, parameters),)
            unseen = alive if self.foreseen[0].transient is None else []
        else:
            unseen = self._foresee(alive)
        # What is around another optimizer has no states and no hooks of its own.
        stepped = (Stepped.of(o, look=self.measures) for o in unseen if "state" in vars(o))
        self.stepped = tuple(s for s in stepped if s is not None)

    def _foresee(self, alive: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Those of which it cannot be said what their step takes."""
        foreseen, notes, unseen, self.others = [], [], [], False
        for optimizer in alive:
            if not type(optimizer).__module__.startswith(FORESEEN):
                self.others = True
                if "state" in vars(optimizer):
                    notes.append(OTHERS.format(type(optimizer).__name__))
                unseen.append(optimizer)
                continue
            try:
                foreseen.append(foresee(optimizer))
                if foreseen[-1].transient is None:
                    unseen.append(optimizer)
            except MemplanError as e:
                notes.append(str(e))
                unseen.append(optimizer)
        self.foreseen, self.notes = tuple(foreseen), tuple(notes)
        return unseen
