"""The machine this process runs on: a row of the device table with the memory that is really there."""

from __future__ import annotations

import dataclasses
import os

import torch

from memplan.ir import Machine
from memplan.machines import machine, machines


def this_machine(device: str) -> Machine:
    """The machine behind "cpu" or "cuda". A CUDA device that is not in the table is priced as the T4, its slowest."""
    if device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return dataclasses.replace(machine("cpu"), memory_bytes=total)
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    same = [m for m in machines().values() if m.device == "cuda" and m.name.split("-")[0] in _squeezed(name)]
    nearest = min(same or [machine("t4")], key=lambda m: abs(m.memory_bytes - total))
    return dataclasses.replace(nearest, memory_bytes=total)


def _squeezed(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" -> "nvidiageforcertx4090"."""
    return "".join(c for c in name.lower() if c.isalnum())
