"""Checkpoints of a training run: whole or not there at all, and of this run or refused.

In: a model, its optimizer, the number of steps done, and what the run was made of. Out: one file, from which a run that
was killed at any moment goes on, bit for bit as if it had not been; torch's generator is part of it.
What must hold: a file with the checkpoint's name is a whole one, whatever happens while the next is written; what it is
loaded into is what it was saved from.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import MemplanError

SCHEMA = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    made_of: Mapping[str, Any],
    kept: Any = None,
) -> None:
    """Write the checkpoint after `step` steps. made_of: what must be the same when it is loaded, plain values by name;
    kept: anything more that the run needs, of lists, dicts, numbers, text and tensors.

    It is written beside `path`, to the name with .part, which the next one overwrites, read again, and then renamed.
    Raises MemplanError where it cannot be written whole or not be read; the one that was there is whole then.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    document = {
        "memplan": "Checkpoint",
        "schema": SCHEMA,
        "step": step,
        "made_of": _made_of(made_of, model, optimizer),
        "kept": kept,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": _parameters(model, optimizer),
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    try:
        with open(part, "wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        _read(part)  # torch.save takes objects that a checkpoint may not hold
        os.replace(part, path)
    except (OSError, RuntimeError, AttributeError, TypeError, pickle.PicklingError, MemplanError) as e:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        there = f"the checkpoint that is there, {path.name}, is whole" if path.exists() else "there was none before"
        raise MemplanError(f"cannot write the checkpoint of step {step} to {str(path)!r}: {_why(e)}; {there}") from None


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    made_of: Mapping[str, Any],
) -> tuple[int, Any]:
    """Steps done, and `kept`; model, optimizer and torch's generator are as they were then. (0, None) without a file.

    Raises MemplanError for a file that is not a checkpoint, is of another model, or of a run made of something else,
    by name; model and optimizer are untouched then.
    """
    path = Path(path)
    if not path.exists():
        return 0, None
    found, ours = _read(path), _made_of(made_of, model, optimizer)
    for name in {**found["made_of"], **ours}:
        there, here = (values.get(name, "not given") for values in (found["made_of"], ours))
        if there != here:
            raise MemplanError(
                f"{str(path)!r} is of a run with {name}={there!r}, and this one has {name}={here!r}: go on with the "
                "same, or name another folder"
            )
    if differs := _differs(found["model"], model.state_dict()):
        raise MemplanError(f"{str(path)!r} is of another model: {differs}; go on with the same, or name another folder")
    if found["parameters"] != _parameters(model, optimizer):
        raise MemplanError(
            f"{str(path)!r} is of an optimizer with other parameters, or in another order: make it as then"
        )
    try:
        optimizer.load_state_dict(found["optimizer"])
    except ValueError as e:  # other groups of parameters
        raise MemplanError(f"{str(path)!r} is of another optimizer: {e}") from None
    model.load_state_dict(found["model"])
    torch.set_rng_state(found["generator"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(found["cuda_generators"][: torch.cuda.device_count()])
    return found["step"], found["kept"]


def _made_of(given: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": type(model).__name__, "optimizer": type(optimizer).__name__, **given}


def _read(path: Path) -> dict[str, Any]:
    try:
        if not zipfile.is_zipfile(path):
            raise MemplanError(f"{str(path)!r} is no checkpoint, or was cut short: remove it, or name another folder")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise MemplanError(f"cannot read {str(path)!r}: {e.strerror}") from None
    except (RuntimeError, pickle.UnpicklingError) as e:
        kinds = "lists, dicts, tuples, numbers, text and tensors"
        raise MemplanError(f"{str(path)!r} is damaged, or holds other objects than {kinds}: {_refused(e)}") from None
    if not isinstance(found, dict) or found.get("memplan") != "Checkpoint":
        raise MemplanError(f"{str(path)!r} was not written by save_checkpoint: remove it, or name another folder")
    if found["schema"] != SCHEMA:
        raise MemplanError(f"{str(path)!r} has schema {found['schema']}, and this memplan reads {SCHEMA}")
    return found


def _refused(error: Exception) -> str:
    """The object that torch.load does not take, as far as it says so."""
    found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
    return found[1] if found else str(error).splitlines()[0][:100]


def _parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of what each group of the optimizer has."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names.get(id(p), "not the model's") for p in group["params"]] for group in optimizer.param_groups]


def _differs(there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> str | None:
    """The first of the model's tensors that is another."""
    for name in {**there, **here}:
        if name not in there or name not in here:
            return f"{name} is only in {'the file' if name in there else 'this one'}"
        a, b = there[name], here[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name} is {_form(a)} there and {_form(b)} here"
    return None


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__cause__ or error.__context__
    return _why(cause) if isinstance(cause, OSError) else str(error).splitlines()[0]
