"""The memplan command: one function per subcommand, whose docstring is its help.

Exit codes: 0 done, 2 bad input, 3 the step does not fit its budget (so that `memplan plan` can gate a job).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

import memplan
from memplan import report, serialize, steps
from memplan.errors import DoesNotFit, MemplanError, did_you_mean
from memplan.ir import COST_MODELS, CostModel, Machine, Plan, Step, Timeline
from memplan.machines import machine, machines
from memplan.options import Options
from memplan.passes.policies import FunctionPolicy, builtin
from memplan.passes.pricing import priced
from memplan.units import parse_bytes

ARTICLE_CARDS = ("h100", "a100-40", "rtx4090", "l4", "rtx3060")
FORMATS = ".json, .html (a page), .png, .pickle (torch's memory viewer) or .perfetto-trace"
SAVED = "a .json file that -o of plan or record-step, option out or .save() wrote"


def demo(arguments: argparse.Namespace) -> int:
    """Train a small GRPO step unplanned and planned, and show what the plan saves.

    It takes a minute on a CPU, downloads nothing, and writes timeline.html, timeline.png and timeline.json, over those
    of the last time.
    """
    importlib.import_module("memplan.demo").run(inner=arguments.inner, out=arguments.out)
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Plan a train step without running it; exits 3 when it does not fit.

        memplan plan train.py:make_step --budget 24GB --machine rtx4090 --optimizer adamw
        memplan plan train.py:make_step --budget 24GB --machine rtx4090 --largest tokens

    Prints what is kept, recomputed and offloaded, where the peak is, and whether it fits. A model made under
    torch.device("meta") takes no memory. With --largest it exits 3 when not even the smallest size fits.
    """
    given = {
        name: getattr(arguments, name)
        for name in ("budget", "host_budget", "machine", "policy", "inner", "out", "optimizer", "tiles", "cost")
    }
    options = Options.read(given)
    _check_out(Plan, options.file, arguments.force or arguments.out is None)  # MEMPLAN_OUT is for runs that plan again
    with _progress(f"loading {arguments.target}"):
        step, batch = _make_step(arguments.target)
    names = ("budget", "host_budget", "machine", "policy", "inner", "optimizer", "cost")
    asked = {name: getattr(options, name) for name in names} | {"tiles": arguments.tiles}
    if arguments.largest:
        from memplan.api import find_largest  # which is not torch-free

        with _progress(f"planning {arguments.target} at many sizes") as status:
            found = find_largest(
                step,
                batch,
                arguments.largest,
                tried=lambda size: status.update(
                    Text(f"planning {arguments.target}: {arguments.largest} of {size:,} ...")
                ),
                **asked,
            )
        made, text = found.plan, found.to_json() if arguments.json else str(found)
    else:
        with _progress(f"planning {arguments.target}"):
            made = memplan.plan(step, batch, **asked)
            text = serialize.to_json(made) if arguments.json else str(made)
    if options.file:  # before it is printed, which fails where nobody reads on
        with _progress(f"writing {options.file}"):
            report.save(made, options.file)
    print(text)
    return 0 if made.fits else 3


