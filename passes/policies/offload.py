"""Policies that move what backward needs off the device: all of it, a layer's inputs, or what a budget does not hold.

In: a step, a budget, whose `host_bytes` bounds what may be away at a time, a machine. Out: Keep, Recompute and Offload.
The rules are those of other tools, so that plans can be compared with them; `greedy` joins them with recomputation.
What is small stays: a copy costs a fixed time, and its memory is not worth it.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from memplan.ir import Budget, Decision, Decisions, Keep, Machine, Offload, Recompute, Step, Tier
from memplan.passes.blocks import frontiers
from memplan.passes.copies import Runs, placed
from memplan.passes.policies.block_checkpoint import keep_only
from memplan.passes.schedule import saved_by, schedule
from memplan.passes.simulate import peak

SMALL = 2**20  # bytes: less stays on the device


def away(
    step: Step,
    saved: Collection[int],
    wanted: Iterable[int],
    budget: Budget,
    machine: Machine,
    *,
    tier: Tier = "host",
    in_flight: int | None = 1,
    small: int = SMALL,
    runs: Runs | None = None,
) -> dict[int, Offload]:
    """Offloads of those `wanted` that cross, as many as the host budget holds, the first ones first; `runs`: the
    schedule, where it is known.
    """
    chosen, left = dict[int, Offload](), budget.host_bytes
    for t in wanted:
        size = step.tensors[t].bytes
        if t in step.offloadable and t in saved and size >= small and (tier == "disk" or size <= left):
            left -= size
            chosen[t] = Offload(tier)
    return placed(step, schedule(step, saved) if runs is None else runs, chosen, machine, in_flight)


def in_time(step: Step, runs: Runs, storages: Iterable[int], machine: Machine, backlog: int) -> list[int]:
    """Those that the bus takes as they are made, with at most `backlog` bytes waiting for it."""
    made, clock, seconds = dict[int, float](), 0.0, step.seconds(machine)
    for run in (run for own in runs for run in own):
        clock += seconds[run.op]
        for t in step.ops[run.op].outputs:
            made.setdefault(t, clock)
    free, chosen = 0.0, []
    waiting = machine.copy_seconds(backlog, "host")
    for t in storages:
        if free - made[t] <= waiting:
            free = max(free, made[t]) + machine.copy_seconds(step.tensors[t].bytes, "host")
            chosen.append(t)
    return chosen


def oldest_first(step: Step, storages: Iterable[int]) -> list[int]:
    """In the order in which forward makes them: the first is needed last."""
    return sorted(storages, key=lambda t: step.producer[t][0])


@dataclass(frozen=True)
class OffloadAll:
    """Nothing runs again; what backward reads leaves the device, the oldest first (ZeRO-Offload's rule for activations,
    torch.autograd.graph.save_on_cpu). `small`: bytes below which a storage stays.
    """

    tier: Tier = "host"
    in_flight: int | None = 1
    small: int = SMALL

    @property
    def name(self) -> str:
        return "offload-all" if self.tier == "host" else "offload-all-disk"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        saved = step.read_in_backward
        order = oldest_first(step, saved)
        moved = away(step, saved, order, budget, machine, tier=self.tier, in_flight=self.in_flight, small=self.small)
        return decided(saved, saved, moved)


@dataclass(frozen=True)
class OffloadLayerInputs:
    """Each block's inputs leave the device, and the rest of the block runs again (Unsloth's rule)."""

    in_flight: int | None = 1
    small: int = SMALL
    name: str = "offload-layer-inputs"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        inputs = frozenset[int]().union(*frontiers(step))
        saved = saved_by(step, keep_only(step, inputs))
        order = oldest_first(step, inputs & saved)
        moved = away(step, saved, order, budget, machine, in_flight=self.in_flight, small=self.small)
        return decided(step.read_in_backward | saved, saved, moved)


@dataclass(frozen=True)
class HandBack:
    """All leaves the device; what the budget has room for is handed back, the largest first (DeepSpeed's DeepCompile).

    The path is one: how much is handed back grows with the budget, so peaks fall with it.
    """

    in_flight: int | None = 1
    small: int = SMALL
    name: str = "hand-back"

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        saved = step.read_in_backward
        order = oldest_first(step, saved)
        runs = schedule(step, saved)
        everything = away(step, saved, order, budget, machine, in_flight=self.in_flight, small=self.small, runs=runs)
        largest = sorted(everything, key=lambda t: (-step.tensors[t].bytes, t))

        def without(count: int) -> Mapping[int, Offload]:
            rest = [t for t in order if t in set(largest[count:])]
            return away(step, saved, rest, budget, machine, in_flight=self.in_flight, small=self.small, runs=runs)

        few, many = 0, len(largest)  # as far as is known: handing back `few` fits, more than `many` does not
        while few < many:
            middle = (few + many + 1) // 2
            if peak(step, saved, without(middle), runs) <= budget.available:
                few = middle
            else:
                many = middle - 1
        return decided(saved, saved, without(few))


def offloads_of(decisions: Decisions) -> dict[int, Offload]:
    """Those of the decisions that offload."""
    return {t: d for t, d in decisions.items() if isinstance(d, Offload)}


def decided(storages: Iterable[int], saved: Collection[int], moved: Mapping[int, Offload]) -> Decisions:
    """Decisions on `storages`: what does not leave the device is kept if it is saved, and else runs again."""
    found: dict[int, Decision] = {t: Keep() if t in saved else Recompute() for t in storages}
    found.update(moved)
    return found
