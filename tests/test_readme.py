"""The README's tables against the code: the map, the errata, and every command."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from commands import commands

import data
import fid
import sample
import train
import unet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBERED = [*(f"2.{n}" for n in range(1, 22)), *(f"3.{n}" for n in range(1, 16)), "4.1"]
ERRATA = [1, 2, 3, 5, 9, *range(11, 19), *range(20, 25), *range(27, 32), 35, 36, 38, 39, 40, 42, 43, *range(45, 51), 52, 54]
ERRATA = [f"E{n:02}" for n in (*ERRATA, *range(55, 58), *range(59, 65), 68)]  # those that change what code or text says


def table(heading):
    """The rows of the tables below a heading, each a list of cells."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def definitions(path):
    """name -> node of everything a file defines at its top level, and of methods as Class.method."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            methods = [method for method in ast.walk(node) if isinstance(method, ast.FunctionDef) and method is not node]
            found |= {f"{node.name}.{method.name}": method for method in methods}
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


CODE = {path.name: definitions(path) for path in ROOT.glob("*.py")}
TESTS = {path.name: definitions(path) for path in (ROOT / "tests").glob("test_*.py")}


def file_of(name):
    files = [file for file, found in TESTS.items() if name in found]
    assert len(files) == 1, f"{name}: in {files or 'no test file'}"
    return files[0]


def names_used(name, found, seen):
    """What a definition reads, names and .attributes, with what it uses of the same file: helpers, fixtures by argument."""
    if name not in found or name in seen:
        return
    seen.add(name)
    nodes = list(ast.walk(found[name]))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names = {node.id for node in nodes if isinstance(node, ast.Name)} - own
    yield from names
    yield from (f".{node.attr}" for node in nodes if isinstance(node, ast.Attribute))
    for helper in names | {node.arg for node in nodes if isinstance(node, ast.arg)}:
        yield from names_used(helper, found, seen)


def uses(test, function):
    """Whether a test calls a function, or a method by any object, as far as names can tell."""
    used, last = set(names_used(test, TESTS[file_of(test)], set())), function.split(".")[-1]
    return f".{last}" in used or function in used


MAP = table("The map")


@pytest.mark.parametrize("row", MAP, ids=[f"{row[0]} {row[1]}" for row in MAP])
def test_every_entry_of_the_map_exists_and_is_tested(row):
    number, _, code, tests = row
    functions = [entry.split(":") for entry in quoted(code)]
    assert functions and quoted(tests)
    for file, function in functions:
        assert function in CODE[file], f"{file} has no {function}"
    called = {function: [test for test in quoted(tests) if uses(test, function)] for _, function in functions}
    assert all(called.values()), f"called by none of the row's tests: {[f for f, by in called.items() if not by]}"
    idle = set(quoted(tests)) - {test for by in called.values() for test in by}
    assert not idle, f"calls no function of its row: {idle}"


@pytest.mark.parametrize("number", NUMBERED)
def test_every_numbered_equation_has_a_row_and_can_be_found_by_its_number(number):
    rows = [row for row in MAP if row[0] == number]
    tests = [test for row in rows for test in quoted(row[3])]
    assert any(re.match(rf"test_eq_{number.replace('.', '_')}_", test) for test in tests), "no test named after it"
    functions = [entry.split(":") for row in rows for entry in quoted(row[2])]
    said = " ".join(ast.get_docstring(CODE[file][function]) or "" for file, function in functions)
    assert re.search(rf"[Ee]q\. {re.escape(number)}(?!\d)", said), "in no docstring of its functions"


def test_every_erratum_that_matters_has_a_row():
    ids = [row[0] for row in table("Errata")]
    assert ids == sorted(set(ids)) and set(ERRATA) <= set(ids)


@pytest.mark.parametrize("row", table("Errata"), ids=[row[0] for row in table("Errata")])
def test_every_erratum_names_tests_that_speak_of_it_or_says_why_not(row):
    erratum, *texts, tests = row
    assert len(texts) == 3 and all(texts) and tests
    for test in quoted(tests):
        file = file_of(test)
        lines = (ROOT / "tests" / file).read_text().splitlines()[TESTS[file][test].lineno - 1 : TESTS[file][test].end_lineno]
        assert erratum.lower() in "\n".join(lines).lower(), f"{test} does not mention {erratum}"


CALLS = [re.search(r"(?:python |torchrun .*? )(\w+)\.py\b(.*)", command) for command, _ in commands(README)]
CALLS = [call.groups() for call in CALLS if call]  # program and arguments; `python tests/commands.py` runs them


@pytest.mark.parametrize("program, line", CALLS)
def test_every_command_is_one_that_its_program_understands(program, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *shlex.split(line)])
    try:
        {"data": data.parse, "fid": fid.parse, "sample": sample.parse, "train": train.parse, "unet": unet.parse}[program]()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
