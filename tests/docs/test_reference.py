"""The reference is what the code says: config keys, commands, and the lines of a run's files."""

import argparse
import ast
import importlib
import json
import re
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest

from docs import generate
from launcher.cli import make_parser as launch_parser
from mlm_dist.checkpoint.writer import Failure
from mlm_dist.cli import COMMANDS
from mlm_dist.config import known_keys
from mlm_dist.data.block import DataFault
from mlm_dist.data.manifest import Manifest
from mlm_dist.stragglers import Straggler
from tests.corpora import documents, save_corpus
from tests.docs.shell import PAGES
from tests.ranks import ROOT

# Names of files, which look like keys.
FILES = ("jsonl", "json", "yaml", "py", "safetensors", "sbatch", "onnx", "csv", "tsv", "txt")


@pytest.mark.parametrize("name", ["config.md", "cli.md"])
def test_the_page_is_what_the_code_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert (ROOT / "docs/reference" / name).read_text() == generate.pages()[name], "make docs"


def test_every_key_is_in_the_page() -> None:
    page = (ROOT / "docs/reference/config.md").read_text()
    assert re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE) == known_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_is_one(page: Path) -> None:
    sections = {key.split(".")[0] for key in known_keys()}
    for section, key in re.findall(r"`(?:--)?(\w+)\.([a-z_]+)\b(?![./(*])", page.read_text()):
        if section in sections and key not in FILES:
            assert f"{section}.{key}" in known_keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_flag_in_the_text_is_one(page: Path) -> None:
    for text in re.findall(r"`((?:mlm-dist|mlm-launch) [^`]+)`", page.read_text()):
        known = flags(text.split())
        assert known is not None, text
        for flag in re.findall(r"(?<= )--?[a-zA-Z][\w.-]*", text):
            assert flag in known or flag.removeprefix("--") in known_keys(), (text, flag)


def flags(words: list[str]) -> set[str] | None:
    """The flags of the command that ``words`` begin with; None where there is no such command."""
    if words[0] == "mlm-launch":
        found = [p for a in launch_parser()._actions for p in (a.choices or {}).items()]
        parsers = [parser for name, parser in found if re.fullmatch(words[1].strip("{}").replace(",", "|"), name)]
    elif words[1] == "train":
        return {"--config", "--allow_change", "--allow-change"}
    else:
        names = [name for name in COMMANDS if name in (words[1], " ".join(words[1:3]))]
        parsers = [argparse.ArgumentParser() for _ in names]
        for name, parser in zip(names, parsers, strict=True):
            importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    below = [
        p for parser in parsers for a in parser._actions if isinstance(a.choices, dict) for p in a.choices.values()
    ]
    return {f for p in (*parsers, *below) for a in p._actions for f in a.option_strings} if parsers else None


def test_trainers_flags_are_trainers() -> None:
    from transformers import TrainingArguments

    _, _, table = (ROOT / "docs/from_run_mlm.md").read_text().partition("| Trainer | here |")
    named = {flag for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for flag in re.findall(r"`--(\w+)`", row)}
    assert len(named) > 25
    assert named <= {f.name for f in fields(TrainingArguments)}


def tables(page: str) -> dict[str, dict[str, set[str]]]:
    """Section -> first cell of a row -> the names in its second cell."""
    found: dict[str, dict[str, set[str]]] = {}
    for section in re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)
        found[section.split("\n", 1)[0]] = {kind: set(re.findall(r"`(\w+)`", cell)) for kind, cell in rows}
    return found


def texts(value: ast.expr | None, module: ast.Module) -> set[str]:
    """What an expression of the code may be: a text, one of two, or what a variable of the module is set to."""
    if isinstance(value, ast.IfExp):
        return texts(value.body, module) | texts(value.orelse, module)
    if isinstance(value, ast.Name):
        found = [n for n in ast.walk(module) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == value.id]
        return {text for node in found for text in texts(node.value, module)}
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def written() -> dict[str, set[str]]:
    """Kind -> the keys that stand beside it where the code makes such a line."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "mlm_dist").rglob("*.py")):
        module = ast.parse(path.read_text())
        for node in ast.walk(module):
            if isinstance(node, ast.Dict):
                pairs = {
                    ast.literal_eval(k): v
                    for k, v in zip(node.keys, node.values, strict=True)
                    if isinstance(k, ast.Constant)
                }
                for kind in texts(pairs.get("kind"), module):
                    found[kind] |= set(map(str, pairs)) - {"kind"}
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
    page = (ROOT / "docs/manifest.md").read_text()
    told = set(re.findall(r"`(?:shards\[\]\.)?(\w+)`", page))
    content = json.loads(save_corpus(tmp_path, documents(20)).read_text())
    names = {*content, *content["shards"][0], *content["shards"][0]["blocks"]}
    assert names <= told
    shown = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])  # type: ignore[index]
    assert set(shown) == set(content) and set(shown["shards"][0]) == set(content["shards"][0])
    assert Manifest.read(tmp_path / "manifest.json").num_documents == 20
