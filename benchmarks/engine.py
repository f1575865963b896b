"""A vLLM engine beside the trainer: how fast its cache leaves and comes back, and the loop of examples/04.

    python benchmarks/engine.py [--cache 512] [--steps 50] [-o FILE] [--png FILE]

On the CPU; needs vLLM (.ci/install_vllm_cpu). Resident memory is the process's, seen by another thread every 2 ms.
malloc is told to give back what is freed at once, as it keeps up to 32 MiB a block otherwise. Exit code 1 when tokens
change over a release, or the loop's promises are broken: one copy of the weights, log-probs within 1e-5, one budget.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.machine import save
from memplan import memory
from memplan.runtime.ledger import Ledger, RLPhase
from memplan.runtime.vllm import InProcess

MIB = 2**20
SLACK = 8 * MIB  # what the interpreter takes by itself
LAST = 10_000  # looks that are kept
EXAMPLE = Path(__file__).parents[1] / "examples" / "04_grpo_with_vllm.py"
M_MMAP_THRESHOLD = -3  # of malloc.h


class Look(NamedTuple):
    """What there is at a moment: seconds, the phase, resident bytes, and bytes that leases have there."""

    at: float
    phase: str
    resident: int
    leases: dict[str, int]


class Watch:
    """Looks of another thread, every 2 ms, with the phase that the ledger is in."""

    def __init__(self) -> None:
        self.looks = deque[Look](maxlen=LAST)
        self.peaks = Counter[str]()  # by phase
        self.phase, self.ledger = "", Any

    def look(self) -> None:
        _, pages, of_files, *_ = Path("/proc/self/statm").read_text().split()
        leases = dict(getattr(self.ledger, "leases", {}))
        held = {tag: lease.bytes for tag, lease in leases.items() if lease.state == "resident"}
        early = [tag for tag, lease in leases.items() if lease.state == "between"]
        held |= {tag: self.ledger.tenant(tag).resident for tag in early}
        found = os.sysconf("SC_PAGE_SIZE") * (int(pages) - int(of_files))
        self.peaks[self.phase] = max(self.peaks[self.phase], found)
        self.looks.append(Look(time.perf_counter(), self.phase, found, held))

    @contextmanager
    def watching(self) -> Iterator[None]:
        over, real = threading.Event(), Ledger.phase

        @contextmanager
        def phase(ledger: Ledger, name: RLPhase) -> Iterator[None]:
            with real(ledger, name):
                self.ledger, self.phase = ledger, name
                yield
            self.phase = ""

        def run() -> None:
            while not over.wait(0.002):
                self.look()

        Ledger.phase = phase  # type: ignore[method-assign]
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            Ledger.phase = real  # type: ignore[method-assign]
            over.set()
            thread.join()


def example_of(path: Path = EXAMPLE) -> Any:
    """An example, as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def loop(steps: int) -> tuple[dict[str, Any], list[Look]]:
    """The example's loop, watched: its figures, and looks at its last steps. The first two steps are left out."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    example = example_of()
    before, watch, seen = memory.resident(), Watch(), list[Any]()
    with watch.watching():
        for step in example.train(steps):
            seen.append(step)
            if len(seen) == 2:
                watch.peaks.clear()  # the first one compiles, and moves the states into an arena
    both = [step.rollout - step.cache[0] for step in seen[2:]]  # weights, engine, code: what no phase is without
    base = before + min(both)
    peaks = {name: watch.peaks[name] - base for name in ("rollout", "train")}
    figures = {
        "steps": steps,
        "off_by_nats": max(step.off_by for step in seen),
        "copied_parameters": max(step.copied for step in seen),
        "rewards": [step.reward for step in seen],
        "cache": {"rollout": min(s.cache[0] for s in seen), "train": max(s.cache[1] for s in seen)},
        "growth": max(max(both) - min(both), max(s.train for s in seen[2:]) - min(s.train for s in seen[2:])),
        "budget": max(example.CACHE + example.RUNNING, example.TRAINING),
        "peaks": peaks,
    }
    return figures, [x._replace(resident=x.resident - base) for x in watch.looks]


def promised(figures: dict[str, Any]) -> list[str]:
    """What is not as it was promised."""
    budget, peaks = figures["budget"], figures["peaks"]
    checks = {
        "log-probs of engine and trainer differ": figures["off_by_nats"] > 1e-5,
        "parameters are copied": figures["copied_parameters"] > 0,
        "the cache is not away in training": figures["cache"]["train"] > 0,
        "a phase is over the budget": max(peaks.values()) > budget + SLACK,
        "both would have fitted": peaks["train"] + figures["cache"]["rollout"] <= budget + SLACK,
        "memory grows": figures["growth"] > SLACK,
        "it is the same rollout again": len(set(figures["rewards"])) <= figures["steps"] / 2,
    }
    return [name for name, broken in checks.items() if broken]


def leaving(size: int, rounds: int = 10) -> dict[str, Any]:
    """Seconds and bytes of a cache of `size` bytes that leaves and comes back."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        engine = InProcess.start(folder, size, skip_tokenizer_init=True, max_model_len=128, dtype="float32")
    prompts, how = [[3, 4, 5, k] for k in range(8)], {"max_tokens": 32, "ignore_eos": True, "seed": 1}
    first, seconds, resident, same = engine.generate(prompts, **how), {"release": [], "restore": []}, [], True
    for _ in range(rounds):
        for name, taken in seconds.items():
            start = time.perf_counter()
            getattr(engine, name)()
            taken.append(time.perf_counter() - start)
            resident.append(memory.resident())
        same = same and engine.generate(prompts, **how) == first
    engine.close()
    return {
        "cache": size,
        "seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "resident": {"away": statistics.median(resident[::2]), "there": statistics.median(resident[1::2])},
        "same_tokens": same,
    }


