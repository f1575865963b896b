"""The memplan command: one function per subcommand, whose docstring is its help.

Exit codes: 0 done, 2 bad input, 3 the step does not fit its budget (so that `memplan plan` can gate a job).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

import memplan
from memplan import report, serialize
from memplan.errors import DoesNotFit, MemplanError, did_you_mean
from memplan.ir import Plan, Timeline
from memplan.options import Options


def demo(arguments: argparse.Namespace) -> int:
    """Train a small GRPO step unplanned and planned, and show what the plan saves."""
    importlib.import_module("memplan.demo").run(inner=arguments.inner, out=arguments.out)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Plan a train step without running it; exits 3 when it does not fit.

    FILE.py:make_step names a function without arguments that returns (step, batch). With --largest: how large that
    batch may become; exits 3 when not even the smallest fits.
    """
    given = {
        name: getattr(arguments, name)
        for name in ("budget", "host_budget", "machine", "policy", "inner", "out", "optimizer", "tiles")
    }
    options = Options.read(given)
    _check_out(Plan, options.out, arguments.force or arguments.out is None)  # MEMPLAN_OUT is for runs that plan again
    step, batch = _make_step(arguments.target)
    names = ("budget", "host_budget", "machine", "policy", "inner", "optimizer")
    asked = {name: getattr(options, name) for name in names} | {"tiles": arguments.tiles}
    if arguments.largest:
        from memplan.api import find_largest  # which is not torch-free

        with _progress(f"planning {arguments.target} at many sizes"):
            found = find_largest(step, batch, arguments.largest, **asked)
        made = found.plan
        print(found.to_json() if arguments.json else found)
    else:
        with _progress(f"planning {arguments.target}"):
            made = memplan.plan(step, batch, **asked)
        print(serialize.to_json(made) if arguments.json else made)
    if options.out:
        report.save(made, options.out)
    return 0 if made.fits else 3


