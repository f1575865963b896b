"""Chunked checkpointing against depth: what crosses from forward to backward, the peak, and the time. Nothing is run.

    python benchmarks/chunked.py [--depths 4,8,16,32,64] [-o FILE] [--picture FILE]

Steps are of Llama-3.1-8B's layers, all trained in bfloat16, one sequence of 4,096 tokens, traced on the meta device;
chunks need no scaling. The vocabulary is 256, so that the head is no part of it, and gradients of parameters count no
bytes: they are the same whatever is decided, and more than all else. An H100 whose bus takes 50 GB/s each way.
A row for each depth and rule: bytes that cross on the device and off it, the peak above parameters and batch, and the
time in % above that of the step as it is. Slopes are of least squares through the logarithms. Optimal "as fast as" a
rule: the smallest budget in which it is no slower, found in eight halvings, which take most of the ten minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

from benchmarks.machine import save
from memplan.ir import Budget, Plan, Step
from memplan.machines import machine
from memplan.passes.partition import Partitioner
from memplan.passes.pipeline import evaluate, make_plan
from memplan.passes.policies import Policy
from memplan.passes.policies.block_checkpoint import BlockCheckpoint, SqrtN
from memplan.passes.policies.chunked import Chunked, Way, chunks
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.save_all import SaveAll
from memplan.passes.tilings import Tiling
from memplan.passes.trace import trace
from memplan.serialize import write

MIB, TOKENS, VOCABULARY = 2**20, 4096, 256
CHUNK = 64 * MIB
TARGET = dataclasses.replace(machine("h100"), host_bandwidth=50e9)
HOST = 10**12
ROUNDS = 8  # of the search for the smallest budget
EVERYWHERE = 10**6  # blocks in a segment: no input of a layer is kept
AGAIN: tuple[Way, ...] = ("recompute",)
LOAD: tuple[Way, ...] = ("load",)

RULES: dict[str, Policy] = {
    "none": SaveAll(),
    "an input for each layer": BlockCheckpoint(2),  # attention and MLP are a block each
    "an input for each sqrt(N) layers": SqrtN(),
    "chunks of 16 MiB, 0.4 kept": Chunked(16 * MIB, AGAIN, 0.4),
    "chunks of 64 MiB, 0.4 kept": Chunked(CHUNK, AGAIN, 0.4),
    "chunks of 256 MiB, 0.4 kept": Chunked(4 * CHUNK, AGAIN, 0.4),
    "chunks of 64 MiB, 0.4 kept, inputs for sqrt(N) layers": Chunked(CHUNK, AGAIN, 0.4, segment=0),
    "chunks of 64 MiB, 0.4 kept, the rest loaded": Chunked(CHUNK, LOAD, 0.4, in_flight=1, small=0),
    "chunks of 64 MiB, all loaded": Chunked(CHUNK, LOAD, 0.0, in_flight=1, small=0),
}
ROOT = "1 of sqrt(M) chunks of 64 MiB"
INSIDE = "chunks of 64 MiB, inside 0.4 of the peak"
LIKE = ("chunks of 64 MiB, 0.4 kept", "an input for each sqrt(N) layers")
SLICES = {"none": "slices of 64 MiB", "an input for each sqrt(N) layers": "slices, an input for each sqrt(N) layers"}


def recorded(layers: int, tiles: Any = None) -> Step:
    """The step of so many layers, whose gradients have no bytes."""
    AttentionInterface.register("causal", sdpa_attention_forward)
    AttentionMaskInterface.register("causal", lambda *_, **__: None)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, use_cache=False, attn_implementation="causal",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        batch = torch.empty(1, TOKENS, dtype=torch.int64)

    def step(ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=ids).logits[0].float(), ids[0])

    by = Partitioner(
        "save-all", Budget(2**62), TARGET, "eager", on_plan=lambda *_: None, measure=False, tiles=tiles
    )  # fmt: skip
    traced = trace(step, (batch,), by)
    gradients = set(traced.backward.outputs)
    tensors = (dataclasses.replace(t, bytes=0 if i in gradients else t.bytes) for i, t in enumerate(traced.tensors))
    return dataclasses.replace(traced, tensors=tuple(tensors))


def planned(step: Step, policy: Policy, name: str, budget: int = 2**60, host: int = HOST) -> Plan:
    """The policy's plan, fitting or not."""
    allowed = Budget(budget, host_bytes=host)
    return evaluate(step, policy(step, allowed, TARGET), allowed, TARGET, "eager", name)


