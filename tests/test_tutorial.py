"""The tutorial's notebooks: short cells, stored outputs, and everything runs again."""

import ast
import inspect
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

import ruscarl
from conftest import PATIENCE, ROOT

FOLDER = ROOT / "tutorial"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
LONGEST_CELL, LARGEST_FILE = 25, 600_000  # lines, bytes


def code_cells(notebook):
    """The notebook's code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows, but for warnings: a sorted list of stream (text), display_data (pictures), error."""
    return sorted({output.output_type for output in cell.outputs if output.get("name") != "stderr"})


def speaks(source):
    """Whether a cell prints or draws by itself, not only inside a function that it defines."""
    nodes = list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "plt.show"):
            return True
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))
    return False


def test_the_path_names_every_notebook():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS and [name[:2] for name in NOTEBOOKS] == [f"{i:02d}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert all(f"({name})" in text for name in NOTEBOOKS)
    assert all((FOLDER / name).is_file() for name in re.findall(r"\((\w+\.ipynb)\)", text))


def test_the_loop_that_is_shown_is_the_loop():
    notebook = nbformat.read(FOLDER / "06_training.ipynb", as_version=4)
    texts = [output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs]
    assert inspect.getsource(ruscarl.train).strip() in {text.strip() for text in texts}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_stored(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert (FOLDER / name).stat().st_size < LARGEST_FILE
    cells = code_cells(notebook)
    assert "print(f\"Python {platform.python_version()}" in cells[0].source  # versions
    for cell in cells:
        assert cell.source.count("\n") < LONGEST_CELL, cell.source
        assert cell.outputs or not speaks(cell.source), f"no stored output: {cell.source}"
        assert not {output.get("name") for output in cell.outputs} & {"stderr"}, cell.source
        assert "error" not in kinds(cell), cell.source
        assert not re.search(r"(?<![\w.:/])/(home|tmp|root|Users)/", str(cell)), f"a machine's path: {cell.source}"
        assert not cell.metadata, cell.metadata
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    exercise = next(i for i, cell in enumerate(notebook.cells) if "## Exercise" in cell.source)
    assert "<summary>Answer</summary>" in notebook.cells[exercise].source and notebook.cells[-1].outputs


@pytest.mark.slow(100)
@pytest.mark.parametrize("name", NOTEBOOKS[::-1])  # the longest, which are the last, first
def test_it_runs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    stored = [kinds(cell) for cell in code_cells(notebook)]
    client = NotebookClient(notebook, timeout=3 * PATIENCE, startup_timeout=PATIENCE, kernel_name="python3",
                            resources={"metadata": {"path": str(FOLDER)}})
    assert [kinds(cell) for cell in code_cells(client.execute(env=dict(os.environ)))] == stored  # what is shown is stored
