import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_dist.data.manifest import Manifest, Shard
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
    assert len({base, *prints}) == len(others) + 1


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
    for content, message in ((b"{", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[]", "format is None")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Manifest.read(path)


def test_no_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 shards has a block"):
        Manifest(tmp_path, [shard(blocks=0)], {})


def test_check_files(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, [shard()], {})
    with pytest.raises(UserError, match=r"train-00000\.tar .*No such file"):
        manifest.check_files()
    manifest.shard_path(0).write_bytes(bytes(10))
    with pytest.raises(UserError, match="has 10 bytes; the manifest says 4096"):
        manifest.check_files()
    manifest.shard_path(0).write_bytes(bytes(4096))
    manifest.check_files()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path, content = written(tmp_path)
    with pytest.raises(TypeError):
        Manifest(tmp_path, [shard()], {"not JSON": object()}).write(path)
    assert json.loads(path.read_text()) == content
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
