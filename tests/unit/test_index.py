import argparse
import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import pytest

from mlm_dist.data import index as command
from mlm_dist.data.index import auto_block_size, index, parse_size
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, read_documents
from mlm_dist.data.tar import iter_members
from mlm_dist.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta"]


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def samples(shard: int, count: int) -> list[tuple[str, bytes]]:
    """Samples as people have them: a picture, a class and a text or a JSON object each."""
    files = []
    for i in range(count):
        text = f"document {shard} {i} " + " ".join(WORDS) * (i % 7)
        files += [
            (f"{i:05d}.png", bytes(1500)),
            (f"{i:05d}.cls", b"3"),
            (f"{i:05d}.txt", text.encode())
            if shard % 2
            else (f"{i:05d}.json", json.dumps({"text": text, "id": i}).encode()),
        ]
    return files


def documents(manifest: Manifest) -> list[str]:
    """Every document of every block, read from the block's bytes alone."""
    found = []
    for i, shard in enumerate(manifest.shards):
        content = manifest.shard_path(i).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.size, shard.sha256)
        for offset, length, count, crc32 in zip(
            shard.offsets, shard.lengths, shard.documents, shard.crc32, strict=True
        ):
            block = content[offset : offset + length]
            assert zlib.crc32(block) == crc32
            texts = [
                document
                for member in iter_members(block)
                for document in read_documents(member.name, member.data)
                if not isinstance(document, LostDocument)
            ]
            assert len(texts) == count
            found += texts
    return found


def expected(shards: int, count: int) -> list[str]:
    return [f"document {s} {i} " + " ".join(WORDS) * (i % 7) for s in range(shards) for i in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for s in range(4):
        write_tar(tmp_path / "data" / f"{s}.tar", samples(s, 40), list((0, 1, 2, 2))[s])
    return tmp_path / "data"


@pytest.mark.parametrize("block_size", [1, 4096, 10_000, 1 << 20])
def test_blocks_hold_every_document_once(corpus: Path, block_size: int) -> None:
    manifest, _ = index([str(corpus)], corpus / "manifest.json", block_size=block_size)
    assert documents(manifest) == expected(4, 40)
    assert Manifest.read(corpus / "manifest.json").fingerprint == manifest.fingerprint
    lengths = [int(length) for shard in manifest.shards for length in shard.lengths]
    assert all(length <= max(block_size, 2048) for length in lengths)
    if block_size == 10_000:
        assert max(lengths) > 5000  # blocks are filled


def test_nothing_depends_on_workers_order_or_place(corpus: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(corpus.glob("*.tar"))]
    index(paths, corpus / "a.json")
    index([*paths[::-1], str(corpus / "*.tar")], corpus / "b.json", workers=3)
    assert (corpus / "a.json").read_bytes() == (corpus / "b.json").read_bytes()
    one = Manifest.read(corpus / "a.json").fingerprint
    corpus.rename(tmp_path / "moved")
    moved, _ = index([str(tmp_path / "moved")], tmp_path / "moved" / "m.json")
    assert moved.fingerprint == one
    above, _ = index([str(tmp_path / "moved")], tmp_path / "m.json")
    assert [shard.path for shard in above.shards] == [f"moved/{i}.tar" for i in range(4)]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: data[:50_000], "cut"),
        (lambda data: data[:51_200], "cut|no end mark"),
        (lambda data: data[:51_200] + b"\x99" * 4096 + data[55_296:], "not a tar header"),
        (lambda data: b"\x1f\x8b" + data[2:], "not a tar header"),
        (lambda data: b"", "empty"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_archive_is_named(corpus: Path, damage, cause: str, workers: int) -> None:  # type: ignore[no-untyped-def]
    shard = corpus / "2.tar"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=rf"2\.tar is damaged at byte \d+: .*({cause})"):
        index([str(corpus)], corpus / "manifest.json", workers=workers)
    assert not (corpus / "manifest.json").exists()


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"fine"), ("b.jsonl.gz", b"not gzip")])
    with pytest.raises(UserError, match=r"a\.tar is damaged at byte 1024: member 'b\.jsonl\.gz'"):
        index([str(tmp_path)], tmp_path / "manifest.json")


def test_documents_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n{"txt": "b"}\nnot json\n{"text": "c"}\n'
    write_tar(tmp_path / "a.tar", [("x.jsonl", lines), ("\udcff.txt", b"caf\xe9")])
    manifest, found = index([str(tmp_path)], tmp_path / "manifest.json")
    assert manifest.num_documents == 2 and sum(shard.lost for shard in found) == 3
    assert Manifest.read(tmp_path / "manifest.json").info["lost_documents"] == 3
    with pytest.raises(UserError, match=r"field 'body' \(--field\)\n.*there are: 'text'"):
        index([str(tmp_path)], tmp_path / "other.json", field="body")


def test_inputs_that_cannot_be_used(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="lies outside"):
        index([str(corpus)], tmp_path / "elsewhere" / "manifest.json")
    with pytest.raises(UserError, match=r"'none/\*\.tar' names no archive"):
        index(["none/*.tar"], tmp_path / "manifest.json")
    (corpus / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match="decompress it"):
        index([str(corpus / "x.tar.gz")], corpus / "manifest.json")
    with pytest.raises(UserError, match="--workers is 0"):
        index([str(corpus)], corpus / "manifest.json", workers=0)


def test_links_into_the_directory_are_fine(corpus: Path, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    (view / "linked.tar").symlink_to(corpus / "1.tar")
    manifest, _ = index([str(view)], view / "manifest.json")
    assert [shard.path for shard in manifest.shards] == ["linked.tar"]


def test_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    output = corpus / "manifest.json"
    arguments = [str(corpus), "--output", str(output), "--block-size", "8KiB", "--workers", "1"]
    assert command.run(parser.parse_args(arguments)) == 0
    assert "4 shards" in (out := capsys.readouterr().out) and "160 documents" in out
    assert Manifest.read(output).info["options"]["block_size"] == 8192
    output.write_text('{"precious": 1}')
    with pytest.raises(UserError, match="format is None"):
        command.run(parser.parse_args(arguments))
    assert output.read_text() == '{"precious": 1}'


def test_sizes() -> None:
    assert [parse_size(text) for text in ("4096", "64KiB", "3k", "256 MB", "1GiB")] == [
        4096,
        65536,
        3072,
        256 << 20,
        1 << 30,
    ]
    for text in ("0", "-1", "1.5M", "big", "1T"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)
    assert [auto_block_size(size) for size in (0, 1 << 20, 64 << 20, 100 << 20, 1 << 40)] == [
        4096,
        4096,
        65536,
        65536,
        1 << 20,
    ]
