"""docs/reliability.md: every row names tests, and they exist."""

import re

import pytest

from tests.ranks import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "|---"))]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_names_tests_that_exist(row: str) -> None:
    cell = row.rstrip("| ").rpartition("| ")[2]
    named = re.findall(r"`([^`]+)`", cell)
    assert named or cell == "the same" or cell.startswith("the same, and"), row
    path = ""
    for name in named:
        file, _, test = name.partition("::")
        path = file or path  # `::test` is in the file named before
        target = ROOT / "tests" / path
        assert target.is_file(), name
        assert not test or re.search(rf"^def {test}\(", target.read_text(), re.MULTILINE), name


def test_there_are_rows() -> None:
    assert len(ROWS) > 30


@pytest.mark.parametrize("page", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_every_test_that_a_page_names_exists(page: str) -> None:
    for file, test in re.findall(r"([\w/]+\.py)::(test_\w+)", (ROOT / "docs" / page).read_text()):
        target = ROOT / "tests" / file.removeprefix("tests/")
        assert target.is_file() and re.search(rf"^def {test}", target.read_text(), re.MULTILINE), f"{file}::{test}"
