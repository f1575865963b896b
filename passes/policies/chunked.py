"""Each layer's activations in chunks of so many bytes, each kept, computed again or loaded: an article's rule.

In: a step, a budget, a machine. Out: Keep, Recompute and Offload, alike for all storages of a chunk.
The article's are chunks of a fixed size that end where a layer ends, and a decision for each of them. It does not say
which; here those that are dearest to compute again, per byte, are kept the longest. One that is not kept is loaded if
the bus takes it while the chunk behind it is made, and else runs again, from the input of its block, which is kept, or
loaded with its chunk. Blocks are those of passes/blocks.py: of a transformer's layer two, attention and MLP.
A decision is on a storage, so a chunk is whole storages, in the order in which they are made, and a storage that is
larger is a chunk of its own: the article cuts it. What cuts here is option `tiles`, where rows do not mix: what runs in
slices is computed again a slice at a time, and a policy decides on the rest. Copies are of storages, and what is small
stays on the device, where the article's chunk is one copy.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from memplan.errors import MemplanError
from memplan.ir import Budget, Decisions, Machine, Offload, Step
from memplan.passes.blocks import boundaries, frontiers
from memplan.passes.policies.block_checkpoint import keep_only
from memplan.passes.policies.offload import SMALL, away, decided
from memplan.passes.schedule import closure, read_in, saved_by, schedule
from memplan.passes.simulate import peak

Chunk = tuple[int, ...]  # storages
Way = Literal["recompute", "load"]
WAYS: tuple[Way, ...] = ("recompute", "load")
PARTS = 16  # between the numbers of chunks that are tried where bisection finds none that fits


def chunks(step: Step, size: int, inputs: Collection[int] = ()) -> list[Chunk]:
    """What backward reads, and blocks' `inputs`, in chunks of `size` bytes at most, in the order made. No chunk is in
    two blocks; a storage that is larger is a chunk.
    """
    found, room = list[list[int]](), -1
    wanted, ends = step.read_in_backward.union(inputs), {b.op for b in boundaries(step)}
    for i, op in enumerate(step.forward.ops):
        room = -1 if i in ends else room
        for t in op.outputs:
            if t in wanted:
                if step.tensors[t].bytes > room:
                    found.append([])
                    room = size
                found[-1].append(t)
                room -= step.tensors[t].bytes
    return [tuple(chunk) for chunk in found]


def most(peak: Callable[[int], int], last: int, room: int) -> int:
    """The largest number, 0 to `last`, whose peak is at most `room`; where none is found, that of the least peak.

    A peak rises with the number of chunks that are kept, but first it may fall: where little is kept, much is there
    again at once. Of peaks that do only this, it is the largest as soon as one that fits is met: by bisection, or else
    among PARTS + 1 numbers over all, and then as many around the lowest of them, ... Of others it may be a smaller
    one. Those that are tried last do not depend on `room`, so what fits one fits each larger one.
    """
    found, low, high = _bisected(peak, 0, last + 1, room), 0, last
    while peak(found) > room:
        tried = sorted({found, *(low + (high - low) * i // PARTS for i in range(PARTS + 1))})
        if fitting := [n for n in tried if peak(n) <= room]:
            return _bisected(peak, fitting[-1], min((n for n in tried if n > fitting[-1]), default=last + 1), room)
        found = min(tried, key=lambda n: (peak(n), -n))
        if high - low <= PARTS:  # each between them was tried
            break
        at = tried.index(found)
        low, high = tried[max(0, at - 1)], tried[min(at + 1, len(tried) - 1)]
    return found


def _bisected(peak: Callable[[int], int], few: int, over: int, room: int) -> int:
    """As far as is known, `few` fits, and `over` does not."""
    while over - few > 1:
        middle = (few + over) // 2
        few, over = (middle, over) if peak(middle) <= room else (few, middle)
    return few


@dataclass(frozen=True)
class Chunked:
    """`chunk`: bytes. `ways`: what may become of a chunk that is not kept. `share`: of the bytes of all chunks, the
    most that is kept, inputs of blocks first; None: what the budget holds, as `most` finds it. `segment`: blocks from
    one input that never runs again to the next; 0: the square root of their number. `in_flight`, `small`: as in
    passes/policies/offload.py. Raises MemplanError for what is none of these.
    """

    chunk: int = 64 * 2**20
    ways: tuple[Way, ...] = WAYS
    share: float | None = None
    segment: int = 1
    in_flight: int | None = None
    small: int = SMALL
    name: str = "chunked"

    def __post_init__(self) -> None:
        self._whole("chunk", 1, "bytes, 1 or more, as chunk=64 * 2**20")
        self._whole("segment", 0, "blocks, 0 or more; 0 is the square root of all")
        self._whole("small", 0, "bytes, 0 or more; less is not loaded")
        if self.in_flight is not None:
            self._whole("in_flight", 0, "copies, 0 or more, or None for as many as it takes")
        if not self.ways or not isinstance(self.ways, tuple) or not all(way in WAYS for way in self.ways):
            raise MemplanError(
                f"ways={self.ways!r} is not what may become of a chunk: give a tuple of 'recompute' and 'load'; how "
                "much is kept is what share says"
            )
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if self.share is not None and not (number and 0 <= self.share <= 1):
            raise MemplanError(
                f"a share of {self.share!r} of the chunks cannot be kept: give 0 to 1, or None for what fits"
            )

    def _whole(self, name: str, least: int, of: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise MemplanError(f"{name}={value!r:.60} is none of a chunked plan's: give a whole number of {of}")

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        blocks = frontiers(step)
        every = self.segment or max(1, round(math.sqrt(len(blocks))))
        inputs = frozenset[int]().union(*blocks[every - 1 :: every] if "recompute" in self.ways else ())
        found = chunks(step, self.chunk, inputs)
        last = sorted(reversed(found), key=lambda chunk: -self._price(step, chunk, inputs, machine))

        def crossing(count: int) -> tuple[frozenset[int], dict[int, Offload], int]:
            """What crosses when so many chunks are kept, what of it is off the device, and the peak."""
            kept = frozenset(last[:count])
            loaded = self._loaded(step, [c for c in found if c not in kept], budget, machine)
            stay = inputs.union(*kept, *loaded) if "recompute" in self.ways else step.read_in_backward
            saved = saved_by(step, keep_only(step, stay))
            runs, wanted = schedule(step, saved), itertools.chain(*loaded)
            crosses = saved & read_in(step, runs)
            moved = away(
                step, crosses, wanted, budget, machine, in_flight=self.in_flight, small=self.small, runs=runs
            )  # fmt: skip
            return saved, moved, peak(step, crosses, moved, runs)

        known = step.once(_peaks, self, machine, budget.host_bytes)

        def peak_of(count: int) -> int:
            if count not in known:
                known[count] = crossing(count)[2]
            return known[count]

        shared = self.share is not None
        count = self._shared(step, last, inputs) if shared else most(peak_of, len(last), budget.available)
        saved, moved, _ = crossing(count)
        return decided(step.read_in_backward | saved, saved, moved)

    def _shared(self, step: Step, last: Sequence[Chunk], inputs: frozenset[int]) -> int:
        """How many chunks are kept, by `share`."""
        sizes = itertools.accumulate((_bytes(step, set(c) - inputs) for c in last), initial=_bytes(step, inputs))
        most = (self.share or 0.0) * _bytes(step, itertools.chain(*last))
        return max(0, sum(size <= most for size in sizes) - 1)

    def _price(self, step: Step, chunk: Chunk, inputs: Collection[int], machine: Machine) -> float:
        """Seconds for each byte of it that runs again, where all else is there; 0 if nothing may."""
        gone = set(chunk).difference(inputs)
        if "recompute" not in self.ways:
            return 0.0
        again = closure(step, gone, {*step.given, *step.read_in_backward, *inputs} - gone)
        if any(step.ops[i].fixed for i in again):
            return math.inf
        return sum(map(step.seconds(machine).__getitem__, again)) / max(1, _bytes(step, gone))

    def _loaded(self, step: Step, chunks: Sequence[Chunk], budget: Budget, machine: Machine) -> list[Chunk]:
        """Those of them that are loaded, in the order made: while the host has room, and in time if there is another
        way.
        """
        found, free, room = list[Chunk](), 0.0, budget.host_bytes
        made = step.once(_made, machine)
        end, forced = max(made.values(), default=0.0), "recompute" not in self.ways
        for chunk in chunks if "load" in self.ways else ():
            moved = [t for t in chunk if t in step.offloadable and step.tensors[t].bytes >= self.small]
            size, ready = _bytes(step, moved), max(made[t] for t in chunk)
            takes = machine.copy_seconds(size, "host")
            there = max(free, ready) + takes  # and it must be back before backward reads it, which may be at once
            if 0 < size <= room and (forced or (free - ready <= takes and there + takes <= end)):
                free, room = there, room - size
                found.append(chunk)
        return found


def _peaks(step: Step, *of: object) -> dict[int, int]:
    """Number of chunks that are kept -> peak: as they become known, since they are the same for each `Budget.bytes`."""
    return {}


def _made(step: Step, machine: Machine) -> dict[int, float]:
    """When forward has made each storage."""
    clock = itertools.accumulate(step.seconds(machine)[: len(step.forward.ops)])
    return {t: at for op, at in zip(step.forward.ops, clock, strict=True) for t in op.outputs}


def _bytes(step: Step, storages: Iterable[int]) -> int:
    return sum(step.tensors[t].bytes for t in storages)
