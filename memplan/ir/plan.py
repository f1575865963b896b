"""A Step, a decision per storage, and the exact order of execution that follows; and what no plan can beat."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from memplan.ir.decisions import Decision, Keep, Offload, Run
from memplan.ir.machine import Budget, Machine
from memplan.ir.step import Phase, Step
from memplan.ir.timeline import Block, Timeline


@dataclass(frozen=True)
class Bound:
    """What no plan of the class of passes/bound.py can beat, whatever decided it.

    `seconds`: the step takes at least so long inside the budget; infinite: nothing fits.
    `per_byte`: seconds that a byte more of budget takes off that, at the margin. `at`: the op where memory binds most;
    empty: nowhere. `needs`: bytes that are there then whatever is decided, beyond parameters and inputs.
    `per_bus`: seconds that a faster bus takes off, at the margin: a hundredth of it for each percent.
    """

    seconds: float
    per_byte: float = 0.0
    at: str = ""
    needs: int = 0
    per_bus: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Decisions for every storage that could cross from forward to backward, and what follows from them.

    `reasons`: storages decided alike, and what would follow from the other choice, where memplan.plan has looked:
    "recompute: +3.1 ms", "keep: over by 1.200 GB".
    `bound`: what no plan inside this budget can beat, where memplan.plan has looked.
    `marks`: the moments behind which the running step tells its budget's listener what it leaves.
    """

    step: Step
    decisions: tuple[tuple[int, Decision], ...]
    runs: tuple[tuple[Run, ...], ...]  # one list for each of the step's graphs
    timeline: Timeline
    budget: Budget
    machine: Machine
    policy: str
    base_seconds: float  # the step's estimated time with nothing recomputed
    inner: str = "eager"
    notes: tuple[str, ...] = ()
    reasons: tuple[tuple[tuple[int, ...], str], ...] = ()
    bound: Bound | None = None
    marks: tuple[int, ...] = ()

    @property
    def gap(self) -> float | None:
        """By how much of the step's time with nothing recomputed a better plan could be faster, at most; None: it is
        not known.
        """
        if self.bound is None or not self.base_seconds:
            return None
        return max(0.0, (self.timeline.seconds - self.bound.seconds) / self.base_seconds)

    @property
    def forward(self) -> tuple[Run, ...]:
        """The runs of all forward graphs."""
        return self._runs("forward")

    @property
    def backward(self) -> tuple[Run, ...]:
        """The runs of all backward graphs."""
        return self._runs("backward")

    def _runs(self, phase: Phase) -> tuple[Run, ...]:
        pairs = zip(self.step.graphs, self.runs, strict=True)
        return tuple(run for graph, runs in pairs if graph.phase == phase for run in runs)

    @property
    def peak(self) -> int:
        return self.timeline.peak

    @property
    def fits(self) -> bool:
        return self.peak <= self.budget.available and self.timeline.host_peak <= self.budget.host_bytes

    @property
    def overhead(self) -> float:
        """Estimated extra time as a fraction of the step's time with nothing recomputed."""
        return self.timeline.seconds / self.base_seconds - 1 if self.base_seconds else 0.0

    @property
    def saved(self) -> frozenset[int]:
        """The storages that cross from forward to backward, on the device or off it."""
        return frozenset(t for t, d in self.decisions if isinstance(d, (Keep, Offload)))

    @property
    def offloads(self) -> dict[int, Offload]:
        """Those of them that leave the device."""
        return {t: d for t, d in self.decisions if isinstance(d, Offload)}

    @property
    def instead(self) -> dict[int, str]:
        """`reasons`, by storage."""
        return {t: reason for members, reason in self.reasons for t in members}

    def with_others(self) -> Plan:
        """The plan, its timeline with what the budget leaves to others."""
        held = (*self.budget.beside, ("fragmentation reserve", self.budget.reserve_bytes))
        end = len(self.timeline.moments)
        others = tuple(Block(name, size, "temporary", 0, end) for name, size in held if size)
        return dataclasses.replace(self, timeline=dataclasses.replace(self.timeline, others=others))

    def __str__(self) -> str:
        from memplan import report

        return report.table(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as .json (read back by Plan.load), or its timeline in another format (see Timeline.save)."""
        from memplan import report

        report.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        from memplan import serialize

        return serialize.load(path, Plan)
