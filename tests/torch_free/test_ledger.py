"""The ledger's rules, one by one, over tenants that are numbers."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from memplan import memory
from memplan.errors import MemplanError
from memplan.runtime.ledger import Ledger, Restored


class Device:
    """Bytes that are in use; tenants take and give them. `calls`, in order."""

    def __init__(self) -> None:
        self.beside, self.calls = 1000, list[str]()
        self.tenants: dict[str, Tenant] = {}

    def used(self) -> int:
        self.calls.append("confirm")
        return self.beside + sum(t.has for t in self.tenants.values())


class Tenant:
    def __init__(
        self, device: Device, tag: str, size: int, restored: Restored = "nothing", there: bool = False
    ) -> None:
        self.device, self.tag, self.size, self.restored = device, tag, size, restored
        self.has = self.resident = size if there else 0
        self.fails: dict[str, Exception] = {}  # by "release" and "restore"
        self.holds_on = self.stays = False  # the memory is not free; and it says so
        device.tenants[tag] = self

    def release(self) -> int:
        return self._move("release", 0)

    def restore(self) -> int:
        return self._move("restore", self.size)

    def _move(self, what: str, to: int) -> int:
        self.device.calls.append(f"{what} {self.tag}")
        if what in self.fails:
            raise self.fails[what]
        to = self.size if self.stays else to
        self.resident = to
        self.has = self.size if self.holds_on else to
        return self.size if self.restored == "copy" else 0


Make = Callable[..., Ledger]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def make(device: Device, tmp_path: Path) -> Make:
    def make(budget: str | int = 100, **how) -> Ledger:
        how = {"measure": device.used, "tolerance": 1, "folder": tmp_path} | how
        return Ledger(budget, **how)

    return make


@pytest.fixture
def ledger(make: Make, device: Device) -> Ledger:
    """weights 20 always, kv_cache 70 in rollout, optimizer 60 in train."""
    made = make()
    made.lease("weights", Tenant(device, "weights", 20, "copy", there=True), 20, ("rollout", "score", "train"))
    made.lease("kv_cache", Tenant(device, "kv_cache", 70, "recompute"), 70, ("rollout",))
    made.lease("optimizer", Tenant(device, "optimizer", 60, "copy"), 60, ("train",))
    device.calls.clear()
    return made


def test_printed_it_says_who_has_what(ledger: Ledger) -> None:
    def lines() -> list[str]:
        return [" ".join(line.split()) for line in str(ledger).splitlines()]

    assert lines()[0] == "ledger of 100 B on cpu, 80 B free; no phase is set up"
    with ledger.phase("train"):
        assert lines() == [
            "ledger of 100 B on cpu, 20 B free; in phase train",
            "weights 20 B resident rollout, score, train",
            "kv_cache 70 B dropped rollout",
            "optimizer 60 B resident train",
        ]
    assert lines()[0].endswith("set up for phase train")


def states(ledger: Ledger) -> dict[str, str]:
    return {tag: lease.state for tag, lease in ledger.leases.items()}


def refused(call: Callable[[], object]) -> str:
    """The first line of what is said."""
    with pytest.raises(MemplanError) as error:
        call()
    return str(error.value).splitlines()[0]


def enter(ledger: Ledger, *names: str) -> None:
    for name in names:
        with ledger.phase(name):
            pass


def test_others_leave_before_anybody_comes(ledger: Ledger, device: Device) -> None:
    enter(ledger, "rollout")
    assert states(ledger) == {"weights": "resident", "kv_cache": "resident", "optimizer": "dropped"}
    device.calls.clear()
    enter(ledger, "train")
    assert device.calls == ["confirm", "release kv_cache", "confirm", "restore optimizer", "confirm"]
    assert states(ledger) == {"weights": "resident", "kv_cache": "dropped", "optimizer": "resident"}
    enter(ledger, "score")
    assert states(ledger) == {"weights": "resident", "kv_cache": "dropped", "optimizer": "backed up"}
    device.calls.clear()
    enter(ledger, "score")
    assert set(device.calls) == {"confirm"}


def test_what_happened_is_recorded(ledger: Ledger, device: Device) -> None:
    enter(ledger, "train", "rollout")
    device.tenants["optimizer"].fails["restore"] = ValueError("gone")
    refused(lambda: enter(ledger, "train"))
    seen = [(t.before, t.wanted, t.after, t.moved, bool(t.failed)) for t in ledger.transitions]
    assert seen == [
        ("", "train", "train", 60, False),
        ("train", "rollout", "rollout", 60, False),
        ("rollout", "train", "rollout", 60, True),
    ]
    assert all(0 < t.seconds < 1 for t in ledger.transitions)
    assert ledger.transitions[-1].failed == "MemplanError: 'optimizer', 60 B, has not come back: ValueError: gone"


def test_who_does_not_come_back_is_named_and_the_phase_before_is_back(ledger: Ledger, device: Device) -> None:
    enter(ledger, "rollout")
    device.tenants["optimizer"].fails["restore"] = ValueError("gone")
    assert refused(lambda: enter(ledger, "train")) == (
        "phase 'train' is not entered: 'optimizer', 60 B, has not come back: ValueError: gone; 'rollout' is as it was"
    )


def test_the_way_back_takes_what_has_half_come(ledger: Ledger, device: Device) -> None:
    """Restored for a phase that then fails: it leaves before the others return."""
    late = Tenant(device, "late", 10)
    ledger.lease("late", late, 10, ("train",))
    enter(ledger, "rollout")
    late.fails["restore"] = ValueError("gone")
    device.calls.clear()
    with contextlib.suppress(MemplanError):
        enter(ledger, "train")
    at = device.calls.index
    assert at("restore optimizer") < at("restore late") < at("release optimizer") < at("release late")


def test_who_dies_is_in_the_way_until_its_lease_ends(ledger: Ledger, device: Device) -> None:
    enter(ledger, "rollout")
    device.tenants["kv_cache"].fails = dict.fromkeys(("release", "restore"), RuntimeError("engine died"))
    for _ in range(2):
        says = refused(lambda: enter(ledger, "train"))
        assert "'kv_cache', 70 B, has not left: RuntimeError: engine died; no phase is set up" in says
    assert states(ledger)["kv_cache"] == "between" and ledger.at == ""
    ledger.end("kv_cache")
    assert "'cpu' says that 90 B are in use, and leases that it is 20 B" in refused(lambda: enter(ledger, "train"))
    del device.tenants["kv_cache"]  # its process is gone
    enter(ledger, "train")


def test_memory_that_is_not_free_is_not_given_again(ledger: Ledger, device: Device) -> None:
    """A tenant that says it has left, and has not."""
    enter(ledger, "rollout")
    device.tenants["kv_cache"].holds_on = True
    device.calls.clear()
    says = refused(lambda: enter(ledger, "train"))
    assert "'cpu' says that 90 B are in use, and leases that it is 20 B" in says
    assert device.calls == ["confirm", "release kv_cache", "confirm", "confirm"]  # nobody came, not even back
    device.tenants["kv_cache"].has = 0
    device.tenants["kv_cache"].holds_on = False
    enter(ledger, "train")


def test_no_room_for_who_was_there_while_somebody_has_half_come(ledger: Ledger, device: Device) -> None:
    """kv_cache comes, which leaves no room for the optimizer; another one fails, and kv_cache cannot leave again."""
    ledger.lease("late", Tenant(device, "late", 10), 10, ("rollout",))
    enter(ledger, "train")
    device.tenants["late"].fails["restore"] = ValueError("gone")
    device.tenants["kv_cache"].fails["release"] = ValueError("stuck")
    device.calls.clear()
    assert "'late', 10 B, has not come back: ValueError: gone; no phase" in refused(lambda: enter(ledger, "rollout"))
    assert states(ledger) == {"weights": "resident", "kv_cache": "between", "optimizer": "backed up", "late": "between"}
    assert "restore optimizer" not in device.calls
    ledger.end("kv_cache")
    del device.tenants["kv_cache"]
    enter(ledger, "train")


def test_who_says_that_it_has_left_is_looked_at(ledger: Ledger, device: Device) -> None:
    enter(ledger, "rollout")
    kv_cache = device.tenants["kv_cache"]
    kv_cache.stays = True
    assert "'kv_cache', 70 B, has not left: MemplanError: it says so, and 70 B of it are on the device" in refused(
        lambda: enter(ledger, "train")
    )
    assert ledger.at == "rollout"
    kv_cache.stays = False
    enter(ledger, "train")


def test_a_body_that_fails_ends_its_phase(ledger: Ledger) -> None:
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), ledger.phase("rollout"):
            raise error
    assert ledger.at == "rollout"
    enter(ledger, "train")


def test_one_phase_at_a_time(ledger: Ledger) -> None:
    says = []
    with ledger.phase("rollout"):
        says.append(refused(lambda: enter(ledger, "train")))
        other = threading.Thread(target=lambda: says.append(refused(lambda: enter(ledger, "score"))))
        other.start()
        other.join()
        assert ledger.at == "rollout"
        assert "make leases between phases" in refused(lambda: ledger.lease("x", None, 1, ("train",)))
        says.append(refused(lambda: enter(ledger, "rollout")))  # a refusal ends nobody's phase
    assert all("is asked for inside phase 'rollout': end that one first" in line for line in says) and len(says) == 3
    enter(ledger, "train")


def test_what_it_leaves_for_a_plan(ledger: Ledger, device: Device) -> None:
    ledger.lease("reference", Tenant(device, "reference", 15), 15, ("score", "train"))
    budget = ledger.budget_for("train", own=("weights", "optimizer"))
    assert (budget.bytes, budget.others, budget.available) == (100, (("reference", 15),), 85)
    assert ledger.budget_for("rollout", own=()).others == (("weights", 20), ("kv_cache", 70))
    assert "phase 'train' needs no 'kv_cache': own has tags of its leases" in refused(
        lambda: ledger.budget_for("train", own=("kv_cache",))
    )
    assert ledger.budget_for("train", own="weights").available == 25


# ---- behind its back


@pytest.mark.parametrize("change", [30, -15])
def test_bytes_that_come_and_go_behind_its_back(change: int, ledger: Ledger, device: Device) -> None:
    enter(ledger, "rollout")
    device.beside += change
    says = refused(lambda: enter(ledger, "train"))
    assert f"'cpu' says that {90 + change} B are in use, and leases that it is 90 B: something came or went" in says
    assert "'rollout' is as it was" in says and ledger.at == "rollout"
    device.beside -= change
    enter(ledger, "train")
    device.beside += change
    ledger.accept()
    enter(ledger, "rollout")


def test_a_tenant_that_came_back_by_itself(ledger: Ledger, device: Device) -> None:
    enter(ledger, "train")
    kv_cache = device.tenants["kv_cache"]
    kv_cache.has = kv_cache.resident = 30
    says = refused(lambda: enter(ledger, "score"))
    assert "'kv_cache' has 30 B on the device, and its lease, dropped, has 0 B" in says
    ledger.accept()
    enter(ledger, "score")
    assert kv_cache.has == 0


def test_a_tenant_that_grew(ledger: Ledger, device: Device) -> None:
    enter(ledger, "train")
    optimizer = device.tenants["optimizer"]
    optimizer.has = optimizer.resident = 61
    says = refused(lambda: enter(ledger, "score"))
    assert "'optimizer' has 61 B on the device, and its lease, resident, has 60 B" in says


def test_what_is_there_at_a_lease_is_not_behind_its_back(ledger: Ledger, device: Device) -> None:
    device.beside += 50
    ledger.lease("late", Tenant(device, "late", 5, there=True), 5, ("score",))
    enter(ledger, "score", "train")


# ---- bad input


def test_a_budget_smaller_than_what_must_always_be_there(make: Make, device: Device) -> None:
    ledger = make(50)
    always = ("rollout", "score", "train")
    ledger.lease("weights", Tenant(device, "weights", 20), 20, always)
    assert refused(lambda: ledger.lease("engine", Tenant(device, "engine", 40), 40, always)) == (
        "budget 50 B is smaller than what must always be resident, 60 B: weights 20 B, engine 40 B"
    )
    assert refused(lambda: ledger.lease("kv_cache", Tenant(device, "kv_cache", 40), 40, ("rollout",))) == (
        "budget 50 B is smaller than what phase 'rollout' needs, 60 B: weights 20 B, kv_cache 40 B"
    )
    assert set(ledger.leases) == {"weights"}


def test_bad_leases(ledger: Ledger, device: Device) -> None:
    new = Tenant(device, "new", 5)
    assert "no phase 'rolout': there are rollout, score, train; did you mean 'rollout'?" in refused(
        lambda: ledger.lease("new", new, 5, ("rolout",))  # type: ignore[arg-type]
    )
    assert "no phase 'trian': there are" in refused(lambda: enter(ledger, "trian"))
    assert "no phase needs 'new'" in refused(lambda: ledger.lease("new", new, 5, ()))
    assert "'weights' has a lease already, of 20 B" in refused(lambda: ledger.lease("weights", new, 5, ("train",)))
    assert "'5' has no unit" in refused(lambda: ledger.lease("new", new, "5", ("train",)))
    assert "there are ['kv_cache', 'optimizer', 'weights']; did you mean 'weights'?" in refused(
        lambda: ledger.end("weight")
    )
    enter(ledger, "rollout")
    there = Tenant(device, "there", 30, there=True)
    assert "'there' has 30 B on the device, more than its lease of 20 B" in refused(
        lambda: ledger.lease("there", there, 20, ("score",))
    )
    assert "'there' is on the device, and its 30 B have no room beside the leases that are there, 10 B" in refused(
        lambda: ledger.lease("there", there, 30, ("score",))
    )
    assert ledger.lease("new", new, "5 B", "score").phases == {"score"}  # type: ignore[arg-type]
    assert ledger.needed("score") == {"weights": 20, "new": 5}


def test_bad_ledgers(make: Make, tmp_path: Path) -> None:
    assert "nobody says how much of 'cuda:0' is in use" in refused(lambda: make(device="cuda:0", measure=None))
    assert "'24' has no unit" in refused(lambda: make("24"))
    assert "cannot open the lock file" in refused(lambda: make(folder=tmp_path / "none"))


# ---- one trainer for each device


def test_two_ledgers_of_one_device(make: Make) -> None:

    first = make()
    says = refused(make)
    assert f"'cpu' has a ledger already, of process {os.getpid()} (" in says and "one trainer has a device" in says
    make(device="cuda:0")  # another
    first.close()
    make()


HOLD = """
import os, sys
from memplan.runtime.ledger import Ledger
ledger = Ledger("1GB", folder=sys.argv[1])
worker = os.fork() if len(sys.argv) > 2 else 0
if worker == 0:  # the last one that there is
    print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("forks", [False, True])
def test_a_process_that_is_killed_lets_go(forks: bool, make: Make, tmp_path: Path) -> None:
    """Even where a worker that it forked lives on."""
    command = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path), *(["fork"] if forks else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline().startswith("held")
        says = refused(make)
        assert f"of process {other.pid} (" in says and sys.executable in says
        other.kill()
        other.wait()
        make()


def test_the_memory_of_this_process() -> None:
    before = memory.resident()
    held = bytearray(b"1") * 2**26
    assert abs(memory.resident() - before - len(held)) < 2**22
    del held
    assert abs(memory.resident() - before) < 2**22
