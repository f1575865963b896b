"""Give up the storages that are cheapest to recompute per byte, until the step fits.

In: a step and a budget. Out: the first point of a path that fits. The path does not depend on the budget: it
starts by keeping everything, drops one storage at a time in order of bytes per second of recomputation, down
to the block boundaries, then thins the boundaries out. Recomputation only grows along it, so the first point
that fits is its fastest, and peaks and overheads are monotone in the budget by construction.
When nothing on the path fits, its point of least peak is returned and the pipeline says what is short.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from memplan.ir import Budget, Decisions, Keep, Machine, Recompute, Step
from memplan.passes.blocks import frontiers
from memplan.passes.policies.block_checkpoint import keep_only
from memplan.passes.schedule import closure, saved_by
from memplan.passes.simulate import peak


@dataclass(frozen=True)
class Greedy:
    """`points`: how many points of the path are simulated."""

    points: int = 96
    name: str = "greedy"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        best, best_peak = frozenset[int](), None
        for saved in path(step, machine, self.points):
            found = peak(step, saved)
            if best_peak is None or found < best_peak:
                best, best_peak = saved, found
            if found <= budget.available:
                break
        return {t: Keep() if t in best else Recompute() for t in step.read_in_backward | best}


def path(step: Step, machine: Machine, points: int) -> Iterator[frozenset[int]]:
    """Sets of storages to save, from the fastest to the smallest."""
    boundaries = frontiers(step)
    dropped = list(_drops(step, machine, frozenset().union(*boundaries)))
    stride = max(1, len(dropped) // points)
    kept = set(step.read_in_backward) | frozenset().union(*boundaries)
    yield step.read_in_backward
    for i, storage in enumerate(dropped, 1):
        kept.discard(storage)
        if i % stride == 0 or i == len(dropped):
            yield frozenset(kept)
    for every in range(1, len(boundaries) + 2):
        chosen = boundaries[every - 1 :: every]
        yield saved_by(step, keep_only(step, frozenset().union(*chosen)))
    for name, saved in step.saved_by:
        if name.startswith("torch"):
            yield frozenset(saved)


def _drops(step: Step, machine: Machine, boundary: frozenset[int]) -> Iterator[int]:
    """Storages to give up, best first: a lazy greedy, as the price of each depends on what went before."""
    kept = set(step.read_in_backward | boundary)
    resident = set(step.resident)
    again: set[int] = set()  # ops that run again already

    def price(storage: int) -> float | None:
        """Seconds of recomputation added per byte given up; None if it cannot be recomputed."""
        ops = [i for i in closure(step, [storage], kept - {storage} | resident) if i not in again]
        if any(step.ops[i].fixed for i in ops):
            return None
        return sum(machine.seconds(step.ops[i]) for i in ops) / max(1, step.tensors[storage].bytes)

    heap = [(p, t) for t in kept - boundary if (p := price(t)) is not None]
    heapq.heapify(heap)
    while heap:
        _, storage = heapq.heappop(heap)
        now = price(storage)
        if now is None:
            continue
        if heap and now > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (now, storage))
            continue
        kept.discard(storage)
        again.update(closure(step, [storage], kept | resident))
        yield storage