def timeline(arguments: argparse.Namespace) -> int:
    """Print a saved plan or timeline, and convert it with -o."""
    _check_out(Timeline, arguments.out, arguments.force)
    with _progress(f"reading {arguments.path}"):
        value = _load(arguments.path)
        if arguments.out:
            report.save(value, arguments.out)
    text = report.table(value) if isinstance(value, Plan) else report.summary(value)
    print(serialize.to_json(value) if arguments.json else text)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare two saved plans or timelines, and draw both with -o."""
    _check_out(report.Comparison, arguments.out, arguments.force)
    with _progress(f"comparing {arguments.a} and {arguments.b}"):
        found = report.compare(_load(arguments.a), _load(arguments.b))
        if arguments.out:
            found.save(arguments.out)
    print(found.to_json() if arguments.json else found)
    return 0


def record_step(arguments: argparse.Namespace) -> int:
    """Run a train step once to warm up, record it the second time, and say where its bytes were.

    FILE.py:make_step names a function without arguments that returns (step, batch). A loss that step(batch) returns is
    run backward, if that is still to be done.
    """
    _check_out(Timeline, arguments.out, arguments.force)
    step, batch = _make_step(arguments.target)

    def run() -> None:
        loss = step(batch)
        if getattr(loss, "requires_grad", False):
            loss.backward()

    with _progress(f"warming up {arguments.target}"):
        run()
    with _progress(f"recording {arguments.target}"):
        with memplan.record(arguments.device, lines=True) as seen:
            run()
        found = dataclasses.replace(seen.timeline, title=f"{arguments.target}, {seen.timeline.title}")
        if arguments.out:
            report.save(found, arguments.out)
    print(serialize.to_json(found) if arguments.json else report.summary(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except DoesNotFit as e:
        print(f"memplan: {e}", file=sys.stderr)
        return 3
    except MemplanError as e:
        print(f"memplan: {e}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("memplan", description=(memplan.__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=memplan.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        text = inspect.getdoc(command) or ""
        out = commands.add_parser(command.__name__.replace("_", "-"), help=text.split("\n")[0], description=text)
        out.set_defaults(command=command)
        return out

    command = add(demo)
    command.add_argument("--inner", choices=("eager", "inductor"), default="eager", help="what runs the graphs")
    command.add_argument("-o", "--out", metavar="DIR", type=Path, default=Path(), help="folder for what it writes")

    command = add(plan)
    command.add_argument("target", metavar="FILE.py:make_step")
    command.add_argument("--budget", help='"24GB" or "50%%"; default MEMPLAN_BUDGET, else the whole device')
    command.add_argument("--host-budget", help='likewise, of the host; "0B" for none; default half of what is free')
    command.add_argument("--machine", help="a name of the device table, such as rtx4090; default this one")
    command.add_argument("--policy", help="default MEMPLAN_POLICY, else greedy")
    command.add_argument("--inner", choices=("inductor", "eager"), help="what will run the graphs; default inductor")
    command.add_argument("--optimizer", help="torch.optim's name of it, such as adamw: its states and its step count")
    command.add_argument(
        "--tiles", type=_rows, help='rows of a slice, lm_head=256,mlp=1024, or "auto"; default: no slices'
    )
    command.add_argument(
        "--largest",
        choices=("tokens", "batch"),
        help="print the largest size that fits of the batch's second dimension (tokens) or first (batch)",
    )
    _output(command)

    command = add(timeline)
    command.add_argument("path", metavar="PATH")
    _output(command)

    command = add(compare)
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    _output(command, "also draw both, as .html or .png, or save them as .pickle or .perfetto-trace")

    command = add(record_step)
    command.add_argument("target", metavar="FILE.py:make_step")
    command.add_argument("--device", help="cpu or cuda; default cuda if there is one")
    _output(command)
    return parser


def _output(command: argparse.ArgumentParser, out: str = "") -> None:
    command.add_argument("--json", action="store_true", help="print JSON")
    formats = ".json, .html (a page), .png, .pickle (torch's memory viewer) or .perfetto-trace"
    command.add_argument("-o", "--out", metavar="PATH", help=out or f"also save it, as {formats}")
    command.add_argument("-f", "--force", action="store_true", help="overwrite the file that -o names if it exists")


def _check_out(kind: type, out: str | None, overwrite: bool) -> None:
    """Before any work, which may take minutes: the file can be written, and nobody's is lost."""
    if out is None:
        return
    report.check_path(kind, out)
    if Path(out).exists() and not overwrite:
        raise MemplanError(f"{out!r} exists already: give -f to overwrite it, or name another file with -o")


def _progress(what: str) -> AbstractContextManager[Any]:
    """Says what takes so long, on a terminal."""
    return Console(stderr=True).status(f"{what} ...")


def _rows(text: str) -> int | str | dict[str, int | str]:
    """256, "auto", or "lm_head=256,mlp=1024"."""
    if "=" in text:
        return {place: _number(rows) for place, _, rows in (pin.rpartition("=") for pin in text.split(","))}
    return _number(text)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _make_step(target: str) -> tuple[Any, Any]:
    """Import the file as `python FILE.py` would, and call its function."""
    name, _, function = target.rpartition(":")
    path = Path(name)
    if not (name and function):
        raise MemplanError(f"{target!r} names no function; did you mean {target.strip(':') + ':make_step'!r}?")
    if path.suffix != ".py" or not path.is_file():
        raise MemplanError(f"{name!r} is not a Python file that exists")
    spec = importlib.util.spec_from_file_location("__memplan_step__", path)
    assert spec is not None and spec.loader is not None  # by the suffix
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        functions = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == spec.name]
        known = f"it has {', '.join(functions) or 'none'}{did_you_mean(function, functions)}"
        raise MemplanError(f"{name!r} has no function {function!r}: {known}")
    try:
        inspect.signature(make).bind()
    except TypeError as e:
        raise MemplanError(f"{target!r} cannot be called without arguments ({e}): name a function that can") from None
    made = make()
    if not (isinstance(made, tuple) and len(made) == 2):
        raise MemplanError(f"{target!r} returned {made!r:.40}: return the pair (step, batch)")
    return made


def _load(path: str) -> Plan | Timeline:
    """A saved Plan or Timeline, whichever the file holds."""
    try:
        return serialize.load(path, Plan)
    except MemplanError as e:
        if "holds a Timeline" not in str(e):
            raise
    return serialize.load(path, Timeline)
