"""An export in other programs' hands: transformers in other types, ONNX Runtime, sentence-transformers, the hub."""

import argparse
import base64
import importlib.util
import json
import re
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_dist import export as export_module
from mlm_dist import export_check, export_onnx
from mlm_dist.errors import UserError
from mlm_dist.export import export, find, load
from tests.unit.test_export import make_model, make_tokenizer, write_checkpoint
from tests.unit.test_report_run import spoil


def make_run(path: Path) -> Path:
    """A run with one checkpoint, after 20 steps, and a metric line."""
    (path / "checkpoints").mkdir(parents=True)
    model = make_model(2)
    model.config.save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "tokenizer")
    lines = [
        {"kind": "train", "step": s, "loss": 4.0 - s / 20, "time": 1.79e9 + s, "step_time": 1.0} for s in (10, 20, 30)
    ]
    lines += [{"kind": "val", "step": s, "loss": 3.5 - s / 20, "time": 1.79e9 + s} for s in (10, 20, 30)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "events.jsonl").write_text(
        json.dumps({"kind": "attempt", "time": 1.79e9, "step": 0, "documents": [1234]}) + "\n"
    )
    (path / "identity.json").write_text(json.dumps({"identity": {"data.manifest": "f00d"}, "guarded": {}}))
    write_checkpoint(path, model, 20, ledger=[{"documents": 3}, {"documents": 4}])
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def told(run_dir: Path) -> list[str]:
    """What the one export with everything said."""
    lines: list[str] = []
    export(run_dir, onnx=True, say=lines.append)
    return lines


@pytest.fixture(scope="module")
def directory(run_dir: Path, told: list[str]) -> Path:
    return run_dir / "export"


