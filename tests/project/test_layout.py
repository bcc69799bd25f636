"""The layout of ddpm_ext, read from its source: which packages import which.

Every import counts: those at the top of a module, those inside functions, and those for type checking alone. A failed
test prints its violations one a line.
"""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "ddpm_ext"
SOURCE = Path(__file__).resolve().parents[2] / PACKAGE

# From the bottom to the top. A package may import those below it; packages on the same floor don't import each other.
# The modules that lie directly in ddpm_ext have a place here as packages have; `ddpm_ext` itself is its __init__.py.
FLOORS = (
    {"base"},
    {"ops"},
    {"tables", "reference", "version"},
    {"process"},
    {"losses", "loop"},
    {"diffusion"},
    {"tuning"},
    {"plots", "models", "integrations"},
    {PACKAGE},
    {"training", "bulk"},
    {"cli", "demo"},
)
TOP = {"__main__"}  # runs the command line
# These are forbidden although they lead downward: the tables are numbers and need no operators, but for the order in
# which these read a row, and for what a GPU must have to read it.
FORBIDDEN = {("tables", "ops")}
ALLOWED = {"ddpm_ext.ops.row", "ddpm_ext.ops.cards"}


class Module(NamedTuple):
    name: str
    tree: ast.Module
    is_package: bool


class Arrow(NamedTuple):
    """An import of one module of ddpm_ext in another."""

    source: str
    target: str
    line: int


def package_of(module: str) -> str:
    """ "ops" of ddpm_ext.ops.noise, "diffusion" of ddpm_ext.diffusion, "ddpm_ext" of ddpm_ext."""
    return module.split(".")[1] if "." in module else module


@functools.cache
def modules() -> dict[str, Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        is_package = path.stem == "__init__"
        name = ".".join((path.parent if is_package else path).relative_to(SOURCE.parent).with_suffix("").parts)
        found[name] = Module(name, ast.parse(path.read_text(encoding="utf-8"), str(path)), is_package)
    return found


def targets(module: str, node: ast.AST) -> Iterator[str]:
    """The modules of ddpm_ext that a node of the tree imports."""
    known = modules()
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{module}:{node.lineno}: a relative import"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            imported = submodule if submodule in known else node.module
            if imported in known:
                yield imported
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module" and node.args:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and argument.value in known:
            yield argument.value
        elif isinstance(argument, ast.JoinedStr) and isinstance(argument.values[0], ast.Constant):
            # The name is put together at run time, so all modules whose names begin like this count.
            beginning = str(argument.values[0].value)
            if beginning.startswith(f"{PACKAGE}."):
                yield from (n for n in known if n.startswith(beginning) and n != module and not n.endswith("__main__"))


@functools.cache
def arrows() -> tuple[Arrow, ...]:
    nodes = [(name, node) for name, module in modules().items() for node in ast.walk(module.tree)]
    return tuple(Arrow(name, target, node.lineno) for name, node in nodes for target in targets(name, node))


def report(violations: list[str]) -> None:
    if violations:
        pytest.fail(f"{len(violations)} violations\n" + "\n".join(violations), pytrace=False)


def floor(package: str) -> int:
    return next((number for number, names in enumerate((*FLOORS, TOP)) if package in names), -1)


def test_every_package_has_a_floor():
    assert set(map(package_of, modules())) == set().union(*FLOORS, TOP) and len(FLOORS) <= 11
    firsts = {name: (ast.get_docstring(module.tree) or "").partition("\n")[0] for name, module in modules().items()}
    untold = [name for name, first in firsts.items() if modules()[name].is_package and not first.endswith(".")]
    report([f"{name} has no docstring whose first line is a sentence" for name in untold])


def test_packages_import_only_packages_below():
    found = []
    for arrow in arrows():
        source, target = package_of(arrow.source), package_of(arrow.target)
        upward = source != target and floor(source) <= floor(target)
        if upward or ((source, target) in FORBIDDEN and arrow.target not in ALLOWED):
            found.append(f"{arrow.source}:{arrow.line} imports {arrow.target}")
    report(found)


def test_modules_have_no_cycle():
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for arrow in arrows():
        graph[arrow.source].add(arrow.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as found:
        report([" -> ".join(found.args[1])])


def written_in_place(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and code of calls that write a file, except to the hidden file of a `with atomic_path(...) as name`."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    hidden = [
        (item.optional_vars.id, node.lineno, node.end_lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.optional_vars, ast.Name) and "atomic_path(" in ast.unparse(item.context_expr)
    ]
    for call in calls:
        function, arguments = ast.unparse(call.func), [ast.unparse(each) for each in call.args] or [""]
        opens = function == "open" and arguments[1:2] and set(arguments[1]) & set("wx+")
        writes = function.endswith((".write_text", ".write_bytes")) and not function.startswith("files.")
        is_hidden = any(name == arguments[0] and first <= call.lineno <= last for name, first, last in hidden)
        if (opens or writes) and not is_hidden:
            yield call.lineno, ast.unparse(call)


def test_files_are_written_beside_and_renamed():
    """A write that fails or is killed leaves the earlier file as it was. base/files.py is what does that."""
    written = [
        (name, *found)
        for name, module in modules().items()
        if name != "ddpm_ext.base.files"
        for found in written_in_place(module.tree)
    ]
    report([f"{name}:{line} writes in place: {code}" for name, line, code in written])


@pytest.mark.subprocess
def test_import_needs_only_torch_and_numpy():
    """What torch and numpy import themselves does not count."""
    code = """
import sys
import numpy, torch
before = set(sys.modules)
import ddpm_ext
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(tops - sys.stdlib_module_names - {"ddpm_ext", "numpy", "torch"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
