"""TRL with a vLLM engine in its process, in one budget: the run of examples/06_trl_with_vllm.py, watched.

    python benchmarks/trl_vllm.py [--steps 20] [-o FILE]

On the CPU; needs TRL and vLLM (.ci/install_vllm_cpu). Resident memory is the process's, seen by another thread every
2 ms, beside what it has in all phases: weights, engine, code. malloc is told to give back what is freed at once. The
first two steps, which compile and move the optimizer's states, are left out of the peaks. Exit code 1 when a promise is
broken: one copy of the weights, log-probs within 1e-5, and one budget that would not hold if either kept its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.engine import M_MMAP_THRESHOLD, MIB, SLACK, Watch, example_of
from benchmarks.machine import save
from memplan import memory

EXAMPLE = Path(__file__).parents[1] / "examples" / "06_trl_with_vllm.py"


class PhaseWatch(Watch):
    """TRL trains after the block of its phase, where the ledger stays: looks are of the phase that it is at."""

    def look(self) -> None:
        self.phase = getattr(self.ledger, "at", "")
        super().look()


def figures(steps: int) -> dict[str, Any]:
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    from transformers import TrainerCallback

    example = example_of(EXAMPLE)
    trainer, ledger, engine = example.run(steps)
    watch, base = PhaseWatch(), list[int]()
    watch.ledger = ledger

    class AfterTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 2:
                watch.peaks.clear()
            if state.global_step >= 2:  # no gradients, the states there
                base.append(memory.resident() - ledger.leases["optimizer"].bytes)

    trainer.add_callback(AfterTwo())
    with watch.watching():
        trainer.train()
    peaks = {name: watch.peaks[name] - min(base) for name in ("rollout", "train")}
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    found = {
        "steps": steps,
        "rewards": [entry["reward"] for entry in logs],
        "off_by_nats": max(entry["sampling/sampling_logp_difference/max"] for entry in logs),
        "copied_parameters": len(engine.shared.copied),
        "cache": engine.kv_bytes,
        "states": ledger.leases["optimizer"].bytes,
        "weights": engine.weight_bytes,
        "growth": max(base) - min(base),
        "budget": ledger.budget - engine.fixed - engine.weight_bytes,
        "peaks": peaks,
    }
    ledger.close()
    engine.close()
    return found


def promised(found: dict[str, Any]) -> list[str]:
    """What is not as it was promised."""
    budget, peaks = found["budget"], found["peaks"]
    checks = {
        "log-probs of engine and trainer differ": found["off_by_nats"] > 1e-5,
        "parameters are copied": found["copied_parameters"] > 0,
        "a phase is over the budget": max(peaks.values()) > budget + SLACK,
        "both would have fitted": peaks["train"] + found["cache"] <= budget + SLACK,
        "memory grows": found["growth"] > SLACK,
    }
    return [name for name, broken in checks.items() if broken]


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-o", "--out", default="benchmarks/results/trl_vllm.json")
    asked = parser.parse_args()
    found = figures(asked.steps)
    broken = promised(found)
    print({name: value / MIB if isinstance(value, int) and value > MIB else value for name, value in found.items()})
    print({name: value / MIB for name, value in found["peaks"].items()}, *broken, sep="\n")
    save(asked.out, found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