def timeline(arguments: argparse.Namespace) -> int:
    """Print a saved plan or timeline, and convert it with -o.

    memplan timeline plan.json -o plan.html
    """
    _check_out(Timeline, arguments.out, arguments.force)
    with _progress(f"reading {arguments.path}"):
        value = _load(arguments.path)
        if arguments.out:
            report.save(value, arguments.out)
        text = report.table(value) if isinstance(value, Plan) else report.summary(value)
        text = serialize.to_json(value) if arguments.json else text
    print(text)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Compare two saved plans or timelines, or rank policies, and draw what is compared with -o.

        memplan compare planned.json seen.json -o both.html
        memplan compare --policies optimal,greedy,torch-budget-0.5 --budgets 6GB,12GB --machines h100 -o ranking.html

    Of two files it prints their peaks by kind, where they differ most, and what is alive at one peak alone. Of policies
    it prints what each one's plan takes in memory and time, of recorded steps or your own, and the gap to the best.
    """
    if _listed(arguments.policies):
        return _rank(arguments)
    if arguments.policies is not None:
        raise MemplanError(f"--policies {arguments.policies!r} names none: {', '.join(builtin())}, or FILE.py:policy")
    if ignored := [name for name in ("steps", "budgets", "host_budget") if getattr(arguments, name) is not None]:
        raise MemplanError(f"--{ignored[0].replace('_', '-')} is for ranking: give --policies too, or leave it out")
    if arguments.b is None:
        raise MemplanError("compare needs two files, A and B, or --policies to rank: memplan compare a.json b.json")
    _check_out(report.Comparison, arguments.out, arguments.force)
    with _progress(f"comparing {arguments.a} and {arguments.b}"):
        found = report.compare(_load(arguments.a), _load(arguments.b))
        if arguments.out:
            found.save(arguments.out)
        text = found.to_json() if arguments.json else str(found)
    print(text)
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    from memplan.ranking import rank

    if arguments.a is not None:
        raise MemplanError(f"compare was given the file {arguments.a!r} and --policies: leave one of them out")
    _check_out(report.Ranking, arguments.out, arguments.force)
    targets = _machines(arguments.machines)
    with _progress("reading steps") as status:
        chosen = {name: _step(name, targets[0], arguments.cost) for name in _steps(arguments.steps)}
        found = rank(
            chosen,
            targets,
            [_named_in(one) if ".py" in one else one for one in _listed(arguments.policies)],
            [parse_bytes(size) for size in _listed(arguments.budgets)],
            host_bytes=0 if arguments.host_budget in (None, "0") else parse_bytes(arguments.host_budget),
            limit=arguments.limit,
            progress=lambda text: status.update(Text(f"{text} ...")),
        )
        if arguments.out:
            found.save(arguments.out)
    print(found.to_json() if arguments.json else found)
    return 0 if any(row.fits for row in found.rows) else 3


def _machines(text: str) -> list[Machine]:
    if not _listed(text):
        raise MemplanError(f"--machines {text!r} names none: there are {', '.join(machines())}, and machine files")
    return [machine(name) for name in _listed(text)]


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _steps(text: str | None) -> list[str]:
    return steps.names() if text == "all" else _listed(text) or [steps.USUAL]


def _step(name: str, target: Machine, cost: CostModel) -> Step:
    """A recorded step by name, one saved as .json, or one of your own by FILE.py:make_step, with its ops priced."""
    if ".py" in name:
        step, batch = _make_step(name)
        all_of_it = dataclasses.replace(target, memory_bytes=2**62)
        inner = "inductor" if cost == "fused" else "eager"
        return memplan.plan(step, batch, machine=all_of_it, policy="save-all", inner=inner, cost=cost).step
    return priced(serialize.load(name, Step) if name.endswith(".json") else steps.load(name), cost)


def article(arguments: argparse.Namespace) -> int:
    """Print the article's account of GRPO's memory, 510.8 and 54.3 GB, and what is planned for the same job.

        memplan article
        memplan article --machines l4,rtx3060 --host-budget 32GB

    The first table is arithmetic, from unsloth.ai/blog/grpo; the second one is planned, card by card, of recorded steps
    of Llama-3.1-8B: a prediction, for which nothing is run.
    """
    from memplan.article import account

    targets = list(dict.fromkeys(_machines(arguments.machines)))
    with _progress("planning") as status:
        found = account(targets, arguments.host_budget, progress=lambda what: status.update(Text(f"{what} ...")))
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else found)
    return 0


def record_step(arguments: argparse.Namespace) -> int:
    """Run a train step once to warm up, record it the second time, and say where its bytes were.

        memplan record-step train.py:make_step -o seen.html

    The step may be any code, planned or not. A loss that step(batch) returns is run backward, if that is still to be
    done.
    """
    from memplan.runtime.recorder import recordable  # which is not torch-free

    _check_out(Timeline, arguments.out, arguments.force)
    recordable(arguments.device)
    with _progress(f"loading {arguments.target}"):
        step, batch = _make_step(arguments.target)

    def run() -> None:
        loss = step(batch)
        if getattr(loss, "requires_grad", False):
            try:
                loss.backward()
            except RuntimeError as error:
                if "backward through the graph a second time" not in str(error):
                    raise  # else the step has done so itself

    with _progress(f"warming up {arguments.target}"):
        run()
    with _progress(f"recording {arguments.target}"):
        with memplan.record(arguments.device, lines=True) as seen:
            run()
        found = dataclasses.replace(seen.timeline, title=f"{arguments.target}, {seen.timeline.title}")
        if arguments.out:
            report.save(found, arguments.out)
        text = serialize.to_json(found) if arguments.json else report.summary(found)
    print(text)
    return 0


def calibrate(arguments: argparse.Namespace) -> int:
    """Measure this machine once, in under a minute, and write a machine file.

        memplan calibrate -o mine.json
        memplan plan train.py:make_step --machine mine.json

    Products and attention by dtype, memory, copies both ways, the disk, and the memory inside a few ops. The file is
    for --machine, option machine and memplan.plan: durations are then this machine's, and not a data sheet's.
    """
    from memplan.calibrate import calibrate as measure  # which is not torch-free

    if not (arguments.out.endswith(".json") and os.access(Path(arguments.out).absolute().parent, os.W_OK)):
        raise MemplanError(f"cannot write {arguments.out!r}: name a .json file in a folder that exists and is writable")
    _check_new(arguments.out, arguments.force)
    with _progress("measuring") as status:
        found = measure(
            arguments.device,
            name=arguments.name,
            scale=arguments.scale,
            progress=lambda what: status.update(Text(f"measuring {what} ...")),
        )
        found.save(arguments.out)
    print(f"{found}\nwritten: {arguments.out}")
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
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails as it ends
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "memplan",
        description=(memplan.__doc__ or "").split("\n")[0],
        epilog="memplan COMMAND --help says more. Exit codes: 0 done, 2 bad input, 3 the step does not fit its budget.",
    )
    parser.add_argument("--version", action="version", version=memplan.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        text = inspect.getdoc(command) or ""
        out = commands.add_parser(
            command.__name__.replace("_", "-"),
            help=text.split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        out.set_defaults(command=command)
        return out

    command = add(demo)
    command.add_argument(
        "--inner", choices=("eager", "inductor"), default="eager", help="what runs the graphs; default eager"
    )
    command.add_argument(
        "-o", "--out", metavar="DIR", type=Path, default=Path(), help="folder for its three files; default this one"
    )

    command = add(plan)
    _target(command)
    _planning(command)
    command.add_argument(
        "--largest",
        choices=("tokens", "batch"),
        help="instead, print the largest size of the batch's second dimension (tokens) or first (batch) that fits",
    )
    _output(command, f"also save the plan (with --largest, that of the largest size) as {FORMATS}")

    command = add(timeline)
    command.add_argument("path", metavar="PATH", help=SAVED)
    _output(command)

    command = add(compare)
    command.add_argument("a", metavar="A", nargs="?", help=SAVED)
    command.add_argument("b", metavar="B", nargs="?", help="another one; differences are b - a")
    command.add_argument(
        "--policies",
        metavar="NAMES",
        help=f"in place of files, rank these, or yours by FILE.py:policy: {', '.join(builtin())}",
    )
    command.add_argument(
        "--steps",
        metavar="NAMES",
        help=f'recorded steps ({", ".join(steps.names())}), saved .json, or FILE.py:make_step; "all": all '
        f"recorded, which takes many minutes; default {steps.USUAL}",
    )
    command.add_argument("--budgets", metavar="SIZES", help="inside what, 6GB,12GB; default each step's own range")
    command.add_argument(
        "--machines", metavar="NAMES", default="h100", help="of the device table, or machine files; default h100"
    )
    command.add_argument(
        "--cost",
        choices=COST_MODELS,
        default="roofline-v1",
        help="what times are by: each op reads and writes memory, or, fused, a chain of pointwise ops does so once; "
        "default roofline-v1",
    )
    command.add_argument("--host-budget", metavar="SIZE", help="what may be off the device at a time; default nothing")
    command.add_argument(
        "--limit", metavar="SECONDS", type=float, default=math.inf, help="stop a policy that takes longer for one plan"
    )
    _output(
        command,
        "also draw both, as .html or .png, or save them as .pickle or .perfetto-trace; a ranking as .html, .png or "
        ".json",
    )

    command = add(article)
    command.add_argument(
        "--machines",
        metavar="NAMES",
        default=",".join(ARTICLE_CARDS),
        help=f"of the device table ({', '.join(machines())}), or machine files; default {','.join(ARTICLE_CARDS)}",
    )
    command.add_argument(
        "--host-budget", metavar="SIZE", default="64GB", help="what may be off the device at a time; default 64GB"
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of text")

    command = add(record_step)
    _target(command)
    command.add_argument("--device", help="cpu or cuda; default cuda if there is one")
    _output(command)

    command = add(calibrate)
    command.add_argument("--device", help="cpu or cuda; default cuda if there is one")
    command.add_argument("--name", help="what reports call the machine; default what the table calls it, measured")
    command.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)  # of sizes and times, for tests
    command.add_argument("-o", "--out", metavar="PATH", default="machine.json", help="the file; default machine.json")
    command.add_argument("-f", "--force", action="store_true", help="overwrite the file if it exists")
    return parser


def _target(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target",
        metavar="FILE.py:make_step",
        help="a Python file, and a function in it that takes no arguments and returns the pair (step, batch)",
    )


def _planning(command: argparse.ArgumentParser) -> None:
    """The options of memplan.plan."""
    command.add_argument(
        "--budget", metavar="SIZE", help='"24GB", "50%%" of the device; default MEMPLAN_BUDGET, else the whole device'
    )
    command.add_argument(
        "--host-budget",
        metavar="SIZE",
        help="what may be off the device at a time, in the host's memory, written as a budget is; 0: nothing; default "
        "half of what is free here, and nothing where host and device share one memory",
    )
    command.add_argument(
        "--machine",
        metavar="NAME",
        help=f"the machine to plan for: {', '.join(machines())}, or a file of memplan calibrate; default this one",
    )
    command.add_argument(
        "--policy", metavar="NAME", help=f"what decides: {', '.join(builtin())}; default MEMPLAN_POLICY, else optimal"
    )
    command.add_argument(
        "--inner",
        choices=("inductor", "eager"),
        help="what will run the graphs: of eager bytes are exact, of inductor an estimate; default inductor",
    )
    command.add_argument(
        "--cost", choices=COST_MODELS, help="what times are by; default fused with inductor, roofline-v1 with eager"
    )
    command.add_argument(
        "--optimizer",
        metavar="NAME",
        help="torch.optim's name of what will update the parameters, such as adamw, so that its states and what its "
        "step takes count; default the one that has them by then",
    )
    command.add_argument(
        "--tiles",
        metavar="ROWS",
        type=_rows,
        help='run what can be in slices of at most so many rows: 256, lm_head=256,mlp=1024 for some places, or "auto"; '
        "default no slices",
    )


def _output(command: argparse.ArgumentParser, out: str = "") -> None:
    command.add_argument("--json", action="store_true", help="print JSON in place of text")
    command.add_argument("-o", "--out", metavar="PATH", help=out or f"also save it, as {FORMATS}")
    command.add_argument("-f", "--force", action="store_true", help="overwrite the file that -o names if it exists")


def _check_out(kind: type, out: str | None, overwrite: bool) -> None:
    """Before any work, which may take minutes: the file can be written, and nobody's is lost."""
    if out is None:
        return
    report.check_path(kind, out)
    _check_new(out, overwrite)


