"""Do TRL's own tests of its GRPOTrainer pass with memplan switched on?

    python benchmarks/trl_tests.py --tests PATH/TO/trl/tests/test_grpo_trainer.py [-k NAMES] [--epochs 1] [--jobs 2]

TRL's wheel has no tests: take them, and testing_utils.py beside them, from its repository, at the version installed.
Both files are copied, and nothing else of that folder runs. Models and data are stand-ins (benchmarks/trl_standins.py):
what a test names on a hub and is not among them makes it one that cannot run here, by that name.

Every test runs twice, each time from the same seed: as it is, the control, and with each GRPOTrainer that it makes
given to memplan.grpo.trl.planned as its __init__ ends. The budget is the least that works: 1 byte, then what the
refusal names, and the test starts over; tests of the same model, batch and lengths begin with what those before were
told. A step of many graphs is refused once for each: from the fourth time on a quarter more is tried at least. A test
passes planned when it passes so. `inner="eager"`, one thread, use_cpu=True; --epochs is for tests that leave it to TRL,
whose default is 3, and do not count them. What FILE has of the same tests and TRL is not run again. Exit code 1 when a
test passes unplanned and neither passes planned nor is refused by planned() itself.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # for the processes that run tests: logits are some MB, whose pages take longer than what is computed
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    os.environ |= {"MALLOC_TOP_PAD_": str(2**27)}

import pytest
import torch
import trl
from _pytest.runner import runtestprotocol

sys.path.insert(0, str(Path(__file__).parent.parent))

import memplan
from benchmarks import trl_standins
from benchmarks.machine import save
from memplan.errors import MemplanError
from memplan.grpo import trl as ours

TRIES, PATIENCE, MORE = 12, 3, 1.25  # tries of a test; after how many a budget is raised by more than was named
PART = 8  # tests, about, that are run and written as a whole
IDS = re.compile(r"\b1516[45]\d\b")  # of Qwen2.5's last tokens, where a test writes ids down
HUB = re.compile(r"\b(?:trl-internal-testing|Qwen|HuggingFaceTB)/[\w.-]+")


Least = MutableMapping[tuple[Any, ...], int]  # budgets, by what a trainer trains


@dataclass
class Seen:
    """What memplan did in one try of a test."""

    budgets: list[int] = field(default_factory=list)  # of each trainer
    passes: dict[str, int] = field(default_factory=lambda: {"with gradients": 0, "without": 0})
    plans: int = 0
    recomputed: int = 0  # storages, in all plans
    too_small: bool = False
    refused: str = ""  # by planned() itself


class Switch:
    """A pytest plugin: runs each test with memplan off or on, and keeps what came out."""

    def __init__(
        self, on: bool, folder: Path, part: tuple[int, int], epochs: float, known: set[str], least: Least
    ) -> None:
        self.on, self.folder, self.part, self.epochs, self.known, self.least = on, folder, part, epochs, known, least
        self.found: dict[str, dict[str, Any]] = {}
        self.seen, self.tried = Seen(), 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A part of them; further cases of a test come last."""
        first = {item.function: item for item in reversed(items)}
        ordered = sorted(items, key=lambda item: first[item.function] is not item)
        part, parts = self.part
        mine = ordered[len(items) * part // parts : len(items) * (part + 1) // parts]
        items[:] = [item for item in mine if item.name not in self.known]

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        for self.tried in range(TRIES):
            self.seen = Seen()
            torch._dynamo.reset()
            torch.manual_seed(0)
            start = time.perf_counter()
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            seconds = round(time.perf_counter() - start, 1)
            if not self.seen.too_small:
                break
            item._initrequest()  # fixtures anew
        outcome, reason = _outcome(reports)
        made = asdict(self.seen) if self.on else {}
        self.found[item.name] = {"outcome": outcome, "reason": reason, "seconds": seconds} | made
        print(f"{'planned  ' if self.on else 'unplanned'} {outcome:8} {item.name} {reason}", flush=True)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        text = inspect.getsource(item.function)
        folder = self.folder / ("long" if IDS.search(text) else "short")
        os.chdir(folder)  # where from_pretrained and load_dataset find the stand-ins by their names
        if hasattr(item, "callspec"):
            text += str(item.callspec.params)
        if missing := [name for name in HUB.findall(text) if not (folder / name).is_dir()]:
            pytest.skip(f"needs {missing[0]}")

    @pytest.fixture(autouse=True)
    def switched(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """TRL trains in bfloat16 unless told otherwise, which transformers has on a CPU where use_cpu=True alone."""
        init = trl.GRPOConfig.__init__
        given: dict[str, Any] = {"use_cpu": True}
        if "epochs" not in inspect.getsource(request.function):
            given["num_train_epochs"] = self.epochs
        monkeypatch.setattr(trl.GRPOConfig, "__init__", lambda *a, **kw: init(*a, **given | kw))
        if self.on:
            self._switch_on(monkeypatch)
        yield

    def _switch_on(self, patch: pytest.MonkeyPatch) -> None:
        seen, made = self.seen, list[Any]()
        init, run = trl.GRPOTrainer.__init__, ours._Passes.run

        def planned_init(trainer: Any, *args: Any, **kwargs: Any) -> None:
            init(trainer, *args, **kwargs)
            seen.budgets.append(self.least.get(_trains(trainer), 1))
            try:
                ours.planned(trainer, budget=seen.budgets[-1], inner="eager", out=report)
            except MemplanError as error:
                seen.refused = str(error).splitlines()[0]
                raise
            made.append(trainer)

        def counted(passes: Any, *args: Any, **kwargs: Any) -> Any:
            seen.passes["with gradients" if torch.is_grad_enabled() else "without"] += 1
            try:
                return run(passes, *args, **kwargs)
            except memplan.DoesNotFit as error:
                seen.too_small = True
                at = next(i for i, trainer in enumerate(made) if trainer.memplan_passes is passes)
                more = MORE * seen.budgets[at] if self.tried >= PATIENCE else 1 + seen.budgets[at]
                self.least[_trains(made[at])] = max(error.smallest, int(more))
                raise

        def report(plan: Any) -> None:
            seen.plans += 1
            seen.recomputed += sum(isinstance(d, memplan.Recompute) for _, d in plan.decisions)

        patch.setattr(trl.GRPOTrainer, "__init__", planned_init)
        patch.setattr(ours._Passes, "run", counted)


def _trains(trainer: Any) -> tuple[Any, ...]:
    """What the least budget depends on."""
    parameters, args = list(trainer.model.parameters()), trainer.args
    sizes = [sum(p.numel() for p in parameters if p.requires_grad is trained) for trained in (False, True)]
    steps = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_completion_length
    return type(trainer.model).__name__, *sizes, *steps


def _outcome(reports: list[pytest.TestReport]) -> tuple[str, str]:
    """passed, failed or skipped, and the first line of why."""
    worst = next((r for r in reports if r.failed), next((r for r in reports if r.skipped), reports[0]))
    if isinstance(worst.longrepr, tuple):  # of a skip: file, line, reason
        return worst.outcome, worst.longrepr[2].removeprefix("Skipped: ")
    if worst.failed:
        crash = getattr(worst.longrepr, "reprcrash", None)
        return "failed", (crash.message if crash else str(worst.longrepr)).splitlines()[0]
    return worst.outcome, ""


def run(
    tests: Path, folder: Path, chosen: str, epochs: float, known: set[str], least: Least, part: tuple[int, int]
) -> list[dict[str, dict[str, Any]]]:
    """By test of a part: what came out, with memplan off and on."""
    torch.set_num_threads(1)
    gc.freeze()  # compiling walks the collector's objects, and imports made most of them
    arguments = [str(tests), "-q", "-p", "no:cacheprovider", "--no-header", "--no-summary", "--show-capture=no", "-s"]
    arguments += ["-c", os.devnull, "--rootdir", str(folder), "-m", "", "-k", chosen]
    both = [Switch(on, folder, part, epochs, known, least) for on in (False, True)]
    for switch in both:
        pytest.main(arguments, plugins=[switch])
    return [switch.found for switch in both]


def copied(tests: Path, folder: Path) -> Path:
    """Of TRL's tests these two files alone, in a package: no conftest of that folder runs."""
    place = folder / "trl_tests"
    place.mkdir()
    (place / "__init__.py").touch()
    for name in (tests.name, "testing_utils.py"):
        shutil.copy(tests.parent / name, place / name)
    return place / tests.name


def verdict(control: dict[str, Any], planned: dict[str, Any]) -> str:
    """Of a test: does switching memplan on make a difference?"""
    if control["outcome"] != "passed":
        return f"unplanned {control['outcome']}"
    if planned["outcome"] == "passed":
        return "passes planned" if planned["passes"]["with gradients"] else "passes, nothing to plan"
    return "refused" if planned["refused"] else "fails planned"


def page(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: each test by name, with the number of its cases, under its verdict and the reason."""
    said: dict[str, Counter[str]] = {}
    for name, row in found.items():
        why = row["planned"]["refused"] if row["verdict"] == "refused" else row["unplanned"]["reason"]
        said.setdefault(row["verdict"] + (f": {why[:110]}" if why else ""), Counter())[name.partition("[")[0]] += 1
    lines = [
        f"| {what.replace('|', ' ')} | {', '.join(_times(*pair) for pair in of.items())} |" for what, of in said.items()
    ]
    return "\n".join(["| what came out | tests |", "| --- | --- |", *sorted(lines)])


def _times(test: str, cases: int) -> str:
    return test if cases == 1 else f"{test} ({cases})"


def main() -> int:
    """Run, print, write as parts are done; 1 if a test that passes unplanned fails planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("-k", dest="chosen", default="")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/trl_tests.json"))
    args = parser.parse_args()
    text = args.tests.read_bytes()
    source = {"file": args.tests.name, "characters": len(text.decode()), "sha256": hashlib.sha256(text).hexdigest()}
    head = {"trl": trl.__version__, "epochs": args.epochs, "tests": source}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows: dict[str, dict[str, Any]] = before["found"] if {k: before.get(k) for k in head} == head else {}
    known, parts = set(rows), 1 + text.count(b"def test_") // PART
    context = get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        context.Manager() as shared,
        ProcessPoolExecutor(args.jobs, context) as pool,
    ):
        folder = Path(name).resolve()
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        for size, vocabulary in {"long": trl_standins.LONG, "short": trl_standins.SHORT}.items():
            trl_standins.write(folder / size, vocabulary, text.decode())
        given = copied(args.tests.resolve(), folder), folder, args.chosen, args.epochs, known, shared.dict()
        for done in as_completed([pool.submit(run, *given, (part, parts)) for part in range(parts)]):
            off, on = done.result()
            for test, control in off.items():
                rows[test] = {"verdict": verdict(control, on[test]), "unplanned": control, "planned": on[test]}
            counts = dict(sorted(Counter(row["verdict"] for row in rows.values()).items()))
            save(args.out, head | {"counts": counts, "found": dict(sorted(rows.items()))})
    print(page(rows), counts, sep="\n")
    return int("fails planned" in counts or not rows)


if __name__ == "__main__":
    sys.exit(main())
