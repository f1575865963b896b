"""Steps, plans, timelines and machines as JSON: {"memplan": "Plan", "schema": 3, "value": {...}}.

Fields are written by name, unions by class name. What cannot be read whole is refused with a MemplanError
that names the file; files are written to a temporary name and renamed, so none is ever half-written.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
import typing
from pathlib import Path
from typing import Any, Literal

from memplan.errors import MemplanError
from memplan.ir import Decision, Keep, Offload, Plan, Recompute, Step, Timeline
from memplan.sound import impossible, unsound

SCHEMA = 3  # raised when files written before can no longer be read

_DECISIONS: dict[str, type] = {kind.__name__: kind for kind in (Keep, Recompute, Offload)}


def to_json(value: Any) -> str:
    """The value, a dataclass, as JSON text. Fields at their default are left out."""
    return json.dumps({"memplan": type(value).__name__, "schema": SCHEMA, "value": _encode(value)}, allow_nan=False)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        made = {f.name: _encode(v) for f, v in fields if f.default is dataclasses.MISSING or v != f.default}
        return {"is": type(value).__name__} | made if isinstance(value, (Keep, Recompute, Offload)) else made
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    return value


T = typing.TypeVar("T")  # a dataclass


def from_json(text: str, kind: type[T], name: str = "the text") -> T:
    """Read what `to_json` wrote. Raises MemplanError naming `name` when it is corrupt, foreign or of another schema."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise MemplanError(f"{name} is not JSON ({e}); was it cut short, or is it another kind of file?") from None
    if not isinstance(document, dict) or "memplan" not in document:
        raise MemplanError(f"{name} was not written by memplan: it has no 'memplan' entry")
    if document.get("schema") != SCHEMA:
        raise MemplanError(
            f"{name} has schema {document.get('schema')!r}, and this memplan reads schema {SCHEMA}: write it again, or "
            "read it with the memplan that wrote it"
        )
    if document["memplan"] != kind.__name__:
        raise MemplanError(f"{name} holds a {document['memplan']}, not a {kind.__name__}")
    try:
        value = typing.cast(T, _decode(document.get("value"), kind))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as e:
        raise MemplanError(f"{name} is damaged: {e}") from None
    step = value if isinstance(value, Step) else value.step if isinstance(value, Plan) else None
    if step is not None and (wrong := unsound(step)):
        raise MemplanError(f"{name} holds a step that cannot run: {wrong}")
    if isinstance(value, (Plan, Timeline)) and (wrong := impossible(value)):
        raise MemplanError(f"{name} is damaged: {wrong}")
    return value


def load(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read a saved Step, Plan, Timeline or Machine."""
    try:
        text = Path(path).read_text()
    except OSError as e:
        raise MemplanError(f"cannot read {os.fspath(path)!r}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise MemplanError(f"cannot read {os.fspath(path)!r}: it is not text, so not a file of memplan") from None
    return from_json(text, kind, repr(os.fspath(path)))


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file whole or not at all: to a temporary name beside it, then renamed."""
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as e:
        raise MemplanError(
            f"cannot write {str(target)!r}: {e.strerror}; name a folder that exists and is writable"
        ) from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as e:
        os.unlink(temporary)
        raise MemplanError(f"cannot write {str(target)!r}: {e.strerror}") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _required(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING)


def _decode(value: Any, hint: Any) -> Any:
    if hint == Decision:
        return _decode({k: v for k, v in value.items() if k != "is"}, _DECISIONS[value["is"]])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"expected the fields of {hint.__name__}, found {value!r:.60}")
        unknown = set(value) - set(_hints(hint))
        if unknown:
            raise ValueError(f"{hint.__name__} has no field {sorted(unknown)[0]!r}")
        missing = _required(hint) - set(value)
        if missing:
            raise ValueError(f"{hint.__name__} lacks its field {sorted(missing)[0]!r}")
        return hint(**{name: _decode(v, _hints(hint)[name]) for name, v in value.items()})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"expected a list, found {value!r:.60}")
        if arguments[-1] is Ellipsis:
            return tuple(_decode(v, arguments[0]) for v in value)
        return tuple(_decode(v, h) for v, h in zip(value, arguments, strict=True))
    if type(None) in arguments:
        return None if value is None else _decode(value, arguments[0])
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is not one of {arguments}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"expected {hint.__name__}, found {value!r:.60}")
    return value
