"""Where the text comes from changes nothing: back end, local disk or server, cache; and several corpora are one run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mlm_dist.cli import main
from mlm_dist.data.manifest import Manifest
from mlm_dist.files import read_json_lines
from tests.corpora import documents, save_corpus
from tests.e2e.program import Program, losses, save_config
from tests.http_server import Server

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def data_hash(capsys: pytest.CaptureFixture[str]):
    def run(config: Path, *flags: str, steps: str = "0:6") -> list[str]:
        assert main(["data", "hash", "--config", str(config), "--steps", steps, *flags]) == 0
        out = capsys.readouterr()
        assert "note:" not in out.err
        return out.out.splitlines()

    return run


def sources(folder: Path, weights: list[float] | None = None, **first: object) -> list[dict[str, object]]:
    """Two corpora of which shards and members have the same names."""
    out: list[dict[str, object]] = []
    for i, texts in enumerate((documents(120, seed=5, longest=40), documents(90, seed=6))):
        out.append({"manifest": str(save_corpus(folder / f"corpus-{i}", texts))})
        if weights:
            out[-1]["weight"] = weights[i]
    out[0].update(first)
    return out


def test_back_ends_give_the_same_hash(tmp_path: Path, data_hash) -> None:
    config = save_config(tmp_path)
    reference = data_hash(config, "--data.tokenizer_backend", "hf")
    for backend in ("nano", "auto"):
        assert data_hash(config, "--data.tokenizer_backend", backend) == reference


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_server_and_a_cache_change_nothing(tmp_path: Path, data_hash) -> None:
    config = save_config(tmp_path)
    reference = data_hash(config)
    cache = ["--data.cache_dir", str(tmp_path / "cache")]
    with Server(tmp_path / "corpus") as server:
        remote = ["--data.manifest", f"{server.url}/manifest.json"]
        assert data_hash(config, *remote) == reference
        assert data_hash(config, *remote, "--workers", "2", "--world-size", "3") == reference
        server.fail("/manifest-00001.tar", "reset", times=3)
        server.fail("/manifest-00002.tar", "status", times=2)
        assert data_hash(config, *remote, *cache) == reference
        before = server.bytes_sent
        assert data_hash(config, *remote, *cache, "--workers", "2") == reference
        assert server.bytes_sent - before < Manifest.read(tmp_path / "corpus" / "manifest.json").num_bytes / 10
    assert data_hash(config, *cache) == reference


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_mixture_is_the_same_for_any_ranks_and_workers(tmp_path: Path, data_hash) -> None:
    for name, weights in (("whole", None), ("weighted", [1.0, 3.0])):
        config = save_config(tmp_path, data={"manifest": "", "sources": sources(tmp_path, weights)})
        reference = data_hash(config, steps="0:12")
        assert len({line.split("ids")[-1] for line in reference}) == 13, name
        for world, workers in ((3, 0), (2, 2)):
            flags = ["--world-size", str(world), "--workers", str(workers)]
            assert data_hash(config, *flags, steps="0:12") == reference, name


def test_a_mixture_takes_its_words_from_both_by_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents of the second corpus are told by a word that only they have."""
    texts = (["the of and to"] * 400, ["which which which which"] * 400)
    listed = [
        {"manifest": str(save_corpus(tmp_path / f"corpus-{i}", part)), "weight": weight}
        for i, (part, weight) in enumerate(zip(texts, (1.0, 3.0), strict=True))
    ]
    listed[1]["mask_rate"] = 0.5
    config = save_config(tmp_path, data={"manifest": "", "sources": listed}, train={"global_batch": 64})
    marked = {0: 0, 1: 0}
    words = {0: 0, 1: 0}
    for step in range(12):
        assert main(["data", "show", "--config", str(config), "--step", str(step), "--rows", "64"]) == 0
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  "):
                source = int("which" in line)
                inner = line.split()[1:-1]
                words[source] += len(inner)
                marked[source] += sum("{" in word for word in inner)
    share = words[1] / (words[0] + words[1])
    assert 0.65 < share < 0.85
    assert marked[0] / words[0] == pytest.approx(0.15, abs=0.04)
    assert marked[1] / words[1] == pytest.approx(0.5, abs=0.04)


