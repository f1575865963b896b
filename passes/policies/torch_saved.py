"""What torch's own partitioner would save, as recorded by capture.

`torch-min-cut` is its default; `torch-budget-R` its activation_memory_budget at ratio R. Both ignore the byte
budget: that is what they are here to be compared with.
"""

from dataclasses import dataclass
from typing import ClassVar

from memplan.errors import MemplanError
from memplan.ir import Budget, Decisions, Keep, Machine, Recompute, Step


def recorded(step: Step, name: str) -> Decisions:
    """The saved set called `name`, as decisions."""
    for known, saved in step.saved_by:
        if known == name:
            return {t: Recompute() for t in step.read_in_backward} | {t: Keep() for t in saved}
    raise MemplanError(
        f"the step holds no saved set {name!r}: capture records them only when a plan asks for a torch policy"
    )


@dataclass(frozen=True)
class TorchMinCut:
    name: str = "torch-min-cut"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return recorded(step, self.name)


@dataclass(frozen=True)
class TorchBudget:
    """`ratio`: torch's activation_memory_budget, 0 to 1."""

    RATIOS: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75)
    ratio: float

    @property
    def name(self) -> str:
        return f"torch-budget-{self.ratio:g}"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return recorded(step, self.name)
