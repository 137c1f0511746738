"""The layout of the package: reading order, sizes, and which library appears where."""

import ast
import re
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "lit_phi2"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 320, 50
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def reading_order() -> list[str]:
    """The modules as lit_phi2/README.md lists them."""
    listing = (PACKAGE / "README.md").read_text("utf-8").split("```")[1]
    return re.findall(r"(?m)^(\S+\.py) ", listing)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_modules(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_readme_lists_every_module_once() -> None:
    assert sorted(reading_order()) == [name_of(path) for path in MODULES]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_upwards_in_the_readme(path: Path) -> None:
    order = reading_order()
    above = set(order[: order.index(name_of(path))])
    imported = {name.replace(".", "/") for name in imported_modules(path) if name.startswith("lit_phi2.")}
    imported_files = {f"{name.removeprefix('lit_phi2/')}.py" for name in imported} & set(order)
    assert imported_files <= above


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


def test_data_and_model_do_not_know_each_other() -> None:
    for path in MODULES:
        folder = name_of(path).partition("/")[0]
        other = {"data": "lit_phi2.model", "model": "lit_phi2.data"}.get(folder)
        if other:
            assert not any(name.startswith(other) for name in imported_modules(path)), path


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("lightning", ("data/datamodule.py", "training/", "cli/")),
        ("peft", ("model/lora.py", "adapters/")),
    ],
)
def test_a_library_appears_only_where_it_is_arranged(library: str, allowed: tuple[str, ...]) -> None:
    users = {name_of(path) for path in MODULES if any(re.match(rf"{library}\b", n) for n in imported_modules(path))}
    assert users
    assert all(user.startswith(allowed) for user in users), users
