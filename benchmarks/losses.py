"""Losses as people write them (tests/losses.py): which run in slices, under memplan and under others.

    python benchmarks/losses.py [-o FILE]

Four sequences of 129 tokens, width 64, 1,024 words, slices of 40 rows, which do not divide them. `memplan`: the way, or
why not. `rms_ratio`: the gradients' rms error against float64 over that of the untiled step, eager, float32, the worst
of five seeds. `auto_chunker`: whether Inductor's AutoChunker, at its most willing, chunks the graph. The last column:
whether torch's linear_cross_entropy can express the loss. Exit code 1 when a loss whose rows do not mix is not tiled,
or when a ratio is over 1.1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tests, which are not installed

import memplan
from benchmarks.machine import save
from memplan.backend import memplan_backend
from tests.accuracy import rms_error
from tests.losses import LOSSES, MIXES, Head, Rows

SIZES = (4, 129, 64, 1024)
LINEAR_CROSS_ENTROPY = ("cross entropy", "cross entropy, by hand", "bias", "label smoothing", "ignore_index",
                        "shift after the head", "frozen head")  # fmt: skip
EXACTLY = {"float16, scaled": lambda m, r, h, z: r.mean(r.clipped(z)) * 2.0**13}  # a cast is a cast in float64 too


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/losses.json")
    args = parser.parse_args()
    rows = [measured(what) for what in LOSSES]
    tiled = [row["loss"] for row in rows if row["memplan"].startswith("tiled")]
    chunked = sum(row["auto_chunker"] == "chunked" for row in rows)
    print(f"of {len(rows)} losses tiled: {len(tiled)}, AutoChunker: {chunked}, linear_cross_entropy: ", end="")
    print(len(LINEAR_CROSS_ENTROPY))
    save(args.out, {"sizes": SIZES, "rows": rows})
    return int(set(LOSSES) - set(tiled) != set(MIXES) or not all(row["rms_ratio"] <= 1.1 for row in rows))


def measured(what: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"loss": what, "memplan": way(what)}
    row["rms_ratio"] = max(ratio(what, seed) for seed in range(5))
    row["auto_chunker"] = auto_chunker(what)
    row["linear_cross_entropy"] = what in LINEAR_CROSS_ENTROPY
    print(f"{what:24} {row['memplan'][:60]:60} {row['rms_ratio']:.2f}  {row['auto_chunker']}", flush=True)
    return row


def sample(what: str, seed: int, dtype: torch.dtype) -> tuple[Head, Rows]:
    """The same values in every dtype."""
    torch.manual_seed(seed)
    model, rows = Head(SIZES[2], SIZES[3]), Rows.make(*SIZES, dtype=torch.float32)
    torch.manual_seed(seed)
    noise = torch.randn_like(rows.x_BTD)
    rows = dataclasses.replace(rows, x_BTD=rows.x_BTD + noise, old_BT=rows.old_BT + 0.3 * noise[..., 0])
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in vars(rows).items()}
    return model.to(dtype), Rows(**cast)


def gradients(model: Head, run: Callable[[], Any]) -> list[torch.Tensor]:
    """Of all parameters, with ones for what is not a scalar."""
    model.zero_grad()
    found = run()
    found = found[0] if isinstance(found, tuple) else found
    found.backward(torch.ones_like(found))
    return [torch.zeros(1).double() if p.grad is None else p.grad.double() for p in model.parameters()]


def compiled(what: str, seed: int, backend: Any, options: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """The gradients that a compiler finds, in float32."""
    torch._dynamo.reset()
    model, rows = sample(what, seed, torch.float32)
    step = torch.compile(lambda: LOSSES[what](model, rows, *model(rows.x_BTD)), backend=backend, options=options)
    return gradients(model, step)


def ratio(what: str, seed: int) -> float:
    """The error of the tiled step over that of the untiled one."""
    model, rows = sample(what, seed, torch.float64)
    exact = gradients(model, lambda: EXACTLY.get(what, LOSSES[what])(model, rows, *model(rows.x_BTD)))
    untiled = rms_error(compiled(what, seed, "aot_eager"), exact)
    return rms_error(compiled(what, seed, memplan_backend, {"inner": "eager", "tiles": 40}), exact) / untiled


def way(what: str) -> str:
    """What the plan's notes say of the head."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/plan.json"
        compiled(what, 0, memplan_backend, {"inner": "eager", "tiles": 40, "out": out})
        made = memplan.Plan.load(out)
    notes = [note for note in made.step.notes if "tiled" in note]
    return next((note for note in notes if note.startswith("tiled")), notes[0])


def auto_chunker(what: str) -> str:
    """Whether it chunks, refuses, or crashes, and then how."""
    before = metrics.num_auto_chunking
    willing = {"enable": True, "output_size_threshold": 1, "amplify_ratio_threshold": 2, "num_chunk": 4}
    try:
        options = {f"auto_chunker.{k}": v for k, v in willing.items()} | {"fx_graph_cache": False}
        compiled(what, 0, "inductor", options)
    except Exception as e:
        return f"crashed: {type(e).__name__}: {str(e).splitlines()[0][:100]}"
    return "chunked" if metrics.num_auto_chunking > before else "refused"


if __name__ == "__main__":
    sys.exit(main())
