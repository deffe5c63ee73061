"""The promises of docs/security.md that no other test keeps."""

import contextlib
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from mlm_dist import fill_mask
from mlm_dist.config import load
from mlm_dist.data.manifest import Manifest, Shard
from mlm_dist.data.tokenizer import load_pretrained
from mlm_dist.errors import UserError
from mlm_dist.inputs import DataInputs
from mlm_dist.model import pretrained
from mlm_dist.redact import redact
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.e2e.program import SIZES, Program, losses, save_config
from tests.http_server import Server
from tests.ranks import ROOT

pytestmark = pytest.mark.timeout(300)
PASSWORD = "hunter2-hunter2-hunter2"


# Manifests


def save_piped(folder: Path, ran: Path) -> Path:
    """A manifest whose one shard is the output of a command, which leaves the file ``ran``."""
    path = save_corpus(folder, documents(40, seed=3), shards=1)
    (whole,) = Manifest.read(path).shards
    data = (folder / whole.path).read_bytes()
    shard = Shard(
        path=f"pipe:touch {ran}; cat {folder / whole.path}",
        size=len(data),
        sha256=whole.sha256,
        offsets=np.array([0]),
        lengths=np.array([len(data)]),
        documents=np.array([whole.documents.sum()]),
        crc32=np.array([zlib.crc32(data)], np.uint32),
    )
    Manifest(folder, [shard], {}).write(path)
    return path


@pytest.mark.parametrize("key", ["manifest", "sources", "val_manifest"])
def test_no_manifest_runs_a_command_unless_that_is_allowed(tmp_path: Path, key: str) -> None:
    ran = tmp_path / "ran"
    piped, good = str(save_piped(tmp_path / "piped", ran)), str(save_corpus(tmp_path / "good", documents(40)))
    data: dict[str, Any] = {
        "manifest": {"manifest": piped, "val_manifest": None},
        "sources": {"manifest": "", "sources": [{"manifest": good}, {"manifest": piped}], "val_manifest": None},
        "val_manifest": {"manifest": good, "val_manifest": piped},
    }[key]
    config = save_config(tmp_path, data=data | {"max_bad_fraction": 1.0}, eval={"batch": 8})

    def causes(*flags: str) -> set[str]:
        """What the first batches lose, and why."""
        inputs = DataInputs(load(["--config", str(config), *flags]).config)
        streams = [inputs.stream(0, 1), inputs.val_stream(0, 1)]
        return {
            fault.cause
            for stream in streams
            if stream
            for batch in islice(stream.batches(), 8)
            for fault in batch.faults
        }

    (cause,) = causes()
    assert "set data.allow_pipe: true" in cause and not ran.exists()
    assert causes("--data.allow_pipe", "true") == set() and ran.exists()


@pytest.mark.parametrize(
    "path",
    ["../a.tar", "a/../../a.tar", "/etc/passwd", "%2e%2e/a.tar", "a/%2E%2e/b.tar", "file:///etc/passwd", "http://h/a"],
)
@pytest.mark.parametrize("fetched", [False, True])
def test_a_manifest_names_only_what_lies_below_it(tmp_path: Path, path: str, fetched: bool) -> None:
    where = save_corpus(tmp_path, documents(10), shards=1)
    content = json.loads(where.read_text())
    content["shards"][0]["path"] = path
    where.write_text(json.dumps(content))
    with Server(tmp_path) as server, pytest.raises(UserError, match=r"shard path .* is wrong"):
        Manifest.read(f"{server.url}/{where.name}" if fetched else where)


@pytest.mark.parametrize("root", ["http://127.0.0.1:9/d", "s3://bucket/d", "file:///etc", "/etc"])
def test_a_fetched_manifest_sends_nobody_to_another_place(tmp_path: Path, root: str) -> None:
    where = save_corpus(tmp_path, documents(10), shards=1)
    content = json.loads(where.read_text())
    where.write_text(json.dumps(content | {"root": root}))
    with Server(tmp_path) as server:
        with pytest.raises(UserError, match=r"on another server|must be the URL"):
            Manifest.read(f"{server.url}/{where.name}")
        where.write_text(json.dumps(content | {"root": server.url}))
        address = server.url.replace("http://", "http://user:pw@") + f"/{where.name}"
        assert Manifest.read(address).root == server.url


def test_a_link_in_the_data_directory_is_followed(tmp_path: Path) -> None:
    """Whoever may make one there may as well put the file there; no manifest and no archive can make one."""
    where = save_corpus(tmp_path / "data", documents(10), shards=1)
    (shard,) = Manifest.read(where).shards
    (tmp_path / "data" / shard.path).rename(tmp_path / "elsewhere.tar")
    (tmp_path / "data" / shard.path).symlink_to(tmp_path / "elsewhere.tar")
    assert Manifest.read(where).check_files() == []


