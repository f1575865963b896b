"""Measure this machine once, for a machine file: what `memplan calibrate` does.

In: "cpu" or "cuda". Out: a Measured: the Machine, and the figures it was made of. The machine is the one that memplan
would suppose here (here.py), with what was measured in the place of the table's data-sheet rates; the context's size is
the table's still.
What must hold: no rate is guessed. What cannot be measured here (a dtype without hardware, attention in it) is left
out, as in the table; a rate that prices two directions is the slower one's.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
from collections.abc import Callable, Iterator

import torch

from memplan.calibrate import inside, rates, transfers
from memplan.calibrate.clock import Clock
from memplan.errors import MemplanError
from memplan.here import this_machine
from memplan.ir import Machine
from memplan.machines import file

Figure = tuple[str, float, str]  # what, how much, in which unit


@dataclasses.dataclass(frozen=True)
class Measured:
    """`figures`: all that was measured, those too that no field of `machine` holds. `about`: when, and on what."""

    machine: Machine
    figures: tuple[Figure, ...]
    about: tuple[tuple[str, str], ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a machine file."""
        figures = [dict(zip(("what", "value", "unit"), figure, strict=True)) for figure in self.figures]
        file.save(self.machine, dict(self.about) | {"figures": figures}, path)

    def __str__(self) -> str:
        about = ", ".join(f"{what} {value}" for what, value in self.about)
        return "\n".join([f"{self.machine.name}: {about}", *map(_line, self.figures)])


def _line(figure: Figure) -> str:
    what, value, unit = figure
    scale, letter = next(((s, p) for s, p in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= s), (1.0, ""))
    return f"  {what:44}{value / scale:10.3g} {letter}{unit}"


def calibrate(
    device: str | None = None,
    *,
    name: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
    scale: float = 1.0,
) -> Measured:
    """Measure a device (default: CUDA if there is one, otherwise the CPU), in under a minute.

    `name` of the machine in reports. `progress` is told what comes next. `scale`: of the sizes and times of what is
    run; below 1 figures are worth less, and come sooner. Raises MemplanError for a device that is not there, and for a
    scale of 0 or less.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where not in ("cpu", "cuda") or (where == "cuda" and not torch.cuda.is_available()):
        raise MemplanError(f"cannot calibrate {where!r}: give 'cpu', or 'cuda' where torch sees such a device")
    if not 0 < scale < math.inf:
        raise MemplanError(f"a scale of {scale:g} leaves nothing to measure: give a positive number, or none")
    clock, figures = Clock(torch.device(where), scale), list[Figure]()

    def measured(what: str, results: Iterator[tuple[str, float]], unit: str, of: str) -> dict[str, float]:
        progress(what)
        found = dict(results)
        figures.extend((of.format(key), value, unit) for key, value in found.items())
        return found

    with torch.random.fork_rng([torch.cuda.current_device()] if clock.cuda else []), torch.no_grad():
        flops = measured("products", rates.products(clock), "FLOP/s", "products, {}")
        attention = measured("attention", rates.attention(clock, flops), "FLOP/s", "attention, {}")
        memory = measured("memory", rates.memory(clock), "B/s", "{}")
        copies = measured("copies", transfers.copies(clock), "B/s", "copies {}")
        shared = measured("copies beside ops", transfers.contention(clock), "", "{}")
        disk = measured("disk", transfers.disk(clock), "B/s", "disk, {}")
        rules = measured("memory inside ops", inside.workspaces(clock), "x its first output", "inside {}")
    here, about = this_machine(where), _about(where)
    link = min(rate for direction, rate in copies.items() if "pageable" not in direction)
    made = dataclasses.replace(
        here,
        name=name or f"{about['device']} measured",
        bandwidth=memory["pointwise"],
        flops=tuple(flops.items()),
        attention=tuple(attention.items()),
        host_bandwidth=link,
        disk_bandwidth=min(link, *disk.values()),
        contention=shared["contention"],
        unified=not clock.cuda or bool(torch.cuda.get_device_properties().is_integrated),
        workspace_rules=tuple((dict(here.workspace_rules) | rules).items()),
    )
    return Measured(made, tuple(figures), tuple(about.items()))


def _about(device: str) -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
