"""Keep everything that backward reads: the fastest plan and the largest."""

from dataclasses import dataclass

from memplan.ir import Budget, Decisions, Keep, Machine, Step


@dataclass(frozen=True)
class SaveAll:
    name: str = "save-all"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        return {t: Keep() for t in step.read_in_backward}