def row(depth: int, name: str, plan: Plan, none: Plan) -> dict[str, Any]:
    """The figures of a plan; time is that above the step `none`."""
    size = {t: plan.step.tensors[t].bytes for t in plan.saved}
    away = sum(size[t] for t in plan.offloads)
    return {
        "depth": depth,
        "rule": name,
        "device": sum(size.values()) - away,
        "host": away,
        "peak": plan.peak - plan.step.base_bytes,
        "overhead": plan.timeline.seconds / none.timeline.seconds - 1,
    }


def rows(depth: int, *, search: bool) -> Iterator[dict[str, Any]]:
    """Of one depth."""
    step = recorded(depth)
    plans = {name: planned(step, rule, name) for name, rule in RULES.items()}
    none = plans["none"]
    yield from (row(depth, name, plan, none) for name, plan in plans.items())
    share = len(chunks(step, CHUNK)) ** -0.5
    yield row(depth, ROOT, planned(step, Chunked(CHUNK, AGAIN, share, segment=EVERYWHERE), ROOT), none)
    inside = step.base_bytes + int(0.4 * (none.peak - step.base_bytes))
    for host, where in ((0, ""), (HOST, ", with a host")):
        yield row(depth, INSIDE + where, planned(step, Chunked(CHUNK), INSIDE, inside, host), none)
    tiled = recorded(depth, Tiling(CHUNK))
    yield from (row(depth, name, planned(tiled, RULES[of], name), none) for of, name in SLICES.items())
    for name in LIKE if search else ():
        yield row(depth, f"optimal, as fast as {name}", as_fast(step, plans[name]), none)


def as_fast(step: Step, plan: Plan) -> Plan:
    """The planner's plan inside the smallest budget in which it is no slower, without a host."""
    low, high = step.base_bytes, plan.peak
    best = make_plan(step, Optimal(), Budget(high), TARGET, inner="eager")
    for _ in range(ROUNDS):
        middle = (low + high) // 2
        found = make_plan(step, Optimal(), Budget(middle), TARGET, inner="eager", fit=False)
        if found.fits and found.overhead <= plan.overhead:
            best, high = found, middle
        else:
            low = middle
    assert best.overhead <= plan.overhead + 1e-12
    return best


def slope(of: list[dict[str, Any]], what: str) -> float | None:
    """Of the bytes against depth, both as logarithms; None where there are no bytes."""
    if len(of) < 2 or not all(r[what] for r in of):
        return None
    depths, sizes = ([math.log(r[key]) for r in of] for key in ("depth", what))
    return statistics.linear_regression(depths, sizes).slope


def draw(found: list[dict[str, Any]], path: str) -> None:
    """What crosses on the device, and the peak, against depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = (
        "none", "chunks of 64 MiB, 0.4 kept", "an input for each layer", ROOT, "an input for each sqrt(N) layers",
        "chunks of 64 MiB, all loaded",
    )  # fmt: skip
    figure = Figure(figsize=(10, 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, what, title in zip(panels, ("device", "peak"), ("crosses on the device", "peak"), strict=True):
        for name in shown:
            mine = [r for r in found if r["rule"] == name]
            depths, sizes = [r["depth"] for r in mine], [r[what] / 2**30 for r in mine]
            axes.plot(depths, sizes, marker="o", markersize=4, label=name)
        axes.set(title=f"{title}, GiB", xlabel="layers", xscale="log", yscale="log")
        axes.set_xticks(depths, [str(d) for d in depths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write(path, buffer.getvalue())


def main() -> None:
    """Plan, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="4,8,16,32,64")
    parser.add_argument("--no-optimal", action="store_true", help="leave out the search for the planner's budgets")
    parser.add_argument("--picture", default="docs/chunked-checkpointing.png")
    parser.add_argument("-o", "--out", default="benchmarks/results/chunked.json")
    args = parser.parse_args()
    found = list[dict[str, Any]]()
    for depth in map(int, args.depths.split(",")):
        for one in rows(depth, search=not args.no_optimal):
            found.append(one)
            print(one, flush=True)
    slopes = {
        name: {what: slope([r for r in found if r["rule"] == name], what) for what in ("device", "host", "peak")}
        for name in dict.fromkeys(r["rule"] for r in found)
    }
    for name, of in slopes.items():
        print(f"{name:60}", *(f"{what} {value:.2f}" for what, value in of.items() if value is not None))
    save(args.out, {"rows": found, "slopes": slopes})
    draw(found, args.picture)


if __name__ == "__main__":
    main()
