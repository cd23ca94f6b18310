"""The house: which room may call which, and that nothing but the five packages is imported."""

import ast
import re
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


def test_requirements():
    """A lower bound each, so that any CUDA build of torch fits; CI has the pinned versions."""

    def versions(name, sign):
        lines = (ROOT / name).read_text().splitlines()
        return dict(re.split(sign, line)[:2] for line in lines if line and line[0] != "#")

    pins = versions("constraints.txt", "==")
    assert pins.keys() == PACKAGES - {"PIL"} | {"pillow", "pytest", "ruff"}
    assert pins["torch"] == "2.13.0"
    assert versions("requirements.txt", "[>=]=").keys() == pins.keys()


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
