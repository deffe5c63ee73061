import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_dist.data.losses import MAX_LISTED, Losses
from mlm_dist.data.manifest import Manifest, Shard
from mlm_dist.data.members import TokenIds
from mlm_dist.errors import UserError


def shard(path: str = "train-00000.tar", blocks: int = 3, **changes: Any) -> Shard:
    fields: dict[str, Any] = {
        "path": path,
        "size": 1024 * blocks + 1024,
        "sha256": "ab" * 32,
        "offsets": np.arange(blocks, dtype=np.int64) * 1024,
        "lengths": np.full(blocks, 1024, np.int64),
        "documents": np.arange(blocks, dtype=np.int64) + 1,
        "crc32": np.full(blocks, 0xFFFFFFFF, np.uint32),
    }
    return Shard(**{**fields, **changes})


IDS = TokenIds("ab" * 32, 30522, 102, (0, 101, 103))
SOME_IDS = [
    IDS,
    TokenIds("cd" * 32, 30522, 102, (0, 101, 103)),
    TokenIds("ab" * 32, 30523, 102, (0, 101, 103)),
    TokenIds("ab" * 32, 30522, 104, (0, 101, 103)),
    TokenIds("ab" * 32, 30522, 102, (0, 101)),
]


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, [shard(), shard("sub/ü.tar", 5)], {"options": {"seed": 0}})
    assert (manifest.num_blocks, manifest.num_bytes, manifest.num_documents) == (8, 8 * 1024, 6 + 15)
    manifest.write(tmp_path / "manifest.json")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    again = Manifest.read(tmp_path / "manifest.json")
    assert again.fingerprint == manifest.fingerprint and again.info == manifest.info
    assert again.shard_path(1) == tmp_path / "sub" / "ü.tar"
    for a, b in zip(manifest.shards, again.shards, strict=True):
        for name in ("offsets", "lengths", "documents", "crc32"):
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype and left.tolist() == right.tolist()
        assert (a.path, a.size, a.sha256) == (b.path, b.size, b.sha256)


def test_fingerprint_covers_the_shards_and_nothing_else(tmp_path: Path) -> None:
    base = Manifest(tmp_path, [shard(), shard("b.tar")], {}).fingerprint
    assert Manifest(Path("/elsewhere"), [shard(), shard("b.tar")], {"other": 1}).fingerprint == base
    column = np.array([0, 1024, 2048], np.int64)
    others = [
        [shard("b.tar"), shard()],
        [shard(), shard("c.tar")],
        [shard()],
        [shard(), shard("b.tar", size=5000)],
        [shard(), shard("b.tar", sha256="cd" * 32)],
        [shard(), shard("b.tar", offsets=column + np.array([0, 0, 512]))],
        [shard(), shard("b.tar", lengths=np.array([1024, 1024, 512]))],
        [shard(), shard("b.tar", documents=np.array([1, 2, 4]))],
        [shard(), shard("b.tar", crc32=np.array([1, 2, 3], np.uint32))],
    ]
    prints = [Manifest(tmp_path, shards, {}).fingerprint for shards in others]
    prints += [Manifest(tmp_path, [shard(), shard("b.tar")], {}, token_ids=ids).fingerprint for ids in SOME_IDS]
    assert len({base, *prints}) == len(others) + len(SOME_IDS) + 1
    losses = Losses.of([{"shard": "b.tar", "offset": 0, "documents": 2, "cause": "bad JSON"}])
    assert Manifest(tmp_path, [shard(), shard("b.tar")], {}, losses=losses).fingerprint == base
    assert Manifest("s3://bucket/corpus", [shard(), shard("b.tar")], {}).fingerprint == base


def test_fingerprints_of_released_manifests_stay() -> None:
    # A run directory holds it as identity: a change would stop every run from being continued.
    manifest = Manifest(Path("."), [shard(), shard("sub/ü.tar", 5)], {})
    assert manifest.fingerprint == "e366f9e517009080690030ac83f8ce0335b82eacfc536297691a29295219529a"


def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "manifest.json"
    Manifest(tmp_path, [shard(), shard("b.tar")], {}).write(path)
    return path, json.loads(path.read_text())


