"""Imports go down the floors only: tui -> runner -> quant; and some things stay where they are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import runner.client

ROOT = Path(__file__).parent.parent
LOWER_FLOORS = {"quant", "runner"}
FLOORS = {"quant": 0, "runner": 1, "tui": 2}
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
TORCH_ALLOWED = {"runner/profiling/expert_outputs.py"}
LATE_ONLY = ("torch", "runner.profiling.expert_outputs")  # which brings torch along
CTYPES_ALLOWED = {
    "quant/ggml.py",
    "quant/ggml_library.py",
    "runner/sampler.py",
    "runner/tokenizer.py",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_there_are_files_on_every_floor() -> None:
    assert {name_of(path).split("/")[0] for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    floor = FLOORS[name_of(path).split("/")[0]]
    for module in imported_modules(ast.parse(path.read_text())):
        above = FLOORS.get(module.split(".")[0], floor)
        assert above <= floor, f"{name_of(path)} imports {module}"
        assert module.split(".")[0] != "tests"


@pytest.mark.parametrize(
    "path", [path for path in FILES if name_of(path).startswith("tui/")], ids=name_of
)
def test_screens_use_what_the_client_offers_and_nothing_else(path: Path) -> None:
    doorway = {"runner.cli": {"main"}} if name_of(path) == "tui/start.py" else {}
    offered = {"runner.client": set(runner.client.__all__), **doorway}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] in LOWER_FLOORS for name in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LOWER_FLOORS:
            names = {name.name for name in node.names}
            assert names <= offered.get(node.module or "", set()), f"{name_of(path)}: {names}"


def test_the_command_line_loads_no_screen() -> None:
    check = "import sys, tui.start; sys.exit('textual' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_c_libraries_are_reached_from_few_places(path: Path) -> None:
    modules = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
    assert "ctypes" not in modules or name_of(path) in CTYPES_ALLOWED
    assert "torch" not in modules or name_of(path) in TORCH_ALLOWED
    if name_of(path).startswith("tui/"):
        assert "numpy" not in modules


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torch_is_imported_when_a_profile_is_made_and_not_before(path: Path) -> None:
    if name_of(path) in TORCH_ALLOWED:
        return
    at_once = ast.Module(list(nodes_run_at_import(ast.parse(path.read_text()))), [])
    assert not set(imported_modules(at_once)) & set(LATE_ONLY)


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """Import statements outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef) and not is_type_checking(node):
            yield from nodes_run_at_import(node)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_no_process_but_the_one_that_makes_a_profile_loads_torch() -> None:
    modules = "runner.cli, runner.worker, runner.session, runner.profile, runner.buddies"
    modules += ", runner.terminal.profile_command, runner.terminal.run_command"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_owns(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{name_of(path)}: {node.name}"
