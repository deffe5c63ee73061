"""The notebook of examples/ runs, and prints what is saved in it."""

import math
import platform
import re
from pathlib import Path

import nbformat
import pytest

from tests.docs.notebook import PATH, execute

NUMBER = re.compile(r"\d[\d,]*\.?\d*")


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell prints."""
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def test_what_is_saved_is_small_and_names_no_machine() -> None:
    content = PATH.read_text()
    assert len(content) < 200_000
    assert not re.search(r'/(tmp|home|root|work|usr)/|"iopub', content)
    saved = nbformat.read(PATH, 4)
    assert all(cell.execution_count for cell in saved.cells if cell.cell_type == "code")
    assert not [o for cell in saved.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]


@pytest.mark.timeout(600)
def test_it_prints_what_is_saved(tmp_path: Path) -> None:
    saved = nbformat.read(PATH, 4)
    again = execute(nbformat.read(PATH, 4), tmp_path)
    if platform.python_version() != saved.metadata.language_info.version:
        pytest.skip(
            f"all cells run; the text is that of Python {saved.metadata.language_info.version}, which has other documents"
        )
    for before, now in zip(printed(saved), printed(again), strict=True):
        assert NUMBER.sub("0", now) == NUMBER.sub("0", before)
        for one, other in zip(numbers(before), numbers(now), strict=True):
            assert math.isclose(one, other, rel_tol=2e-3, abs_tol=2e-3), (before, now)
