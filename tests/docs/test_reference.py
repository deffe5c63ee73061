"""The reference is what the code says: config keys, commands, and the lines of a run's files."""

import ast
import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest

from docs import generate
from mlm_dist.checkpoint.writer import Failure
from mlm_dist.config import known_keys
from mlm_dist.data.block import DataFault
from mlm_dist.data.manifest import Manifest
from mlm_dist.stragglers import Straggler
from tests.corpora import documents, save_corpus
from tests.ranks import ROOT


@pytest.mark.parametrize("name", ["config.md", "cli.md"])
def test_the_page_is_what_the_code_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert (ROOT / "docs/reference" / name).read_text() == generate.pages()[name], "make docs"


def test_every_key_is_in_the_page() -> None:
    page = (ROOT / "docs/reference/config.md").read_text()
    assert re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE) == known_keys()


def tables(page: str) -> dict[str, dict[str, set[str]]]:
    """Section -> first cell of a row -> the names in its second cell."""
    found: dict[str, dict[str, set[str]]] = {}
    for section in re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
        found[section.split("\n", 1)[0]] = {kind: set(re.findall(r"`(\w+)`", cell)) for kind, cell in rows}
    return found


def written() -> dict[str, set[str]]:
    """Kind -> the keys that stand beside it where the code makes such a line."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "mlm_dist").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "kind":
                        kinds = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant)]
                        for kind in kinds:
                            found[str(kind)] |= {str(k) for k in keys} - {"kind"}
    return dict(found)


def test_every_line_that_the_code_writes_is_in_the_page() -> None:
    page = tables("events.md")
    told = {**page["events.jsonl"], **page["metrics.jsonl"]}
    assert set(written()) == set(told)
    for kind, keys in written().items():
        assert keys - {"step"} <= told[kind], kind


def test_what_is_spread_into_lines_is_in_the_page() -> None:
    page = tables("events.md")["events.jsonl"]
    for kind, owner in (("data_loss", DataFault), ("straggler", Straggler)):
        assert {f.name for f in fields(owner)} <= page[kind], kind
    assert {f.name for f in fields(Failure)} - {"end"} <= page["checkpoint_failed"]


def test_every_line_of_jobs_is_in_the_page() -> None:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "launcher").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jobs.record":
                event = ast.literal_eval(node.args[1])
                found[event] = {str(k.arg) for k in node.keywords} - {"lineage"}
    assert found == tables("events.md")["jobs.jsonl"]


def test_every_field_of_a_manifest_is_in_the_page(tmp_path: Path) -> None:
    import json

    page = (ROOT / "docs/manifest.md").read_text()
    told = set(re.findall(r"`(?:shards\[\]\.)?(\w+)`", page))
    content = json.loads(save_corpus(tmp_path, documents(20)).read_text())
    names = {*content, *content["shards"][0], *content["shards"][0]["blocks"]}
    assert names <= told
    shown = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    assert set(shown) == set(content) and set(shown["shards"][0]) == set(content["shards"][0])
    assert Manifest.read(tmp_path / "manifest.json").num_documents == 20
