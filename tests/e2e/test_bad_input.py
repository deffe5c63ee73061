"""The user's mistakes: one message that names the thing, exit code 2, no traceback, and no model built for nothing.

A start costs seconds, most of them imports, so one process calls the program's ``main`` for many cases; real starts check that what it
returns is what a shell sees.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.program import Program, save_config
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(300)

# Reads cases from stdin, one a line; prints what became of each.
CALLER = """
import contextlib, io, json, os, sys, traceback
from mlm_dist import distributed, train
from mlm_dist.model import bert

def built(*args, **kwargs):
    raise AssertionError("a model was built")

def joined(*args, **kwargs):
    raise AssertionError("the job was joined")

bert.build, join, environ = built, distributed.init, dict(os.environ)
for line in sys.stdin:
    case = json.loads(line)
    os.environ.clear()
    os.environ.update({**environ, **case["env"]})
    distributed.init = join if case["joins"] else joined
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            code = train.main(case["argv"])
        except BaseException:
            code = traceback.format_exc()
    print(json.dumps({"name": case["name"], "code": code, "output": out.getvalue()}), file=sys.__stdout__, flush=True)
"""


@dataclass
class Case:
    """One wrong start.

    Attributes:
        says: what the message must hold.
        flags: added to ``--config CONFIG``.
        prepare: makes things wrong first; gets the corpus directory, and gives flags.
        config: False leaves ``--config`` to the flags.
        joins: the mistake shows only in the run directory, which rank 0 reads for all ranks.
    """

    says: list[str]
    flags: list[str] = field(default_factory=list)
    prepare: Callable[[Path], list[str]] | None = None
    env: dict[str, str] = field(default_factory=dict)
    config: bool = True
    joins: bool = False


def edit(**changes: object) -> Callable[[Path], list[str]]:
    """A manifest with other contents."""

    def prepare(corpus: Path) -> list[str]:
        manifest = json.loads((corpus / "manifest.json").read_text())
        path = corpus / f"other-{'-'.join(changes)}.json"
        path.write_text(json.dumps({**manifest, **changes}))
        return ["--data.manifest", str(path)]

    return prepare


def without_shard(corpus: Path) -> list[str]:
    """A corpus that lost a shard."""
    copy = corpus.with_name("incomplete")
    shutil.copytree(corpus, copy, dirs_exist_ok=True)
    (copy / "manifest-00001.tar").unlink()
    return ["--data.manifest", str(copy / "manifest.json")]


def short_shard(corpus: Path) -> list[str]:
    """A corpus of which a shard was copied in part."""
    copy = corpus.with_name("short")
    shutil.copytree(corpus, copy, dirs_exist_ok=True)
    shard = copy / "manifest-00002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    return ["--data.manifest", str(copy / "manifest.json")]


def below_a_file(corpus: Path) -> list[str]:
    """A run directory that nobody can make, root included."""
    return ["--run.dir", str(corpus / "manifest.json")]


RANK_0_OF_40 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "40", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
CASES: dict[str, Case] = {
    "no --config": Case(["--config: missing"], config=False),
    "absent config": Case(["--config", "absent.yaml", "No such file"], ["--config", "absent.yaml"], config=False),
    "unknown flag": Case(
        ["unknown key '--train.global_bach'", "'--train.global_batch'"], ["--train.global_bach", "3"]
    ),
    "unknown variable": Case(
        ["unknown key 'MLM_OPTIM__LEARNING'", "MLM_OPTIM__"], env={"MLM_OPTIM__LEARNING": "1"}
    ),
    "wrong type": Case(["train.steps", "'many'", "whole number"], ["--train.steps", "many"]),
    "global batch 0": Case(["train.global_batch: 0"], ["--train.global_batch", "0"]),
    "global batch below the ranks": Case(["train.global_batch: 12", "40 ranks", "at least 40"], env=RANK_0_OF_40),
    "half a launcher": Case(["RANK is set", "WORLD_SIZE"], env={"RANK": "0"}),
    "absent manifest": Case(["absent.json", "mlm-dist prepare"], ["--data.manifest", "absent.json"]),
    "no shards": Case(["other-shards.json", "no shards"], prepare=edit(shards=[])),
    "no manifest": Case(["other-format.json", "format is 'else'"], prepare=edit(format="else")),
    "absent shard": Case(["manifest-00001.tar", "No such file"], prepare=without_shard),
    "short shard": Case(["manifest-00002.tar", "bytes"], prepare=short_shard),
    "absent validation manifest": Case(["absent.json"], ["--data.val_manifest", "absent.json"]),
    "absent tokenizer": Case(["data.tokenizer", "./absent"], ["--data.tokenizer", "./absent"]),
    "vocabularies that differ": Case(["vocabulary", "5,000", "vocab_size"], ["--model.config.vocab_size", "5000"]),
    "longer than the position table": Case(["data.seq_len 64", "position table", "32"], ["--data.seq_len", "64"]),
    "unknown size of the model": Case(["hidden_sise", "hidden_size"], ["--model.config.hidden_sise", "64"]),
    "absent checkpoint of a model": Case(
        ["model.name_or_path", "./absent"],
        ["--model.init", "pretrained", "--model.name_or_path", "./absent", "--model.config", "null"],
    ),
    "absent DeepSpeed config": Case(["deepspeed.config", "zero9"], ["--deepspeed.config", "zero9"]),
    "unwritable run directory": Case(
        ["run.dir", "manifest.json/run", "cannot be written"], prepare=below_a_file, joins=True
    ),
    "another seed": Case(["different config", "run.seed: the run has 0, this start has 5"], ["--run.seed", "5"], joins=True),
    "other lanes": Case(["data.lanes: the run has null, this start has 3"], ["--data.lanes", "3"], joins=True),
    "another depth": Case(["model.config.num_hidden_layers: the run has 2, this start has 3"], ["--model.config.num_hidden_layers", "3"], joins=True),
    "other data": Case(["data.manifest: the run has"], ["--data.manifest", "CORPUS/val.json"], joins=True),
    "more steps": Case(["train.steps: the run has 1, this start has 2", "--allow_change train.steps"], ["--train.steps", "2"], joins=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose run has been done."""
    path = save_config(tmp_path_factory.mktemp("bad"), train={"steps": 1})
    Program(path).start().finish()
    return path


