"""Record the steps of memplan/steps from their models, on the meta device: nothing is allocated or run.

    python benchmarks/record_steps.py [NAME...]

Each is traced as the eager inner compiler gets it, with the H100's table of workspaces, and, where it is asked for,
with what torch's own partitioner would save. Prints the ops, the file's size and the seconds of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

import memplan.steps
from benchmarks.recorded_models import STEPS
from memplan.ir import Budget, Step
from memplan.machines import machine
from memplan.passes.partition import Partitioner
from memplan.passes.trace import trace
from memplan.serialize import to_json, write


def recorded(name: str) -> Step:
    """The Step of that name, traced."""
    how = STEPS[name]
    step, batch = how.make()
    partitioner = Partitioner(
        policy="torch" if how.torch else "save-all",
        budget=Budget(2**62),
        machine=machine("h100"),
        inner="eager",
        on_plan=lambda *_: None,
        measure=False,
        tiles=how.tiles,
    )
    return dataclasses.replace(trace(step, (batch,), partitioner), name=name)


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(STEPS)}; default all")
    args = parser.parse_args()
    for name in args.names or STEPS:
        start = time.perf_counter()
        step = recorded(name)
        data = gzip.compress(to_json(step).encode(), mtime=0)
        write(Path(memplan.steps.__file__).with_name(f"{name}.json.gz"), data)
        print(f"{name}: {len(step.ops)} ops, {len(data)} bytes, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
