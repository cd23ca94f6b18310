"""README.md and docs/ against the code: the map, the errata, the links, and every command."""

import ast
import re
import shlex
import sys
from pathlib import Path

import book
import pytest
from commands import commands

import data
import fid
import plots
import sample
import train

ROOT = Path(__file__).parent.parent
NUMBERED = [*(f"2.{n}" for n in range(1, 22)), *(f"3.{n}" for n in range(1, 16)), "4.1"]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def definitions(path):
    """name -> node of what a file defines at its top level, and of methods as Class.method."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if name := getattr(node, "name", None):
            inner = [n for n in ast.walk(node) if isinstance(n, ast.FunctionDef)]
            found |= {f"{name}.{n.name}": n for n in inner} | {name: node}
        found |= {getattr(target, "id", None): node for target in getattr(node, "targets", ())}
    return found


CODE = {path.name: definitions(path) for path in ROOT.glob("*.py")}
TESTS = {path.name: definitions(path) for path in (ROOT / "tests").glob("test_*.py")}


def file_of(test):
    files = [file for file, found in TESTS.items() if test in found]
    assert len(files) == 1, f"{test}: in {files or 'no test file'}"
    return files[0]


def names_used(name, found, seen):
    """The names and .attributes that a definition reads, also through helpers and fixtures."""
    if name not in found or name in seen:
        return
    seen.add(name)
    nodes = list(ast.walk(found[name]))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    names -= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    yield from names | {f".{n.attr}" for n in nodes if isinstance(n, ast.Attribute)}
    for helper in names | {n.arg for n in nodes if isinstance(n, ast.arg)}:
        yield from names_used(helper, found, seen)


def uses(test, function):
    """Whether a test calls a function, or a method of any object, as far as names can tell."""
    used = set(names_used(test, TESTS[file_of(test)], set()))
    return not used.isdisjoint((function, "." + function.split(".")[-1]))


MAP = book.rows("map.md")
LISTED = book.rows("errata.md")
FIVE = [row for row in book.rows("../README.md") if re.fullmatch(r"E\d\d", row[0])]


@pytest.mark.parametrize("row", MAP, ids=[f"{row[0]} {row[1]}" for row in MAP])
def test_every_entry_of_the_map_exists_and_is_tested(row):
    functions, tests = [entry.split(":") for entry in quoted(row[2])], quoted(row[3])
    assert functions and tests
    for file, function in functions:
        assert function in CODE[file], f"{file} has no {function}"
        assert any(uses(test, function) for test in tests), f"no test of the row calls {function}"
    for test in tests:
        assert any(uses(test, f) for _, f in functions), f"{test} calls no function of its row"


@pytest.mark.parametrize("number", NUMBERED)
def test_every_numbered_equation_has_a_row_and_can_be_found_by_its_number(number):
    found = [row for row in MAP if row[0] == number]
    named = f"`test_eq_{number.replace('.', '_')}_"
    assert any(named in row[3] for row in found), "no test is named after it"
    functions = [entry.split(":") for row in found for entry in quoted(row[2])]
    said = " ".join(ast.get_docstring(CODE[file][name]) or "" for file, name in functions)
    assert re.search(rf"[Ee]q\. {re.escape(number)}(?!\d)", said), "in no docstring"


def test_every_erratum_has_one_row_and_five_stand_in_the_readme():
    ids = [row[0] for row in LISTED]
    assert ids == sorted(set(ids)) and len(ids) == 57
    assert [row[0] for row in FIVE] == ["E14", "E27", "E48", "E52", "E54"]


@pytest.mark.parametrize("row", LISTED + FIVE, ids=[row[0] for row in LISTED + FIVE])
def test_every_erratum_names_tests_that_mention_it_or_says_why_not(row):
    assert len(row) == 5 and all(row)
    for test in quoted(row[4]):
        file, node = ROOT / "tests" / file_of(test), TESTS[file_of(test)][test]
        said = file.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
        assert row[0].lower() in "\n".join(said).lower(), f"{test} does not mention {row[0]}"


PROGRAMS = {"data": data, "fid": fid, "plots": plots, "sample": sample, "train": train}
CALL = re.compile(rf"(?:python |torchrun .*? )({'|'.join(PROGRAMS)})\.py\b(.*)")
CALLS = [call.groups() for call in map(CALL.search, commands()) if call]


@pytest.mark.parametrize("program, line", CALLS)
def test_every_command_is_one_that_its_program_understands(program, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *shlex.split(line)])
    try:
        PROGRAMS[program].parse()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err


def test_the_readme_is_short_and_every_link_leads_to_a_file():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^):#]+)[)#]", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