def padded(rows: list[int], length: int) -> dict[str, torch.Tensor]:
    """Rows of so many random tokens."""
    generator = torch.Generator().manual_seed(sum(rows) * length)
    mask = torch.tensor([[int(i < n) for i in range(length)] for n in rows])
    ids = torch.randint(5, 17, (len(rows), length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize(("rows", "length"), [([2], 2), ([16, 3, 9], 16), ([1, 5], 5), ([4] * 9, 11)])
def test_onnx_runtime_computes_the_same_logits_on_padded_batches_of_any_shape(
    directory: Path, rows: list[int], length: int
) -> None:
    import onnxruntime
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    batch = padded(rows, length)
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert set(names) == set(AutoTokenizer.from_pretrained(directory)("the cat"))
    (logits,) = session.run(["logits"], {name: batch[name].numpy() for name in names})
    with torch.inference_mode():
        expected = AutoModelForMaskedLM.from_pretrained(directory).eval()(**batch).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(logits)[kept], expected[kept], atol=1e-4, rtol=0)


def test_what_differs_is_refused(
    directory: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The graph, the weights and the embeddings are held against a model with one other bias."""
    model, tokenizer = load(find(run_dir))
    tokenizer.model_max_length = 16
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.bias[0] += 0.01
    assert export_check.onnx_difference(directory / "model.onnx", model, tokenizer) > 1e-4
    with pytest.raises(RuntimeError, match=r"logits of transformers differ by .*, more than 0\.0001"):
        list(export_check.report(directory, model, tokenizer))
    assert export_check.sentence_transformers_difference(directory, model, tokenizer) > 1e-5

    class Graph:
        def save(self, path: Path) -> None:
            path.write_bytes((directory / "model.onnx").read_bytes())

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Graph())
    with pytest.raises(RuntimeError, match="ONNX Runtime differ"):
        export_onnx.write(tmp_path, model, tokenizer)


def test_the_check_says_how_close_each_program_is(told: list[str]) -> None:
    assert [line.partition(":")[0] for line in told] == ["transformers", "sentence-transformers", "ONNX Runtime"]
    for line, most in zip(told, (1e-4, 1e-5, 1e-4), strict=True):
        found = re.search(r"within (\S+) ", line)
        assert found and 0 <= float(found[1]) <= most


def test_compared_batches_are_padded_and_within_the_model(directory: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = list(export_check.batches(AutoModelForMaskedLM.from_pretrained(directory), tokenizer))
    assert len({b["input_ids"].shape for b in found}) > 4 and any(not b["attention_mask"].all() for b in found)
    for batch in found:
        assert batch["input_ids"].shape[1] <= 16 and batch["input_ids"].max() < len(tokenizer)
        assert batch["attention_mask"].sum(1).min() > 1
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_sentence_transformers_averages_the_same_last_layer(directory: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    texts = ["the cat sat on a mat.", "a dog", "the mouse ran on the house . the dogs sat"]
    embeddings = SentenceTransformer(str(directory), device="cpu").encode(texts, convert_to_tensor=True)
    batch = AutoTokenizer.from_pretrained(directory)(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_types_are_the_rounded_checkpoint(run_dir: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    from transformers import AutoModelForMaskedLM

    lines: list[str] = []
    loaded = AutoModelForMaskedLM.from_pretrained(export(run_dir, tmp_path / "out", dtype=name, say=lines.append))
    expected = dict(make_model(2).named_parameters())
    assert loaded.dtype == dtype and lines
    for key, value in loaded.named_parameters():
        assert torch.equal(value.view(torch.int16), expected[key].to(dtype).view(torch.int16))
    assert f"parameters, {name} |" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_had_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large"
    (path / "checkpoints").mkdir(parents=True)
    model = make_model(2)
    with torch.no_grad():
        model.cls.predictions.bias[3] = 1e6
    model.config.save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "tokenizer")
    write_checkpoint(path, model, 1)
    with pytest.raises(UserError, match=r"--dtype: fp16 cannot hold cls\.predictions\.bias"):
        export(path, dtype="fp16")
    with pytest.raises(UserError, match="--dtype: bf16 has no ONNX"):
        export(path, dtype="bf16", onnx=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find_spec(name, *a)
    )
    with pytest.raises(UserError, match=r"--onnx: onnxscript not installed; pip install 'mlm-dist\[onnx\]'"):
        export(path, onnx=True)
    assert not (path / "export").exists()


def test_the_card_tells_data_curves_metrics_and_limits_of_that_step(directory: Path) -> None:
    text = (directory / "README.md").read_text()
    for link in re.findall(r"!?\[[^]]*\]\(([^)]+)\)", text):
        assert (directory / link).read_bytes().startswith(b"\x89PNG") and "/" not in link
    assert "![" in text
    for row in (
        "| Fingerprint | `f00d` |",
        "| Documents | 1,234 |",
        "| Documents lost to faults | 7 |",
        "| Training loss | 3.0000 nats per masked token (step 20) |",
        "| 10 | 3.0000 |  |  |",
        "| 20 | 2.5000 (best) |  |  |",
    ):
        assert row in text.splitlines(), row
    assert "| 30 |" not in text  # of after the checkpoint
    assert "## Limitations" in text and "longer than 16 tokens" in text
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
    assert modes["model.safetensors"] == modes["README.md"]


def test_no_odd_file_of_the_run_stops_an_export(tmp_path: Path) -> None:
    path = make_run(tmp_path / "odd")
    (path / "events.jsonl").unlink()
    spoil(path)
    text = (export(path) / "README.md").read_text()
    assert "| Training loss | 3.0000 nats per masked token (step 20) |" in text.splitlines()
    (path / "metrics.jsonl").unlink()
    (path / "config.yaml").write_text("data: {sources: 3, manifest: [1]}\n")
    assert "| Metrics | not recorded |" in (export(path) / "README.md").read_text()


def test_the_card_tells_the_devices_and_no_directory_of_this_machine(tmp_path: Path) -> None:
    path = make_run(tmp_path / "alice" / "tiny")
    (path / "env.json").write_text(json.dumps({"device": "NVIDIA H100", "devices": 4, "python": "3.11"}))
    config = {
        "run": {"dir": "/home/alice"},
        "data": {
            "manifest": None,
            "sources": [
                {"manifest": "/home/alice/secret/project/wiki/manifest.json"},
                {"manifest": "file:///home/alice/m.json"},
                {"manifest": "s3://bucket/home/m.json"},
                {"manifest": "data/alike/m.json"},
            ],
            "tokenizer": "~alice/tokenizer",
        },
        "deepspeed": {"config": "--x=/scratch/alice/jobs/zero.json, /tmp/alice/y"},
    }
    (path / "config.yaml").write_text(json.dumps(config))
    text = (export(path) / "README.md").read_text()
    assert "| Devices | 4 x NVIDIA H100 |" in text and "| Python | 3.11 |" in text
    shown = "`…/wiki/manifest.json`, `…/m.json`, `s3://bucket/home/m.json`, `data/alike/m.json`"
    assert f"| Data | {shown} |" in text and "…/jobs/zero.json" in text and "tokenizer: …/tokenizer" in text
    assert not [hidden for hidden in ("/home/alice", "alice/", "secret", str(tmp_path)) if hidden in text]


# The hub: huggingface_hub's own client, with a server of this machine instead of huggingface.co.


class FakeHub(ThreadingHTTPServer):
    """Answers what an upload asks for and keeps what it is sent: (path, body, token) of each request, files of commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, Any, str]] = []
        self.files: dict[str, bytes] = {}
        self.message = ""
        self.status = 200


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def answer(self, body: bytes) -> None:
        hub, url = self.server, f"{self.server.url}/me/tiny"
        lines = [json.loads(line) for line in body.splitlines()]
        hub.requests.append((self.path, lines, self.headers.get("Authorization", "")))
        reply: Any = {}
        if self.path == "/api/whoami-v2":
            reply = {"name": "me", "type": "user", "auth": {}}
        elif self.path == "/api/repos/create":
            reply = {"url": url, "id": "me/tiny", "name": "me/tiny"}
        elif self.path.startswith("/api/models/me/tiny/preupload/"):
            reply = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]
                ]
            }
        elif self.path.startswith("/api/models/me/tiny/tree/"):
            reply = [{"type": "file", "path": p, "size": len(b), "oid": "0"} for p, b in hub.files.items()]
        elif self.path.startswith("/api/models/me/tiny/commit/"):
            for line in lines:
                if line["key"] == "deletedFile":
                    del hub.files[line["value"]["path"]]
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "header":
                    hub.message = line["value"]["summary"]
            reply = {"commitUrl": f"{url}/commit/abc", "commitOid": "abc"}
        content = json.dumps(reply).encode()
        self.send_response(hub.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()
        thread.join()


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    export_module.add_arguments(parser)
    return export_module.run(parser.parse_args(words))


def test_an_export_goes_to_the_hub_as_it_was_verified(
    run_dir: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stale = ("model.onnx", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    others = {".gitattributes": b"*.onnx", "LICENSE": b"MIT", "onnx/model.onnx": b"mine"}
    hub.files = {**others, **dict.fromkeys(stale, b"of an earlier export")}
    assert command(str(run_dir), "--output", str(out), "--push-to-hub", "me/tiny", "--private") == 0
    assert hub.files == others | {p.name: p.read_bytes() for p in out.iterdir()} and "model.safetensors" in hub.files
    assert hub.message == "Step 20 of tiny"
    assert {token for path, _, token in hub.requests if "/me/tiny/" in path or "repos" in path} == {"Bearer hf_secret"}
    ((_, (wanted,), _),) = [r for r in hub.requests if r[0] == "/api/repos/create"]
    assert wanted["name"] == "tiny" and wanted["organization"] == "me"
    assert wanted.get("private") is True or wanted.get("visibility") == "private"
    assert capsys.readouterr().out.splitlines() == [str(out), f"{hub.url}/me/tiny"]


def test_the_hub_is_asked_before_anything_is_made(
    run_dir: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = (str(run_dir), "--output", str(out), "--push-to-hub")
    with pytest.raises(UserError, match=r"--push-to-hub: 'a/b/c' must be NAME or OWNER/NAME"):
        command(*words, "a/b/c")
    hub.status = 401
    with pytest.raises(UserError, match=r"--push-to-hub: me/tiny: the hub refuses"):
        command(*words, "me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        command(*words, "me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "of someone else")
    with pytest.raises(UserError, match=r"no token; .* as HF_TOKEN"):
        command(*words, "me/tiny")
    with pytest.raises(UserError, match="--private: is for --push-to-hub"):
        command(str(run_dir), "--private")
    assert not out.exists() and [path for path, _, _ in hub.requests] == ["/api/whoami-v2"]


@pytest.mark.parametrize("token", ["hf_one\nhf_two", "hf_one two", "hf_\u00e9t\u00e9", "hf_\x7f"])
def test_a_token_that_can_be_none_is_refused_and_not_shown(
    run_dir: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=r"HF_TOKEN: must be printable ASCII") as caught:
        command(str(run_dir), "--push-to-hub", "me/tiny")
    assert "hf_" not in str(caught.value) and not hub.requests


def test_an_error_that_holds_the_token_is_told_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_dist.export_hub import Hub

    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def fail(_: Any) -> None:
        raise OSError("no route for Bearer hf_secret")

    with pytest.raises(UserError, match=r"no route for Bearer \*\*\*"):
        Hub("me/tiny")._asking(fail)


def test_rounding_leaves_the_rotary_frequencies_as_whoever_loads_the_export_computes_them(tmp_path: Path) -> None:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=24, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = ModernBertForMaskedLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    path = tmp_path / "modern"
    (path / "checkpoints").mkdir(parents=True)
    config.save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "tokenizer")
    write_checkpoint(path, model, 1)
    lines: list[str] = []
    export(path, dtype="bf16", say=lines.append)
    assert lines[0].startswith("transformers: logits within 0.0e+00")
