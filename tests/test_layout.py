"""The house: which room may call which, and that nothing but the five packages is imported."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "data": set(),
    "ddpm": set(),
    "unet": set(),
    "vqgan": set(),
    "ldm": {"data", "ddpm", "unet", "vqgan"},
    "fid": {"data"},
    "sample": {"data", "ddpm", "fid", "ldm"},
    "train": {"data", "ddpm", "fid", "ldm", "sample", "unet", "vqgan"},
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
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)
    assert {line.split("==")[0] for line in lines} == {"torch", "numpy", "pillow", "tqdm", "scipy", "pytest", "ruff"}
    assert "torch==2.13.0" in lines
