"""Decisions that were found before, by whatever process: a policy that takes seconds is asked once for a step.

In: a policy. Out: the same policy, with a file of decisions for each question that it has answered. A question is the
step, the budget, the machine, the policy and memplan's own code, all whole.
What must hold: a file is never trusted. What it says is planned and simulated again, and where that is no valid plan
inside the budget, or the file is damaged, the policy is asked, as it is where no file can be written.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from memplan import ir
from memplan.errors import MemplanError
from memplan.ir import Budget, Decision, Decisions, Machine, Step
from memplan.passes import policies
from memplan.passes.pipeline import evaluate
from memplan.passes.policies.optimal import Optimal
from memplan.serialize import from_json, to_json, write

KEPT = 500  # files; the ones that were not asked for the longest go

log = logging.getLogger("torch.memplan")


@dataclass(frozen=True)
class Answer:
    """What a policy decided."""

    decisions: tuple[tuple[int, Decision], ...]


@dataclass(frozen=True)
class Remembered:
    """`folder`: where the files are; it is made when there is something to keep."""

    policy: policies.Policy
    folder: Path

    @property
    def name(self) -> str:
        """The policy's own."""
        return policies.name_of(self.policy)

    @property
    def finds_least(self) -> bool:
        """The policy's own."""
        return policies.finds_least(self.policy)

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        path = self.folder / f"{_question(self.policy, step, budget, machine)}.json"
        found = _read(path)
        if found is not None and self._good(found, step, budget, machine):
            return found
        made = self.policy(step, budget, machine)
        if self._good(made, step, budget, machine):
            _keep(path, made)
        return made

    def _good(self, decisions: Decisions, step: Step, budget: Budget, machine: Machine) -> bool:
        try:
            return evaluate(step, decisions, budget, machine, "eager", self.name).fits
        except MemplanError:
            return False


def remembered(policy: str | policies.Policy) -> str | policies.Policy:
    """The policy with its files, where that is worth it. MEMPLAN_CACHE names their folder; 0: there are none."""
    chosen = policies.find(policy)
    folder = os.environ.get("MEMPLAN_CACHE") or _default()
    return Remembered(chosen, Path(folder)) if isinstance(chosen, Optimal) and folder != "0" else policy


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memplan"


def _question(policy: policies.Policy, step: Step, budget: Budget, machine: Machine) -> str:
    parts = (_code(), repr(policy), repr(budget), repr(machine), to_json(step))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Of everything that decisions follow from, beside the question."""
    folders = Path(ir.__file__).parent, Path(policies.__file__).parents[1]
    sources = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def _read(path: Path) -> Decisions | None:
    try:
        found = from_json(path.read_text(), Answer, str(path))
        os.utime(path)
    except (OSError, UnicodeDecodeError):
        return None
    except MemplanError as e:
        log.warning("a plan is made again: %s", e)
        return None
    return dict(found.decisions)


def _keep(path: Path, decisions: Decisions) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, to_json(Answer(tuple(sorted(decisions.items(), key=lambda decided: decided[0])))))
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[: max(0, len(files) - KEPT)]:
            old.unlink()
    except (MemplanError, OSError) as e:
        log.warning("a plan is not kept for the next time: %s; MEMPLAN_CACHE=0 keeps none", e)
