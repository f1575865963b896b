"""What it takes to leave a device and to come back: transitions between a rollout's cache and an optimizer's states.

    python benchmarks/ledger.py [--size 512] [--rounds 20] [-o FILE]

Each round is rollout, then train, on the CPU: an arena of --size MiB that is restored by nothing stands for the KV
cache, one of half that size that is restored by copy for the states; the budget is the larger of the two. Every page is
written in every phase. Seconds are medians, of all rounds but the first; resident memory is the process's, above what
it was without both. Exit code 1 when that exceeds the budget by more than 8 MiB, or the states change.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import save
from memplan import memory
from memplan.runtime.arena import Arena
from memplan.runtime.ledger import Ledger
from memplan.runtime.tenants import ArenaTenant

MIB = 2**20


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("-o", "--out", default="benchmarks/results/ledger.json")
    asked = parser.parse_args()
    cache = ArenaTenant(Arena.reserve(asked.size * MIB))
    states = ArenaTenant(Arena.reserve(asked.size * MIB // 2), "copy")
    tokens = cache.arena.tensor(0, (cache.arena.size,), torch.uint8)
    moments = states.arena.tensor(0, (states.arena.size // 4,), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(cache.arena.size, folder=folder)
        beside = memory.resident()
        ledger.lease("kv_cache", cache, cache.arena.size, ("rollout",))
        ledger.lease("optimizer", states, states.arena.size, ("train",))
        resident: dict[str, list[int]] = {"rollout": [], "train": []}
        same = True
        for number in range(asked.rounds):
            with ledger.phase("rollout"):
                tokens.fill_(number % 100)
                resident["rollout"].append(memory.resident() - beside)
            with ledger.phase("train"):
                same = same and bool((moments == number).all())
                moments.add_(1)
                resident["train"].append(memory.resident() - beside)
        seconds = {
            phase: statistics.median(t.seconds for t in list(ledger.transitions)[2:] if t.wanted == phase)
            for phase in resident
        }
        ledger.close()
    largest = {phase: max(found) / MIB for phase, found in resident.items()}
    for phase in resident:
        print(f"{phase}: entered in {1e3 * seconds[phase]:.0f} ms, at most {largest[phase]:.1f} MiB resident")
    kept = same and max(largest.values()) <= asked.size + 8
    save(
        asked.out,
        {
            "budget_mib": asked.size, "rounds": asked.rounds, "seconds": seconds, "resident_mib": largest,
            "states_kept": same,
        },
    )  # fmt: skip
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
