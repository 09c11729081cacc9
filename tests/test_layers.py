"""Imports go down the floors only: tui -> runner -> quant; and some things stay where they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {"quant": 0, "runner": 1, "tui": 2}
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
CTYPES_ALLOWED = {"quant/ggml.py", "runner/sampler.py", "runner/tokenizer.py"}


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


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_c_libraries_are_reached_from_few_places(path: Path) -> None:
    modules = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
    assert "ctypes" not in modules or name_of(path) in CTYPES_ALLOWED
    assert "torch" not in modules
    if name_of(path).startswith("tui/"):
        assert "numpy" not in modules


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
