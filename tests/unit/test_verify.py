import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlm_dist.data import verify as command
from mlm_dist.data.index import index
from mlm_dist.data.manifest import Manifest, Shard
from mlm_dist.data.verify import Problem, verify
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.http_server import Server
from tests.unit.test_index import IDS, npy, write_tar

TEXTS = documents(120)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest.read(save_corpus(tmp_path, TEXTS, shards=4))


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


def summary(problems: list[Problem]) -> list[tuple[str, str, int | None, int]]:
    return [
        (problem.shard.removeprefix("manifest-0000"), problem.kind, problem.offset, problem.documents)
        for problem in problems
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_is_well(manifest: Manifest, workers: int) -> None:
    assert verify(manifest, Store(manifest.root), workers=workers) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_each_problem_is_named_with_what_it_costs(manifest: Manifest, workers: int) -> None:
    shards = manifest.shards
    at = [shard.offsets.tolist() for shard in shards]
    docs = [shard.documents.tolist() for shard in shards]
    manifest.shard_path(0).unlink()
    change(manifest.shard_path(1), lambda data: data[: at[1][2] + 100])  # in the third block
    change(manifest.shard_path(2), lambda data: data[: at[2][1] + 600] + b"#" + data[at[2][1] + 601 :])
    change(manifest.shard_path(3), lambda data: data[: at[3][4]] + b"\xa5" * 4096 + data[at[3][4] + 4096 :])
    found = verify(manifest, Store(manifest.root), workers=workers)
    hit = [i for i, offset in enumerate(at[3]) if at[3][4] <= offset < at[3][4] + 4096]
    assert summary(found) == [
        ("0.tar", "unreadable", None, sum(docs[0])),
        ("1.tar", "size", None, 0),
        *[("1.tar", "block", offset, count) for offset, count in zip(at[1][2:], docs[1][2:], strict=True)],
        ("1.tar", "structure", at[1][2], 0),
        ("2.tar", "sha256", None, 0),
        ("2.tar", "block", at[2][1], docs[2][1]),
        ("3.tar", "sha256", None, 0),
        *[("3.tar", "block", at[3][i], docs[3][i]) for i in hit],
        ("3.tar", "structure", at[3][4], 0),
    ]
    causes = " ".join(problem.cause for problem in found)
    for words in ("No such file", "the manifest says", "bytes too early", "checksum", "cut in a", "not a tar header"):
        assert words in causes


def remade(manifest: Manifest, i: int, **changes: np.ndarray) -> Manifest:
    """With other columns in shard `i`."""
    shards = list(manifest.shards)
    shards[i] = Shard(**{**shards[i].__dict__, **changes})
    return Manifest(manifest.root, shards, manifest.info, token_ids=manifest.token_ids, losses=manifest.losses)


def test_a_manifest_that_counts_wrongly(manifest: Manifest) -> None:
    counts = manifest.shards[1].documents.copy()
    counts[0] += 2
    counts[1] -= 1
    found = verify(remade(manifest, 1, documents=counts), Store(manifest.root))
    assert summary(found) == [
        ("1.tar", "documents", 0, 2),
        ("1.tar", "documents", int(manifest.shards[1].offsets[1]), 0),
    ]
    assert found[0].cause == "holds 4 documents; the manifest says 6"
    lines = verify(manifest, Store(manifest.root), field="body")
    assert sum(problem.documents for problem in lines) == 120 and "no field 'body'" in lines[0].cause


def test_layouts_and_known_losses(tmp_path: Path) -> None:
    ids = npy(10, 7, 1000, 7, 12)
    write_tar(tmp_path / "a.tar", [("a.npy", ids), ("b.jsonl", b'{"text": "x"}\nbad\n'), ("c.txt", b"c")])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    write_tar(tmp_path / "c.tar", [("a.txt", b"a"), ("b.txt.gz", b"no gzip"), ("c.txt", b"c")])
    change(tmp_path / "c.tar", lambda data: data[: data.rindex(b"c.txt")] + b"\xa5" * 4096)
    manifest = index([str(tmp_path)], tmp_path / "m.json", ids=IDS, skip_damaged=True)
    assert manifest.losses.documents == 4 and len(manifest.losses.damaged) == 2 and manifest.num_documents == 9
    store = Store(tmp_path)
    assert verify(manifest, store) == []  # all that is wrong is known
    change(tmp_path / "b.tar.gz", lambda data: data[:50] + b"\0\0\0" + data[53:])
    change(tmp_path / "c.tar", lambda data: b"b" + data[1:])
    assert summary(verify(manifest, store)) == [
        ("b.tar.gz", "sha256", None, 0),
        ("b.tar.gz", "block", 0, 4),
        ("c.tar", "sha256", None, 0),
        ("c.tar", "block", 0, 1),
        ("c.tar", "structure", 0, 0),
    ]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    code = command.run(parser.parse_args([*arguments, "--workers", "1"]))
    return code, capsys.readouterr().out


def test_the_command(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(Path(str(manifest.root)) / "manifest.json")
    code, out = run(capsys, "--manifest", path)
    assert code == 0 and out == f"{path}: 4 shards, 30 blocks, 120 documents: all as the manifest says\n"
    manifest.shard_path(0).unlink()
    change(manifest.shard_path(2), lambda data: data[:600] + b"#" + data[601:])
    code, out = run(capsys, "--manifest", path)
    assert code == 1
    assert "manifest-00000.tar: 12 of 12 documents lost\n  unreadable: cannot be read: No such file" in out
    assert (
        "manifest-00002.tar: 4 of 36 documents lost\n  sha256: " in out
        and "  block at byte 0: the block's bytes differ" in out
    )
    assert out.endswith("3 problems in 2 shards, 16 documents lost\n")
    code, out = run(capsys, "--manifest", path, "--json")
    content = json.loads(out)
    assert code == 1 and (content["shards"], content["documents"], content["lost"]) == (4, 120, 16)
    assert [problem["kind"] for problem in content["problems"]] == ["unreadable", "sha256", "block"]


def test_the_command_checks_the_tokenizer_and_asks_before_it_runs_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", [("a.npy", npy(10))])
    index([f"pipe:cat {tmp_path}/a.tar"], tmp_path / "m.json", ids=IDS, allow_pipe=True)
    with pytest.raises(UserError, match="names commands as shards"):
        run(capsys, "--manifest", str(tmp_path / "m.json"))
    assert run(capsys, "--manifest", str(tmp_path / "m.json"), "--allow-pipe")[0] == 0
    save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(
        UserError, match=r"fingerprint [0-9a-f]{12}; the token ids of .* were made by one with abababababab"
    ):
        run(capsys, "--manifest", str(tmp_path / "m.json"), "--allow-pipe", "--tokenizer", str(tmp_path / "tokenizer"))


def test_shards_on_a_server(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(Path(str(manifest.root))) as server:
        server.fail("manifest-00001.tar", "reset", times=1)  # which is gone on with
        assert run(capsys, "--manifest", f"{server.url}/manifest.json")[0] == 0
        manifest.shard_path(1).unlink()
        code, out = run(capsys, "--manifest", f"{server.url}/manifest.json")
    assert code == 1 and "manifest-00001.tar: 24 of 24 documents lost\n  unreadable: cannot be read: HTTP 404" in out
