"""The data that memplan's stages hand to each other: frozen, torch-free, saved as JSON by serialize.py.

    Step      what runs: graphs of Ops over Tensors (storages), in order of execution
    Decision  Keep | Recompute | Offload, for the gap between a storage's last forward and first backward use
    Plan      a Step, a Decision per storage, and the exact order of execution that follows
    Timeline  what is alive when, predicted or measured: the same type, so comparing them is one function

What must hold: a Tensor is a storage, never a view, so bytes are counted once; lifetimes are half-open
intervals of moments; everything downstream follows from op order alone, never from clocks.
Sizes are bytes, times are seconds, throughout.
"""

from memplan.ir.decisions import Decision, Decisions, Keep, Offload, Recompute, Run, Tier
from memplan.ir.machine import Budget, Machine
from memplan.ir.plan import Bound, Plan
from memplan.ir.step import (
    COST_MODELS,
    KINDS,
    CostModel,
    Fusion,
    Gap,
    Graph,
    Held,
    Kind,
    Loop,
    Op,
    Phase,
    Polynomial,
    Ports,
    Step,
    Tensor,
)
from memplan.ir.timeline import Block, Moment, Timeline

__all__ = [
    "COST_MODELS",
    "KINDS",
    "Block",
    "Bound",
    "Budget",
    "CostModel",
    "Decision",
    "Decisions",
    "Fusion",
    "Gap",
    "Graph",
    "Held",
    "Keep",
    "Kind",
    "Loop",
    "Machine",
    "Moment",
    "Offload",
    "Op",
    "Phase",
    "Plan",
    "Polynomial",
    "Ports",
    "Recompute",
    "Run",
    "Step",
    "Tensor",
    "Tier",
    "Timeline",
]