def _check_new(out: str, overwrite: bool) -> None:
    if Path(out).exists() and not overwrite:
        raise MemplanError(f"{out!r} exists already: give -f to overwrite it, or name another file with -o")


def _progress(what: str) -> Status:
    """Says what takes so long, on a terminal."""
    return Console(stderr=True).status(Text(f"{what} ..."))  # names are no markup


def _rows(text: str) -> int | str | dict[str, int | str]:
    """256, "auto", or "lm_head=256,mlp=1024"."""
    if "=" in text:
        return {place: _number(rows) for place, _, rows in (pin.rpartition("=") for pin in text.split(","))}
    return _number(text)


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _named_in(target: str) -> Any:
    """Import the file of FILE.py:NAME as `python FILE.py` would, and find what can be called by that name in it."""
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
    found = getattr(module, function, None)
    if not callable(found):
        made = {n: f.function if isinstance(f, FunctionPolicy) else f for n, f in vars(module).items()}
        functions = [n for n, f in made.items() if inspect.isfunction(f) and f.__module__ == spec.name]
        known = f"it has {', '.join(functions) or 'none'}{did_you_mean(function, functions)}"
        raise MemplanError(f"{name!r} has no function {function!r}: {known}")
    return found


def _make_step(target: str) -> tuple[Any, Any]:
    """What the function that is named returns."""
    make = _named_in(target)
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
