"""The device table: machines.json as Machine values; and machine files (file.py).

In: a name, in any case, or the path of a file. Out: a Machine. Rates of the table are the vendors' dense peaks (no
sparsity) in FLOP/s, float32 without TF32; a dtype that is absent is not supported in hardware. `memory_bytes` is the
total that torch reports, which is less than the name of the device says. `host_bandwidth` is the link's rate in one
direction. The entry "cuda" holds for every CUDA device: a context of about 0.5 GB, and the workspace that flash
attention's backward allocates on the device, in multiples of its output, which a trace made on CPU cannot see.
"""

import functools
import json
import os
from pathlib import Path
from types import MappingProxyType

from memplan.errors import MemplanError, did_you_mean
from memplan.ir import Machine
from memplan.machines import file

__all__ = ["machine", "machines"]


@functools.cache
def machines() -> MappingProxyType[str, Machine]:
    """Every machine of the table, by name."""
    table = json.loads(Path(__file__).with_name("machines.json").read_text())
    entries = ((table["cuda"] if entry["device"] == "cuda" else {}) | entry for entry in table["machines"])
    return MappingProxyType({entry["name"]: _machine(**entry) for entry in entries})


def machine(which: str | os.PathLike[str] | Machine) -> Machine:
    """The machine of that name, or of that file; a Machine is returned as it is."""
    if isinstance(which, Machine):
        return which
    known = machines()
    if isinstance(which, str) and which.strip().lower() in known:
        return known[which.strip().lower()]
    if isinstance(which, os.PathLike) or (isinstance(which, str) and _is_path(which)):
        return file.load(which, known)
    guess = did_you_mean(which.lower(), known) if isinstance(which, str) else ""
    raise MemplanError(
        f"no machine {which!r}: the table has {', '.join(known)}; or give the path of a file of `memplan calibrate`, "
        f"or a memplan.Machine{guess}"
    )


def _is_path(text: str) -> bool:
    return text.endswith(".json") or os.sep in text or Path(text).exists()


def _machine(
    *, source: str, flops: dict[str, float], workspace_rules: dict[str, float] | None = None, **rest: object
) -> Machine:
    """An entry of the table; `source` is for readers of the table."""
    rules = tuple((workspace_rules or {}).items())
    return Machine(flops=tuple(flops.items()), workspace_rules=rules, **rest)  # type: ignore[arg-type]