def early(size: int, steps: int = 14) -> dict[str, Any]:
    """The example's loop with a cache of `size` bytes and 128 completions a step, whose cache comes back while backward
    runs in every other one: medians of seconds of both, until the rollout has it and of the train step, and the bytes
    that had come. The first two steps are left out.
    """
    example, phase, prefetch = example_of(), Ledger.phase, Ledger.prefetch
    example.CACHE, example.GROUP = size, 16
    example.TRAINING = max(size + example.RUNNING, 512 * MIB)
    taken: dict[str, list[tuple[float, float]]] = {"rollout": [], "train": []}  # entering, and the block
    came, number = list[int](), 0

    @contextmanager
    def timed(ledger: Ledger, name: RLPhase) -> Iterator[None]:
        start = time.perf_counter()
        with phase(ledger, name):
            entered = time.perf_counter()
            if name == "rollout":
                came.append(ledger.transitions[-1].early)
            yield
        taken[name].append((entered - start, time.perf_counter() - entered))

    def every_other(ledger: Ledger, name: RLPhase) -> None:
        if number % 2:
            prefetch(ledger, name)

    Ledger.phase, Ledger.prefetch = timed, every_other  # type: ignore[method-assign]
    try:
        for _ in example.train(steps):
            number += 1
    finally:
        Ledger.phase, Ledger.prefetch = phase, prefetch  # type: ignore[method-assign]
    found: dict[str, Any] = {"cache": size, "bytes": statistics.median(came[4::2])}
    for k, name in enumerate(("plain", "early")):  # what is asked for in a step is there in the next one
        rollout, train = taken["rollout"][3 + k :: 2], taken["train"][2 + k :: 2]
        found[name] = {
            "wake": statistics.median(t[0] for t in rollout),
            "train": statistics.median(t[1] for t in train),
        }
    return found


def draw(looks: list[Look], path: str) -> None:
    """Three steps: what leases have, and what is resident, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    starts = [b.at for a, b in itertools.pairwise(looks) if (a.phase, b.phase) == ("", "rollout")]
    part = [x for x in looks if starts[0] <= x.at < starts[min(3, len(starts) - 1)]]
    seconds = [x.at - part[0].at for x in part]
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    tags = {"kv_cache": "KV cache (vLLM)", "optimizer": "optimizer states"}
    axes.stackplot(
        seconds, [[x.leases.get(tag, 0) / MIB for x in part] for tag in tags], labels=tags.values(),
        colors=("#9ecae1", "#fdd0a2"), step="post",
    )  # fmt: skip
    axes.plot(seconds, [x.resident / MIB for x in part], color="black", lw=0.8, label="resident, as the system says")
    for name, colour in (("rollout", "#3182bd"), ("train", "#e6550d")):
        inside = [x.phase == name for x in part]
        axes.fill_between(seconds, -6, -2, where=inside, color=colour, label=f"phase {name}", step="post")
    axes.set(xlabel="seconds", ylabel="MiB beside weights and engine", xlim=(0, seconds[-1]))
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run, print, write; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("-o", "--out", default="benchmarks/results/engine.json")
    parser.add_argument("--png")
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)  # products are small: two threads wait for each other
    left = leaving(asked.cache * MIB)
    figures, looks = loop(asked.steps)
    overlapped = early(asked.cache * MIB)
    broken = promised(figures) + ([] if left["same_tokens"] else ["tokens change over a release"])
    print(left, overlapped, {name: value for name, value in figures.items() if name != "rewards"}, *broken, sep="\n")
    if asked.png:
        draw(looks, asked.png)
    save(asked.out, {"leaving": left, "early": overlapped, "loop": figures})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
