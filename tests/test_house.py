"""The house: what stands on which shelf, which way imports go, how long files and functions are."""

import ast

import pytest

from conftest import ROOT

TOP = {"ruscarl", "scaffold", "judge", "grpo", "sampler", "tasks", "evaluation", "refine"}
HEART = ("ruscarl", "scaffold", "judge", "grpo", "sampler")
FILES = {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("tools/*.py")] if path.stem != "__init__"}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name):
    """The product's modules that the module `name` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


def lines(*names):
    return sum(len(FILES[name].read_text().splitlines()) for name in names)


def test_the_top_level_holds_what_ruscarl_is():
    assert {name for name in FILES if "." not in name} == TOP


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    commands = {"ruscarl", "evaluation", "refine"}
    if name.startswith("plumbing."):
        assert not {other for other in imports(name) if other in commands or other.startswith("tools.")}
    if name.startswith("tools."):
        assert not imports(name) & commands


def test_no_module_imports_itself_by_way_of_others():
    left = {name: imports(name) for name in FILES}
    while free := {name for name, needed in left.items() if not needed & set(left)}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert not left


def test_budgets_of_lines():
    assert lines(*HEART) <= 1060
    assert lines(*FILES) <= 5910


@pytest.mark.parametrize("name", FILES)
def test_a_function_fits_a_screen(name):
    long = {node.name: length for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)
            if (length := node.end_lineno - node.lineno + 1) > 50}
    assert not long
