"""Executes the notebook of examples/ and saves what it prints: `python -m tests.docs.notebook`."""

import os
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

from tests.ranks import ROOT

PATH = ROOT / "examples/notebook.ipynb"


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Run all cells in a new kernel that begins in ``folder``; a cell that fails raises. `timeout` in seconds, for each cell."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", PYDEVD_DISABLE_FILE_VALIDATION="1"):
        client = NotebookClient(notebook, timeout=timeout, record_timing=False, coalesce_streams=True)
        client.execute(cwd=str(folder))
    return notebook


if __name__ == "__main__":
    notebook = nbformat.read(PATH, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(execute(notebook, ROOT), PATH)
