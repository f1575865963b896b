"""Who may import whom, read from the import statements of every module that exists."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {"memplan": "memplan", "passes": "memplan.passes", "runtime": "memplan.runtime"}  # folder -> package

# Room -> the rooms of memplan that it may import. A room may always import itself.
DATA = {"errors", "groups", "ir", "memory", "serialize", "units"}
BELOW_API = DATA | {"machines", "options", "report", "runtime", "passes"}
MAY_IMPORT = {
    "errors": set[str](),
    "ir": {"errors"},
    "groups": {"ir"},
    "units": {"errors"},
    "memory": set[str](),
    "serialize": {"errors", "ir", "sound"},
    "sound": {"ir"},
    "machines": {"errors", "ir", "serialize"},
    "steps": DATA,
    "report": DATA,
    "options": {"errors", "ir", "memory", "units", "machines"},
    "runtime": DATA,
    "passes": DATA | {"runtime"},
    "oom": DATA | {"report", "runtime"},
    "planned_oom": DATA | {"oom", "passes", "report", "runtime"},
    "api": BELOW_API | {"backend", "compiled", "here"},
    "backend": BELOW_API | {"api", "here", "planned_oom"},
    "compiled": {"errors"},
    "fitting": BELOW_API | {"api", "backend", "compiled"},
    "hf": {"", "compiled", "errors", "here", "ir", "options"},
    "testing": BELOW_API | {"", "api", "backend", "ranking", "steps"},
    "grpo": {"", "errors", "hf", "ir", "runtime"},  # of the runtime what the README has: ledger, tenants, vllm
    "sharing": DATA | {"runtime"},
    "ranking": BELOW_API,
    "article": BELOW_API | {"steps"},
    "here": {"ir", "machines"},
    "calibrate": DATA | {"here", "machines", "runtime"},
    "demo": BELOW_API | {"", "api", "backend", "grpo", "steps"},
    "cli": BELOW_API | {"", "api", "article", "backend", "calibrate", "demo", "grpo", "ranking", "steps"},
    "__main__": {"cli"},
}
# The data's own methods save, load and print it: imported when called, so that ir stays the lowest room.
WHEN_CALLED = {"ir": {"report", "serialize"}}

TORCH_FREE = (
    "memplan",
    "memplan.__main__",
    "memplan.errors",
    "memplan.groups",
    "memplan.ir*",
    "memplan.units",
    "memplan.memory",
    "memplan.serialize",
    "memplan.sound",
    "memplan.options",
    "memplan.cli",
    "memplan.machines*",
    "memplan.ranking",
    "memplan.article",
    "memplan.report*",
    "memplan.steps*",
    "memplan.passes",
    "memplan.passes.policies*",
    "memplan.passes.simulate",
    "memplan.passes.check",
    "memplan.passes.schedule",
    "memplan.passes.copies",
    "memplan.passes.blocks",
    "memplan.passes.bound",
    "memplan.passes.chain",
    "memplan.passes.linear",
    "memplan.passes.master",
    "memplan.passes.necessity",
    "memplan.passes.relaxation",
    "memplan.passes.joint",
    "memplan.passes.gaps",
    "memplan.passes.reasons",
    "memplan.passes.pricing",
    "memplan.runtime",
    "memplan.runtime.device_lock",
    "memplan.runtime.ledger",
)


@dataclass(frozen=True)
class Import:
    importer: str
    imported: str
    line: int
    lazy: bool  # inside a function
    for_types: bool  # under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def files(top: Path) -> Iterator[Path]:
    """Python files below a folder; links (memplan/passes, memplan/runtime) are not followed."""
    for folder, _, names in os.walk(top):
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in HOMES.items():
        for path in files(ROOT / folder):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports_of(name: str, path: Path) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, node.lineno, lazy, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                yield Import(name, full if full in modules() else source, node.lineno, lazy, for_types)
        lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, lazy, True)
            for child in node.orelse:
                yield from visit(child, lazy, for_types)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, lazy, for_types)

    yield from visit(ast.parse(path.read_text(), str(path)), False, False)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(i for name, path in modules().items() for i in imports_of(name, path))


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def of(package: str, module: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def torch_free(module: str) -> bool:
    return any(fnmatch(module, pattern) for pattern in TORCH_FREE)


def test_every_module_has_a_room() -> None:
    rooms = {room(name) for name in modules()} - {""}
    assert rooms <= set(MAY_IMPORT), "say in MAY_IMPORT what the new room may import"


def test_who_may_import_whom() -> None:
    wrong = []
    for i in imports():
        importer, imported = room(i.importer), room(i.imported)
        if not of("memplan", i.imported) or i.importer == "memplan" or importer == imported:
            continue
        allowed = MAY_IMPORT.get(importer, set()) | (WHEN_CALLED.get(importer, set()) if i.lazy else set())
        if imported not in allowed:
            wrong.append(str(i))
    assert wrong == []


def test_passes_and_runtime_are_imported_by_their_installed_names() -> None:
    assert [str(i) for i in imports() if of("passes", i.imported) or of("runtime", i.imported)] == []


def test_the_package_itself_imports_nothing_of_memplan() -> None:
    own = [i for i in imports() if i.importer == "memplan" and of("memplan", i.imported)]
    assert [str(i) for i in own if not i.for_types] == []


def test_torch_free_modules_never_import_torch() -> None:
    assert [str(i) for i in imports() if torch_free(i.importer) and of("torch", i.imported)] == []


def test_triton_stays_in_its_kernels() -> None:
    wrong = [
        str(i)
        for i in imports()
        if (of("triton", i.imported) and not fnmatch(i.importer, "memplan.runtime.kernels.*.triton"))
        or (fnmatch(i.imported, "memplan.runtime.kernels.*.triton") and not (i.lazy or i.for_types))
    ]
    assert wrong == []


def test_nothing_shadows_a_public_function() -> None:
    assert {"memplan.plan", "memplan.timeline", "memplan.policy"} & set(modules()) == set()


def test_these_tests_need_no_torch() -> None:
    here = Path(__file__).parent
    found = [i for path in files(here) for i in imports_of(f"tests.{path.stem}", path)]
    assert [str(i) for i in found if of("torch", i.imported)] == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_memplan_is_quick() -> None:
    code = (
        "import sys, time; start = time.process_time(); import memplan; memplan.Plan, memplan.DoesNotFit\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    seconds, *loaded = run(code).split()
    assert float(seconds) < 0.5
    assert loaded == ["False", "False"]


def test_torch_free_modules_load_without_torch() -> None:
    """Not even through what they import."""
    names = [name for name in modules() if torch_free(name) and not name.endswith("__main__")]
    code = f"import sys, importlib\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    assert run(code + "    if 'torch' in sys.modules: sys.exit(f'{name} imports torch')") == ""


@pytest.mark.parametrize("package", HOMES.values())
def test_the_list_of_packages_is_complete(package: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert {name for name in found if of(package, name)} <= set(settings["packages"])
    data = {name for name in found for suffix in ("json*", "html") if [*modules_folder(name).glob(f"*.{suffix}")]}
    assert data <= set(settings["package-data"])


def modules_folder(package: str) -> Path:
    folder = max((f for f, p in HOMES.items() if of(p, package)), key=lambda f: len(HOMES[f]))
    return ROOT.joinpath(folder, *package.removeprefix(HOMES[folder]).split("."))
