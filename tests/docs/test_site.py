"""The site builds strictly, and shows what the pages say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT


def build(root: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    # Without --quiet, under which mkdocs counts no warnings and --strict means nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run([*command, str(site)], capture_output=True, text=True, timeout=120, env=env)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of each built page -> its HTML."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {str(page.relative_to(folder)): page.read_text() for page in folder.rglob("*.html")}


def test_every_page_is_there(site: dict[str, str]) -> None:
    written = {str(p.relative_to(ROOT / "docs").with_suffix(".html")) for p in (ROOT / "docs").rglob("*.md")}
    assert set(site) == written | {"404.html"}


def test_a_reader_loads_nothing_from_elsewhere(site: dict[str, str]) -> None:
    for name, html in site.items():
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html):
            assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", tag) or "canonical" in tag, (name, tag)


def test_lists_and_tables_are_lists_and_tables(site: dict[str, str]) -> None:
    """GitHub takes a list without an empty line before it; the site would run it into the paragraph."""
    for name, html in site.items():
        for _, text in re.findall(r"<(p|li|td)>(.*?)</\1>", html, re.DOTALL):
            assert not re.search(r"^(- |\d+\. |\|.*\||```)", text, re.MULTILINE), (name, text[:300])


@pytest.mark.parametrize("link", ["nowhere.md", "runs.md#nowhere", "/runs.md", "../README.md"])
def test_a_link_that_leads_nowhere_is_an_error(link: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config["nav"] = ["index.md", "runs.md"]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/runs.md").write_text("# Runs\n")
    page = tmp_path / "docs/index.md"
    page.write_text("[good](runs.md#runs)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    shutil.rmtree(tmp_path / "site")
    page.write_text(f"[bad]({link})\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and link in done.stdout + done.stderr