def test_a_mixture_that_was_killed_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    config = save_config(
        tmp_path,
        data={"manifest": "", "sources": sources(tmp_path, [2.0, 1.0], mask_rate=0.3)},
        mask={"strategy": "span", "rate_schedule": "linear", "rate_end": 0.3, "rate_steps": 20},
        train={"steps": 30},
    )
    runs = tmp_path / "runs"
    Program(config, 2, ["--run.name", "whole"]).start().finish()
    killed = Program(config, 2, ["--data.workers", "2"]).start()
    killed.wait_for_step(runs / "run", 8)
    killed.kill()
    assert max(losses(runs / "run")) < 30
    Program(config, 2).start().finish()
    assert losses(runs / "run") == losses(runs / "whole")
    # Other weights would be other data.
    changed = yaml.safe_load(config.read_text())
    changed["data"]["sources"][0]["weight"] = 1.5
    config.write_text(yaml.safe_dump(changed))
    again = Program(config, 2)
    assert again.start().wait() == [2, 2]
    assert "weight[0]" in again.output() and "2.0" in again.output() and "1.5" in again.output()


def test_a_shard_lost_within_the_limit_is_said_and_in_the_ledger(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"max_bad_fraction": 0.4}, train={"steps": None, "epochs": 2})
    manifest = Manifest.read(tmp_path / "corpus" / "manifest.json")
    gone = manifest.shards[1]
    (tmp_path / "corpus" / gone.path).unlink()
    run = Program(config, 2).start().finish()
    assert f"shard {gone.path} of data.manifest" in run.log(0).read_text()
    lost = [e for e in read_json_lines(tmp_path / "runs" / "run" / "events.jsonl") if e["kind"] == "data_loss"]
    assert {e["shard"] for e in lost} == {gone.path} and {e["source"] for e in lost} == {0}
    assert sum(e["documents"] for e in lost) == 2 * gone.documents.sum()
    assert sorted((e["epoch"], e["offset"]) for e in lost) == [(e, o) for e in (0, 1) for o in gone.offsets.tolist()]
    # The limit is a limit: from the start, and for what was lost before.
    strict = Program(config, 2, ["--run.name", "strict", "--data.max_bad_fraction", "0.1"])
    assert strict.start().wait() == [2, 2]
    assert re.search(rf"{gone.documents.sum()} of {manifest.num_documents} documents", strict.output())


def test_what_index_could_not_read_is_said_and_counted(tmp_path: Path) -> None:
    config = save_config(tmp_path, data={"max_bad_fraction": 0.05})
    shutil.rmtree(tmp_path / "corpus")
    texts = documents(100)
    (tmp_path / "corpus").mkdir()
    import io
    import tarfile

    with tarfile.open(tmp_path / "corpus" / "a.tar", "w") as tar:
        for i, text in enumerate(texts):
            payload = b"\xff\xfe" if i in (3, 50) else json.dumps({"text": text}).encode()
            info = tarfile.TarInfo(f"{i}.json")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    assert main(["index", str(tmp_path / "corpus"), "--output", str(tmp_path / "corpus" / "manifest.json")]) == 0
    flags = ["--data.val_manifest", "null"]
    run = Program(config, 1, flags).start().finish()
    said = run.log(0).read_text()
    assert "2 documents in" in said and "not UTF-8" in said
    events = list(read_json_lines(tmp_path / "runs" / "run" / "events.jsonl"))
    known = [e["known_losses"] for e in events if e["kind"] == "attempt"]
    assert [k[0]["documents"] for k in known] == [2]
    strict = Program(config, 1, [*flags, "--run.name", "strict", "--data.max_bad_fraction", "0.01"])
    assert strict.start().wait() == [2]
    assert "could not read 2 more" in strict.output()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"sources": []}, "data.sources: the list is empty"),
        ({"sources": [{"manifest": "a", "weight": 1.0}, {"manifest": "b"}]}, r"data.sources\[1\].weight: missing"),
        ({"sources": [{"manifest": "a", "weight": -1.0}]}, r"data.sources\[0\].weight: -1.0 must be positive"),
        ({"sources": [{"manifest": "a", "mask_rate": 2.0}]}, r"data.sources\[0\].mask_rate: 2.0"),
        ({"sources": [{"manifest": ""}]}, r"data.sources\[0\].manifest: missing"),
        ({"sources": [{"manifest": "a", "wheight": 1.0}]}, "data.sources.*wheight"),
        ({"manifest": "a", "sources": [{"manifest": "b"}]}, "data.manifest is 'a' too"),
        ({"sources": [{"manifest": "absent.json"}]}, "absent.json"),
        ({"cache_size": "lots"}, "data.cache_size: 'lots' is not a size"),
        ({"read_retries": -1}, "data.read_retries: -1"),
        ({"read_timeout": 0.0}, "data.read_timeout: 0.0"),
        ({"tokenizer_backend": "fast"}, "data.tokenizer_backend: 'fast' is wrong; it must be one of auto, hf, nano"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict, says: str) -> None:
    config = save_config(tmp_path, data={**({"manifest": ""} if "sources" in data else {}), **data})
    assert main(["data", "hash", "--config", str(config)]) == 2
    assert re.search(says, capsys.readouterr().err)
