"""The house: which room may call which, and that nothing but the five packages is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "painter": set(),
    "ddpm": set(),
    "unet": set(),
    "vqgan": set(),
    "data": {"painter"},
    "plots": {"data", "ddpm", "unet"},
    "ldm": {"data", "ddpm", "unet", "vqgan"},
    "fid": {"data", "plots"},
    "sample": {"data", "ddpm", "fid", "ldm", "plots"},
    "train": {"data", "ddpm", "fid", "ldm", "plots", "sample", "unet", "vqgan"},
}
PACKAGES = {"torch", "numpy", "PIL", "tqdm", "scipy"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_every_room_is_known():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports(room):
    names = set(imported(ROOT / f"{room}.py"))
    assert names & set(ROOMS) <= ROOMS[room]
    assert names - set(ROOMS) - set(sys.stdlib_module_names) <= PACKAGES


def test_requirements_are_pinned():
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    assert all("==" in line for line in lines)
    assert {line.split("==")[0] for line in lines} == {
        "torch",
        "numpy",
        "pillow",
        "tqdm",
        "scipy",
        "pytest",
        "ruff",
    }
    assert "torch==2.13.0" in lines


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")], ids=lambda p: p.name
)
def test_functions_fit_on_a_screen_and_lines_in_a_column(path):
    """At most 60 lines per function, the training loop included, and 100 columns per line."""
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
