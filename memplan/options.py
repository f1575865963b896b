"""Options: everything a person can ask of one compile, read once and refused early.

In: the mapping given to torch.compile(options=...) and the environment. Out: a frozen Options.
A budget stays as written until the machine is known; read_budget then makes it a Budget in bytes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from memplan import memory
from memplan.errors import MemplanError, did_you_mean
from memplan.ir import COST_MODELS, Budget, CostModel, Machine, Plan
from memplan.machines import machine
from memplan.units import human
from memplan.units import parse_bytes as parse_bytes

# Held back on CUDA because the caching allocator cannot use every hole it makes.
# An assumption, to be replaced by a measured value: reserved minus allocated bytes at the peak of a planned step.
FRAGMENTATION_RESERVE = 0.02

_ENVIRONMENT = {"budget": "MEMPLAN_BUDGET", "policy": "MEMPLAN_POLICY", "out": "MEMPLAN_OUT"}
_TAKEN = ("custom_partitioner_fn", "joint_custom_post_pass")  # of Inductor's config
_OF = {"budget": "the device", "host_budget": "the host"}
_HEADS = ("rows", "vocab", "vectors", "auto")  # ways of linear_logprob; "auto": of its choice
_LIMITS = ("batch", "tokens")  # the first and the second dimension of inputs


@dataclass(frozen=True)
class Options:
    """What one compile was asked to do.

    `budget`: "24GB", "50%", a fraction as a float, bytes as an int; a Budget, of which bytes and others count, as a
    ledger makes it; None: the whole device.
    `host_budget`: the most that may be off the device in the host's memory, written as a budget is, 0 for none; None:
    half of the host's free memory, and none where the device has no memory of its own.
    `policy`: a policy's name, or the policy itself. `machine`: None: the device that the step is on; else a name, a
    machine file, or the Machine itself.
    `inner`: the compiler that runs the planned graphs, with `inductor` passed to Inductor's config.
    `out`: the file to which the plan is saved, .json, .html or another of report.save's, or a function that is called
    with each plan that is adopted, list.append say.
    `optimizer`: what will update the parameters, so that its states count before they are there: torch.optim's name of
    it, or a function that makes it from parameters, or itself.
    `tiles`: the most rows of a slice, for every region that can run in slices; {"lm_head": 256}, for those in a module
    or at a source line ("model.py:210"); {"lm_head": "vocab"}: linear_logprob computes the log-probs there, by "rows",
    "vocab" or, of a frozen head, "vectors"; "auto": as the fastest plan that fits has it; None: no slices.
    `limits`: the largest sizes to come, {"batch": 8, "tokens": 20480}, for which a step of varying sizes is planned.
    `cost`: the model that prices ops (passes/pricing.py); None: "fused" under Inductor, "roofline-v1" under eager.
    """

    budget: str | int | float | Budget | None = None
    policy: Any = "optimal"
    machine: Machine | None = None
    inner: Literal["inductor", "eager"] = "inductor"
    inductor: tuple[tuple[str, Any], ...] = ()
    out: str | Callable[[Plan], object] | None = None
    limits: tuple[tuple[str, int], ...] = ()
    optimizer: Any = None
    tiles: int | tuple[tuple[str, int | str], ...] | Literal["auto"] | None = None
    host_budget: str | int | float | None = None
    cost: CostModel | None = None

    @property
    def file(self) -> str | None:
        """Where the plan is saved."""
        return self.out if isinstance(self.out, str) else None

    @property
    def cost_model(self) -> CostModel:
        """The model that prices ops."""
        return self.cost or ("fused" if self.inner == "inductor" else "roofline-v1")

    @staticmethod
    def read(given: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None) -> Options:
        """Options as given; what is not given comes from MEMPLAN_BUDGET, MEMPLAN_POLICY and MEMPLAN_OUT."""
        given = given or {}
        environ = os.environ if environ is None else environ
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise MemplanError(f"no option {name!r}: there are {', '.join(known)}{did_you_mean(str(name), known)}")
        from_environment = {name: environ[key] for name, key in _ENVIRONMENT.items() if environ.get(key)}
        values = from_environment | {name: value for name, value in given.items() if value is not None}
        if not isinstance(values.get("budget", Budget(0)), Budget):
            _amount(values["budget"])
        if "host_budget" in values:
            _host_amount(values["host_budget"])
        if "machine" in values:
            values["machine"] = machine(values["machine"])
        policy = values.get("policy", "optimal")
        if not (isinstance(policy, str) or callable(policy)):
            raise MemplanError(
                f"option 'policy' is {policy!r}: give a policy's name, or an object called with (step, budget, machine)"
            )
        optimizer = values.get("optimizer")
        if not (optimizer is None or isinstance(optimizer, str) or callable(optimizer) or _is_optimizer(optimizer)):
            raise MemplanError(
                f"option 'optimizer' is {optimizer!r}: give torch.optim's name of it, the optimizer itself, or a "
                "function that makes it from parameters"
            )
        if "tiles" in values:
            values["tiles"] = _tiles(values["tiles"])
        inner = values.get("inner", "inductor")
        if inner not in ("inductor", "eager"):
            raise MemplanError(f"option 'inner' is {inner!r}: it is 'inductor' or 'eager'")
        if "cost" in values:
            _check_cost(values["cost"], inner)
        inductor = values.get("inductor", {})
        if not isinstance(inductor, Mapping):
            raise MemplanError(f"option 'inductor' is {inductor!r}: give a dict of torch._inductor.config's names")
        if taken := sorted(set(inductor) & set(_TAKEN)):
            raise MemplanError(f"option 'inductor' has {taken[0]!r}, which is where memplan plans; leave it out")
        if inductor and inner == "eager":
            raise MemplanError("option 'inductor' has no effect with inner='eager'; leave one of them out")
        if "out" in values and not callable(values["out"]):
            if not isinstance(values["out"], (str, Path)):
                raise MemplanError(
                    f"option 'out' is {values['out']!r}: give the path of a .json or .html file or a function of a plan"
                )
            values["out"] = str(values["out"])
        limits = _sizes(values.get("limits", {}))
        return Options(**values | {"inductor": tuple(inductor.items()), "limits": limits})


def _check_cost(cost: object, inner: str) -> None:
    if cost not in COST_MODELS:
        hint = did_you_mean(str(cost), COST_MODELS)
        raise MemplanError(f"option 'cost' is {cost!r}: it is {' or '.join(map(repr, COST_MODELS))}{hint}")
    if cost == "fused" and inner == "eager":
        raise MemplanError("option 'cost' is 'fused' with inner='eager', which fuses nothing: leave one of them out")


def _tiles(given: object) -> Any:
    """Rows of a slice, "auto", or what places are given as pairs."""
    pins = given if isinstance(given, Mapping) and given else {"": given}
    if given == "auto":
        return given
    for place, rows in pins.items():
        if place and isinstance(place, str) and rows in _HEADS:
            continue
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 2 or not isinstance(place, str):
            where = f" for {place!r}" if place else ""
            raise MemplanError(
                f"option 'tiles' is {rows!r}{where}: give the most rows of a slice, an int of at least 2 (a slice of "
                "one row would take other kernels), {'lm_head': 256} for some places, or 'auto'; leave it out for no "
                f"slices; of an LM head's place give {', '.join(map(repr, _HEADS))} for linear_logprob"
            )
    return tuple(pins.items()) if isinstance(given, Mapping) else given


def _is_optimizer(value: object) -> bool:
    return hasattr(value, "param_groups") and hasattr(value, "state")


def _sizes(limits: object) -> tuple[tuple[str, int], ...]:
    if not isinstance(limits, Mapping):
        raise MemplanError(f"option 'limits' is {limits!r}: give a dict of largest sizes, like {{\"tokens\": 20480}}")
    for name, size in limits.items():
        if name not in _LIMITS:
            raise MemplanError(
                f"limits has {name!r}: there are {' and '.join(_LIMITS)}, the first and the second dimension of "
                f"inputs{did_you_mean(str(name), _LIMITS)}"
            )
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise MemplanError(f"limits[{name!r}] is {size!r}: give the largest size to come, an int of at least 1")
    return tuple(limits.items())


def read_budget(
    value: str | int | float | Budget | None,
    machine: Machine,
    device_total: int | None = None,
    host: str | int | float | None = None,
) -> Budget:
    """The budget in bytes: "24GB", "50%" or 0.5 of the device, an int of bytes, a Budget; None is the whole device.

    `device_total`: the device's memory where it is known better than the machine's table entry.
    `host`: the host budget, likewise of this host's free memory; None: half of it, and nothing of a unified machine's.
    What is larger than the device is clamped, and the note says so.
    """
    total = machine.memory_bytes if device_total is None else device_total
    note = ""
    others, listener = (value.others, value.listener) if isinstance(value, Budget) else ((), 0)
    value = value.bytes if isinstance(value, Budget) else value
    if value is None:
        size, note = total, "the whole device"
    else:
        amount = _amount(value)
        size = amount if isinstance(amount, int) else int(amount * total)
        if size > total:
            size, note = total, f"clamped from {human(size)} to the device's {human(total)}"
    off = _host_bytes(host, machine)
    if machine.device == "cpu":  # counted in the allocator's own bytes, so nothing else is in the way
        return Budget(size, note=note, host_bytes=off, others=others, listener=listener)
    return Budget(size, machine.context_bytes, FRAGMENTATION_RESERVE, note, off, others, listener)


def _host_bytes(given: str | int | float | None, machine: Machine) -> int:
    if given is None:
        return 0 if machine.unified else memory.available() // 2
    amount = _host_amount(given)
    return amount if isinstance(amount, int) else int(amount * memory.available())


def _host_amount(given: object) -> int | float:
    """As of a budget, but that it may be nothing."""
    nothing = isinstance(given, (int, float, str)) and re.fullmatch(r"0+(\.0*)?\s*([A-Za-z]*B|%)?", str(given).strip())
    return 0 if nothing and not isinstance(given, bool) else _amount(given, "host_budget")


def _amount(value: object, name: str = "budget") -> int | float:
    """Bytes as an int, or a fraction of the memory in (0, 1] as a float."""
    if isinstance(value, float):
        return _fraction(value, name)
    if isinstance(value, str):
        text = value.strip()
        if text.endswith("%"):
            return _percent(text, name)
        if _is_fraction(text):
            raise MemplanError(f'{name} {value!r} has no unit; did you mean "{100 * float(text):g}%" of {_OF[name]}?')
    elif not isinstance(value, int) or isinstance(value, bool):
        raise MemplanError(f'{name} {value!r} is not an amount of memory: use "24GB", "50%", 0.5 or an int of bytes')
    try:
        return parse_bytes(value)
    except MemplanError as e:
        raise MemplanError(f"{name} {e}") from None


def _fraction(value: float, name: str) -> float:
    if 0 < value <= 1:
        return value
    guess = f'; did you mean "{value:g}GB"?' if 1 < value < math.inf else ""
    raise MemplanError(f"{name} {value!r}: a float is a fraction of {_OF[name]}'s memory, above 0 and at most 1{guess}")


def _percent(text: str, name: str) -> float:
    try:
        percent = float(text[:-1])
    except ValueError:
        percent = math.nan
    if not 0 < percent <= 100:
        raise MemplanError(f'{name} {text!r}: a percentage of {_OF[name]} is above 0 and at most 100, like "50%"')
    return percent / 100


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False