def set_block(content: dict[str, Any], name: str, value: Any) -> None:
    content["shards"][1]["blocks"][name][1] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="tar"), "format is 'tar'"),
        (lambda c: c.update(version=2), "version is 2"),
        (lambda c: c.update(shards=[]), "no shards"),
        (lambda c: c.update(shards={}), "shards is {}; it must be a JSON array"),
        (lambda c: c.pop("info"), "info is None"),
        (lambda c: c.update(fingerprint="0" * 64), "changed by hand or damaged"),
        (lambda c: c["shards"].append(c["shards"][0]), "'train-00000.tar' is there twice"),
        (lambda c: c["shards"].append(7), r"shards\[2\] is 7"),
        (lambda c: c["shards"][1].pop("size"), r"shards\[1\]: size is None"),
        (lambda c: c["shards"][1].update(size=-1), "size is -1"),
        (lambda c: c["shards"][1].update(size=True), "size is True"),
        (lambda c: c["shards"][1].update(sha256="xyz"), "sha256 is 'xyz'"),
        (lambda c: c["shards"][1].update(path="/etc/passwd"), "'/etc/passwd' is wrong"),
        (lambda c: c["shards"][1].update(path="a/../../b.tar"), "'a/../../b.tar' is wrong"),
        (lambda c: c["shards"][1].update(path=""), "'' is wrong"),
        (lambda c: c["shards"][1].pop("blocks"), "blocks is None"),
        (lambda c: set_block(c, "offset", -512), "block 1 .*begins before"),
        (lambda c: set_block(c, "offset", 512), "block 1 .*overlaps"),
        (lambda c: set_block(c, "length", 0), "block 1 .*is empty"),
        (lambda c: set_block(c, "length", 100_000), "block 1 .*ends behind the file's 4096 bytes"),
        (lambda c: set_block(c, "documents", -1), "negative number of documents"),
        (lambda c: set_block(c, "documents", 1.5), r"blocks.documents\[1\] is 1.5"),
        (lambda c: set_block(c, "crc32", 1 << 32), r"blocks.crc32\[1\] is 4294967296"),
        (lambda c: set_block(c, "offset", 1 << 80), "fits int64"),
        (lambda c: c["shards"][1]["blocks"]["offset"].pop(), "differ in length"),
    ],
)
def test_what_read_refuses(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path, content = written(tmp_path)
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Manifest.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="Is a directory"):
        Manifest.read(tmp_path)
    path = tmp_path / "m.json"
    for content, message in (
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "format is None"),
        (b"[" * 1_000_000, "not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Manifest.read(path)


def test_no_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 shards has a block"):
        Manifest(tmp_path, [shard(blocks=0)], {})


def test_check_files(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, [shard(), shard("b.tar", 5), shard("c.tar")], {})
    for name, size in (("train-00000.tar", 4096), ("b.tar", 6144), ("c.tar", 4096)):
        (tmp_path / name).write_bytes(bytes(size))
    assert manifest.check_files() == []
    manifest.shard_path(0).write_bytes(bytes(10))
    manifest.shard_path(2).unlink()
    problems = manifest.shard_problems()
    assert [(problem.shard, problem.documents) for problem in problems] == [("train-00000.tar", 6), ("c.tar", 6)]
    assert "has 10 bytes; the manifest says 4096" in problems[0].cause and "No such file" in problems[1].cause
    for allowed in (0.0, 0.4):
        with pytest.raises(UserError, match=r"2 of 3 shards, with 12 of 27 documents") as caught:
            manifest.check_files(allowed)
        assert "train-00000.tar: has 10 bytes" in str(caught.value) and "c.tar: " in str(caught.value)
    assert manifest.check_files(0.5) == problems


def test_commands_are_not_run_to_check_them(tmp_path: Path) -> None:
    one = {"offsets": [0], "lengths": [4096], "documents": [3], "crc32": [9]}
    columns = {name: np.array(value, np.uint32 if name == "crc32" else np.int64) for name, value in one.items()}
    piped = shard(f"pipe:touch {tmp_path}/ran", size=4096, **columns)
    manifest = Manifest(tmp_path, [piped, shard("b.tar")], {})
    assert [problem.shard for problem in manifest.shard_problems()] == ["b.tar"]
    assert not (tmp_path / "ran").exists()
    manifest.write(tmp_path / "m.json")
    assert Manifest.read(tmp_path / "m.json").shards[0].path == piped.path
    assert (manifest.where(piped), manifest.where(manifest.shards[1])) == (piped.path, f"{tmp_path}/b.tar")
    with pytest.raises(UserError, match="one block"):
        shard("pipe:cat a.tar")
    for path in ("pipe:", "pipe:  ", "pipe:a\0b", "s3://bucket/a.tar", "\ud800.tar"):
        with pytest.raises(UserError, match=r"shard path .* is wrong"):
            shard(path)


def test_a_query_is_for_this_process_only(tmp_path: Path) -> None:
    # A signed URL: the shards need the query, but it is no part of the data set and may be a secret.
    manifest = Manifest("https://host/a?token=secret", [shard()], {})
    assert manifest.where(manifest.shards[0]) == "https://host/a/train-00000.tar"
    manifest.write(tmp_path / "m.json")
    assert Manifest.read(tmp_path / "m.json").root == "https://host/a"
    assert Manifest.read(f"file://{tmp_path}/m.json").root == "https://host/a"
    for root in ("s3://bucket/a?b", "https://host/a#b", "ftp://host/a", "https://?x"):
        with pytest.raises(UserError, match="root is"):
            Manifest(root, [shard()], {})


def test_root_ids_and_losses_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    every = [{"shard": "b.tar", "offset": i, "documents": 2, "cause": "x.jsonl: bad JSON"} for i in range(1500)]
    part = {"shard": "b.tar", "offset": 2048, "bytes": 100, "cause": "at byte 2048: cut"}
    made = Manifest("https://host/a/b", [shard(), shard("b.tar")], {}, token_ids=IDS, losses=Losses.of(every, [part]))
    made.write(path)
    again = Manifest.read(path)
    assert (again.root, again.token_ids, again.tokenizer) == ("https://host/a/b", IDS, IDS.fingerprint)
    assert again.fingerprint == made.fingerprint and again.losses == made.losses
    assert (again.losses.documents, again.losses.blocks, len(again.known_losses)) == (3000, 1500, MAX_LISTED)
    lines = again.losses.describe(2)
    assert lines[0].startswith("3000 documents in 1500 blocks") and "and 1498 more blocks" in lines[3]
    assert "b.tar from byte 2048: 100 bytes" in lines[-1]
    plain = Manifest(tmp_path, [shard()], {})
    plain.write(path)
    assert set(json.loads(path.read_text())) == {"format", "version", "fingerprint", "info", "shards"}
    assert plain.tokenizer is None and plain.known_losses == [] and plain.losses.describe() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(root="/data"), "root is '/data'; it must be the URL"),
        (lambda c: c.update(root="file:///data"), "root is 'file:///data'"),
        (lambda c: c.update(root="http://"), "root is 'http://'"),
        (lambda c: c.update(root="s3://b/x?y"), "root is"),
        (lambda c: c.update(root=3), "root is 3; it must be a JSON string"),
        (lambda c: c.update(tokenizer="abc"), "tokenizer is 'abc'; it must be a JSON object"),
        (lambda c: c["tokenizer"].pop("fingerprint"), "tokenizer: fingerprint is None"),
        (lambda c: c["tokenizer"].update(vocab_size=0), "tokenizer: vocab_size is 0"),
        (lambda c: c["tokenizer"].update(sep_id=30522), "tokenizer: the special id 30522"),
        (lambda c: c["tokenizer"].update(banned=[1, "2"]), "tokenizer: the special id '2'"),
        (lambda c: c["tokenizer"].update(vocab_size=30523), "changed by hand or damaged"),
        (lambda c: c.pop("tokenizer"), "changed by hand or damaged"),
        (lambda c: c.update(losses=[]), r"losses is \[\]"),
        (lambda c: c["losses"].update(documents=1), "do not fit 1 documents in 1 blocks"),
        (lambda c: c["losses"].update(blocks=2), "do not fit 2 documents in 2 blocks"),
        (lambda c: c["losses"].update(documents="2"), "losses.documents is '2'"),
        (lambda c: c["losses"].pop("listed"), "losses.listed is None"),
        (lambda c: c["losses"]["listed"].append(5), r"losses.listed\[1\] is 5"),
        (lambda c: c["losses"]["listed"][0].update(offset=-1), r"losses.listed\[0\].offset is -1"),
        (lambda c: c["losses"]["damaged"].append({"shard": "a", "cause": ""}), r"losses.damaged\[0\].offset is None"),
        (lambda c: set_block(c, "length", (1 << 63) - 1), "ends behind"),
        (lambda c: set_block(c, "documents", 1 << 40), "more than 68719476736 documents"),
        (lambda c: c["shards"][0].update(size=1 << 63), "size is 9223372036854775808"),
    ],
)
def test_what_read_refuses_of_the_later_fields(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "manifest.json"
    losses = Losses.of([{"shard": "b.tar", "offset": 0, "documents": 2, "cause": "bad JSON"}])
    Manifest("http://host/d", [shard(), shard("b.tar")], {}, token_ids=IDS, losses=losses).write(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path, content = written(tmp_path)
    with pytest.raises(TypeError):
        Manifest(tmp_path, [shard()], {"not JSON": object()}).write(path)
    assert json.loads(path.read_text()) == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
