"""Plans of before: the policy is not asked again for the same, and is for anything else; no file is trusted."""

import dataclasses
import logging
import os
from pathlib import Path

import pytest

from memplan.errors import MemplanError
from memplan.ir import Budget, Decisions, Keep, Machine, Plan, Recompute, Step
from memplan.passes import pipeline, policies
from memplan.passes.policies import remembered as module
from memplan.passes.policies.greedy import Greedy
from memplan.passes.policies.optimal import Optimal
from memplan.passes.policies.remembered import Remembered, remembered


class Counted:
    """Greedy, that counts how often it is asked."""

    def __init__(self, name: str = "counted") -> None:
        self.name, self.asked = name, 0

    def __call__(self, step: Step, budget: Budget, machine: Machine) -> Decisions:
        self.asked += 1
        return Greedy()(step, budget, machine)

    def __repr__(self) -> str:
        return self.name


@pytest.fixture
def asked(plan: Plan, tmp_path: Path) -> tuple[Counted, Plan, Path]:
    """A policy that was asked once, for this plan, and the folder of what it said."""
    policy = Counted()
    made = Remembered(policy, tmp_path)(plan.step, plan.budget, plan.machine)
    assert made == Greedy()(plan.step, plan.budget, plan.machine) and policy.asked == 1
    return policy, plan, tmp_path


def test_the_same_is_not_asked_again(asked: tuple[Counted, Plan, Path]) -> None:
    _, plan, folder = asked
    again = Remembered(Counted(), folder)  # as in another process
    made = again(dataclasses.replace(plan.step), plan.budget, plan.machine)
    assert made == Greedy()(plan.step, plan.budget, plan.machine)
    assert again.policy.asked == 0 and again.name == "counted"
    assert len(list(folder.iterdir())) == 1


def test_anything_else_is(asked: tuple[Counted, Plan, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, plan, folder = asked
    known = Remembered(policy, folder)
    known(plan.step, dataclasses.replace(plan.budget, bytes=plan.budget.bytes + 1), plan.machine)
    known(plan.step, dataclasses.replace(plan.budget, host_bytes=1), plan.machine)
    known(plan.step, plan.budget, dataclasses.replace(plan.machine, bandwidth=plan.machine.bandwidth * 2))
    known(dataclasses.replace(plan.step, notes=("another",)), plan.budget, plan.machine)
    assert policy.asked == 5
    other = Counted("another")
    Remembered(other, folder)(plan.step, plan.budget, plan.machine)
    assert other.asked == 1
    monkeypatch.setattr(module, "_code", lambda: "another memplan")
    known(plan.step, plan.budget, plan.machine)
    assert policy.asked == 6


def test_no_file_is_trusted(asked: tuple[Counted, Plan, Path]) -> None:
    """Files cut short anywhere, of another kind, and such as would break the budget or the step."""
    policy, plan, folder = asked
    (path,) = folder.iterdir()
    whole, known = path.read_text(), Remembered(policy, folder)
    tight = pipeline.smallest_plan(plan.step, plan.machine, "eager", plan.budget).peak
    for text in [whole[:n] for n in range(0, len(whole), 37)] + ["[]", whole.replace("Answer", "Step"), "\0"]:
        before = policy.asked
        path.write_text(text)
        assert known(plan.step, plan.budget, plan.machine) == Greedy()(plan.step, plan.budget, plan.machine)
        assert policy.asked == before + 1 and path.read_text() == whole  # and it is mended
    path.write_bytes(b"\xff\xfe")
    known(plan.step, plan.budget, plan.machine)
    assert path.read_text() == whole
    least = Budget(tight)
    small = known(plan.step, least, plan.machine)
    (other,) = set(folder.iterdir()) - {path}
    everything = module.Answer(tuple((t, Keep()) for t in sorted(plan.step.read_in_backward)))
    for wrong in (everything, module.Answer(((10**6, Recompute()),)), module.Answer(((0, Recompute()),))):
        other.write_text(module.to_json(wrong))
        assert known(plan.step, least, plan.machine) == small


def test_what_does_not_fit_is_not_kept(plan: Plan, tmp_path: Path) -> None:
    Remembered(Counted(), tmp_path)(plan.step, Budget(1), plan.machine)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "torch.memplan"):
        made = Remembered(Counted(), tmp_path / "file" / "below")(plan.step, plan.budget, plan.machine)
    assert made == Greedy()(plan.step, plan.budget, plan.machine)
    assert "MEMPLAN_CACHE=0" in caplog.text


def test_an_error_of_the_policy_passes_through(plan: Plan, tmp_path: Path) -> None:
    def wrong(*_: object) -> Decisions:
        raise MemplanError("no")

    with pytest.raises(MemplanError, match="no"):
        Remembered(wrong, tmp_path)(plan.step, plan.budget, plan.machine)
    assert not list(tmp_path.iterdir())


def test_the_oldest_go(asked: tuple[Counted, Plan, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, plan, folder = asked
    monkeypatch.setattr(module, "KEPT", 3)
    (first,) = folder.iterdir()
    for k in range(5):
        os.utime(first, (2**31 + k, 2**31 + k))  # it is asked for again and again
        Remembered(policy, folder)(plan.step, dataclasses.replace(plan.budget, bytes=2**40 + k), plan.machine)
    assert len(list(folder.iterdir())) == 3 and first.exists()


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    assert remembered("optimal") == Remembered(Optimal(), tmp_path) == remembered(Optimal())
    assert remembered("greedy") == "greedy"  # as fast as reading a file
    monkeypatch.setenv("MEMPLAN_CACHE", "0")
    assert remembered("optimal") == "optimal"
    monkeypatch.delenv("MEMPLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered("optimal") == Remembered(Optimal(), tmp_path / "memplan")
    assert policies.name_of(remembered("optimal")) == "optimal"