def contents(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock-guard"}


@pytest.fixture(scope="module")
def outcomes(config: Path) -> dict[str, dict[str, object]]:
    """What became of each case, and of the run's directory."""
    corpus = config.parent / "corpus"
    lines = []
    for name, case in CASES.items():
        flags = [f.replace("CORPUS", str(corpus)) for f in case.flags] + (case.prepare(corpus) if case.prepare else [])
        argv = ["--config", str(config), *flags] if case.config else flags
        lines.append(json.dumps({"name": name, "argv": argv, "env": case.env, "joins": case.joins}))
    before = contents(config.parent / "runs")
    done = subprocess.run(
        [sys.executable, "-c", CALLER],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    out = {r["name"]: r for r in map(json.loads, done.stdout.splitlines())}
    out["the run"] = {"before": before, "after": contents(config.parent / "runs")}
    return out


@pytest.mark.parametrize("name", CASES)
def test_message_and_exit_code(outcomes: dict[str, dict[str, object]], name: str) -> None:
    got = outcomes[name]
    assert got["code"] == 2, got
    output = str(got["output"]).strip()
    assert output.startswith("error: ") and output.count("error: ") == 1, output
    assert "Traceback" not in output
    for text in CASES[name].says:
        assert text in output


def test_the_run_is_as_it_was(outcomes: dict[str, dict[str, object]]) -> None:
    """A refused start leaves no trace in the directory, and no lock."""
    assert outcomes["the run"]["after"] == outcomes["the run"]["before"]


def start(*words: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_real_start_with_an_unknown_key(config: Path) -> None:
    wrong = config.with_name("wrong.yaml")
    wrong.write_text(config.read_text().replace("global_batch", "gobal_batch"))
    code, output = start("-m", "mlm_dist.train", "--config", str(wrong))
    assert code == 2
    assert output.strip() == f"error: {wrong}: unknown key 'train.gobal_batch'. Did you mean 'train.global_batch'?"


def test_a_real_start_through_the_command(config: Path) -> None:
    """With more ranks than rows, one rank alone: it must not wait for the others."""
    code, output = start("-m", "mlm_dist.cli", "train", "--config", str(config), **RANK_0_OF_40)
    assert code == 2
    assert "error: train.global_batch: 12 rows cannot feed 40 ranks" in output and "Traceback" not in output