# Models and tokenizers from elsewhere


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A directory as from a hub, with code of its own that leaves the file ``ran`` when it is imported."""
    path = save_tokenizer(tmp_path / "model")
    config = BertConfig(vocab_size=len(load_pretrained(str(path))), **SIZES)
    BertForMaskedLM(config).save_pretrained(path)
    (path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import BertConfig as EvilConfig, BertForMaskedLM as Evil, PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    maps = {
        "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModelForMaskedLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    }
    for name, auto_map in maps.items():
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    return path


@pytest.mark.parametrize("only", ["known classes", "classes of its own"])
def test_code_that_comes_with_a_model_or_tokenizer_is_not_run(
    poisoned: Path, tmp_path: Path, only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "n")
    if only == "classes of its own":  # which transformers has no other way to load
        for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
            content = json.loads((poisoned / name).read_text())
            (poisoned / name).write_text(json.dumps(content | {key: "evil", "architectures": ["Evil"]}))
    with contextlib.suppress(UserError):
        load_pretrained(str(poisoned))
    with contextlib.suppress(UserError):
        pretrained.load(str(poisoned), BertConfig(vocab_size=len(load_pretrained(str(poisoned))), **SIZES))
    with contextlib.suppress(UserError):
        fill_mask.load(str(poisoned))
    assert not (tmp_path / "ran").exists() and not asked
    # With trust it runs, in a process of its own, as it changes transformers' classes; so it would have been seen.
    code = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(poisoned)!r}, trust_remote_code=True)"
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
    assert (tmp_path / "ran").exists()


class _Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_weights_that_are_a_program_are_refused(poisoned: Path, tmp_path: Path, form: str) -> None:
    ran = tmp_path / "ran"
    (poisoned / "model.safetensors").unlink()
    file, payload = poisoned / "pytorch_model.bin", {"bert.x": _Shell(f"touch {ran}")}
    if form == "torch.save":
        torch.save(payload, file)
    else:
        file.write_bytes(pickle.dumps(payload))
    with pytest.raises(UserError, match="cannot be loaded"):
        pretrained.load(str(poisoned), BertConfig(vocab_size=len(load_pretrained(str(poisoned))), **SIZES))
    with pytest.raises(UserError, match="cannot be loaded"):
        fill_mask.load(str(poisoned))
    assert not ran.exists()


# Secrets and permissions


def test_a_password_in_an_address_stays_in_the_runs_own_config(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"val_manifest": None}, train={"steps": 2}, track={"wandb": "offline"})
    run = tmp_path / "runs" / "run"
    umask = "import os; os.umask(0o027)"
    with Server(tmp_path / "corpus") as server:
        address = server.url.replace("http://", f"http://user:{PASSWORD}@")
        text = config.read_text().replace(
            str(tmp_path / "corpus" / "manifest.json"), f"{address}/manifest.json?sig={PASSWORD}"
        )
        config.write_text(text)
        assert text.count(PASSWORD) == 2
        first = Program(config, 2, before=umask).start().finish()
        held = [path for path in run.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
        assert held == [run / "config.yaml"] and stat.S_IMODE(held[0].stat().st_mode) == 0o600
        assert PASSWORD not in first.output()
        assert not [path for path in run.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o027]
        assert any(path.suffix == ".wandb" for path in run.rglob("*"))
        own = tmp_path / "own.yaml"  # as its owner would: from the run's own copy, which is whole
        own.write_bytes((run / "config.yaml").read_bytes())
        Program(own, 2, ["--train.steps", "4", "--allow_change", "train.steps"], before=umask).start().finish()
        assert sorted(losses(run)) == [1, 2, 3, 4]
        server.fail("*", "status", status=403)
        again = Program(own, 1, ["--run.name", "other"])
        assert again.start().wait() == [2]
        assert "403" in again.output() and PASSWORD not in again.output()


def test_redact_knows_a_password_in_a_sentence() -> None:
    assert PASSWORD not in redact(f"data.manifest: 'https://me:{PASSWORD}@host/m.json?sig={PASSWORD}' cannot be read")


# Ports


def listening(pid: int) -> set[str]:
    """The addresses on which a process and all that it started listen."""
    family = [psutil.Process(pid)]
    family += family[0].children(recursive=True)
    found = set()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.parametrize("how", ["one process", "mlm-launch local"])
def test_a_run_of_one_host_listens_on_the_loopback_interface_alone(tmp_path: Path, how: str) -> None:
    config = save_config(tmp_path, data={"workers": 1}, train={"steps": 100_000}, track={"wandb": "offline"})
    run = tmp_path / "runs" / "run"
    start = {"one process": ["mlm_dist.cli", "train"], "mlm-launch local": ["launcher.cli", "local", "-n", "2"]}[how]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", *start, "--config", str(config)]
    with (tmp_path / "log").open("wb") as log:
        program = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while max(losses(run), default=0) < 2:
            assert program.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        assert listening(program.pid) == {"127.0.0.1"}
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 75
    finally:
        program.kill()
