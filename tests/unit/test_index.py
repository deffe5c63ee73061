import argparse
import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from mlm_dist.data import index as command
from mlm_dist.data.archive import block_documents
from mlm_dist.data.index import auto_block_size, index, parse_size
from mlm_dist.data.locate import find_archives
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, TokenIds
from mlm_dist.data.scan import ScanOptions, scan_archive
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
from tests.corpora import save_tokenizer
from tests.http_server import Server

WORDS = ["alpha", "beta", "gamma", "delta"]
IDS = TokenIds("ab" * 32, 1000, 7, (0, 5, 6))


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def npy(*content: int, dtype: str = "<u2") -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(content, dtype))
    return out.getvalue()


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


def documents(manifest: Manifest, *, allow_pipe: bool = False) -> list[Any]:
    """Every document of every block, each block read alone; arrays as lists."""
    store = Store(manifest.root, allow_pipe=allow_pipe)
    found: list[Any] = []
    for shard in manifest.shards:
        for offset, length, count, crc32 in zip(
            shard.offsets.tolist(), shard.lengths.tolist(), shard.documents, shard.crc32.tolist(), strict=True
        ):
            block = store.read(shard.path, offset, length, crc32)
            read = [
                d for d in block_documents(block, shard.path, ids=manifest.token_ids) if not isinstance(d, LostDocument)
            ]
            assert len(read) == count
            found += [d if isinstance(d, str) else d.tolist() for d in read]
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
    manifest = index([str(corpus)], corpus / "manifest.json", block_size=block_size)
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
    moved = index([str(tmp_path / "moved")], tmp_path / "moved" / "m.json")
    assert moved.fingerprint == one
    above = index([str(tmp_path / "moved")], tmp_path / "m.json")
    assert [shard.path for shard in above.shards] == [f"moved/{i}.tar" for i in range(4)]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda data: data[:50_000], "cut"),
        (lambda data: data[:51_200], "cut|no end mark"),
        (lambda data: data[:51_200] + b"\x99" * 4096 + data[55_296:], "not a tar header"),
        (lambda data: b"\x1f\x8b" + data[2:], "compressed, so its name must end in .tar.gz or .tgz"),
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
    manifest = index([str(tmp_path)], tmp_path / "manifest.json")
    assert manifest.num_documents == 2
    again = Manifest.read(tmp_path / "manifest.json")
    assert (again.losses.documents, again.losses.blocks) == (3, 1)
    assert again.known_losses == [
        {"shard": "a.tar", "offset": 0, "documents": 3, "cause": "x.jsonl: no field 'text' (there are: 'txt')"}
    ]
    with pytest.raises(UserError, match=r"(?s)field 'body' \(--field\)\n.*there are: 'text'"):
        index([str(tmp_path)], tmp_path / "other.json", field="body")


def test_inputs_that_cannot_be_used(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="lies outside"):
        index([str(corpus)], tmp_path / "elsewhere" / "manifest.json")
    with pytest.raises(UserError, match=r"'none/\*\.tar' names no archive"):
        index(["none/*.tar"], tmp_path / "manifest.json")
    (corpus / "x.tar.bz2").write_bytes(b"")
    with pytest.raises(UserError, match="decompress it, or pack it as"):
        index([str(corpus / "x.tar.bz2")], corpus / "manifest.json")
    (corpus / "1.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.tar and .*1\.tar\.gz look like one archive twice"):
        index([str(corpus)], corpus / "manifest.json")
    (corpus / "1.tar.gz").unlink()
    with pytest.raises(UserError, match="a URL; the archives of one manifest lie below one root"):
        index([str(corpus), "http://host/a.tar"], corpus / "manifest.json")
    with pytest.raises(UserError, match="--allow-pipe lets it run"):
        index(["pipe:cat a.tar"], corpus / "manifest.json")
    with pytest.raises(UserError, match="--workers is 0"):
        index([str(corpus)], corpus / "manifest.json", workers=0)


def test_links_into_the_directory_are_fine(corpus: Path, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    (view / "linked.tar").symlink_to(corpus / "1.tar")
    manifest = index([str(view)], view / "manifest.json")
    assert [shard.path for shard in manifest.shards] == ["linked.tar"]


def test_a_compressed_archive_is_one_block(corpus: Path, tmp_path: Path) -> None:
    plain = index([str(corpus)], corpus / "manifest.json")
    expected_documents = documents(plain)
    for i, (suffix, encode) in enumerate(
        ((".tar.gz", gzip.compress), (".TGZ", gzip.compress), (".tar.zst", zst), (".tar", bytes))
    ):
        source = corpus / f"{i}.tar"
        target = tmp_path / "packed" / f"{i}{suffix}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(encode(source.read_bytes()))
    inputs = [str(path) for path in sorted((tmp_path / "packed").iterdir())]
    packed = index(inputs, tmp_path / "packed" / "manifest.json", block_size=4096)
    assert [len(shard.offsets) for shard in packed.shards[:3]] == [1, 1, 1] and len(packed.shards[3].offsets) > 1
    for shard in packed.shards[:3]:
        content = (tmp_path / "packed" / shard.path).read_bytes()
        assert (int(shard.offsets[0]), int(shard.lengths[0])) == (0, len(content))
        assert (zlib.crc32(content), hashlib.sha256(content).hexdigest()) == (int(shard.crc32[0]), shard.sha256)
    assert documents(packed) == expected_documents
    found = index([str(tmp_path / "packed")], tmp_path / "packed" / "again.json")  # .TGZ is found by its name only
    assert {shard.path for shard in found.shards} == {"0.tar.gz", "2.tar.zst", "3.tar"}


@pytest.mark.parametrize(("suffix", "encode"), [(".tar.gz", gzip.compress), (".tar.zst", zst)])
def test_a_damaged_compressed_archive_is_named(corpus: Path, suffix: str, encode: Callable[[bytes], bytes]) -> None:
    tar = (corpus / "0.tar").read_bytes()
    whole = encode(tar)
    for content, cause in (
        (whole[: len(whole) // 2], "cut before its end"),
        (b"", "empty"),
        (tar, "damaged"),
        (whole[:-3] + b"abc", "damaged"),
        (encode(tar[:50_000]), "in the decompressed archive: the archive is cut"),
        (encode(b"no tar" * 100), "in the decompressed archive: not a tar header"),
        (encode(b""), "in the decompressed archive: the file is empty"),
    ):
        path = corpus / f"x{suffix}"
        path.write_bytes(content)
        if content == whole[:-3] + b"abc" and suffix == ".tar.zst":
            continue  # no checksum in this frame
        with pytest.raises(UserError, match=rf"x\{suffix} is damaged at byte \d+: .*{cause}"):
            index([str(path)], corpus / "manifest.json")


def test_what_decompresses_to_too_much_is_refused(tmp_path: Path) -> None:
    options = ScanOptions(max_bytes=1 << 20)
    write_tar(tmp_path / "a.tar", [("a.txt", bytes(1 << 20)), ("b.txt", b"b")])
    content = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(UserError, match="more than 1048576 bytes when decompressed; split it"):
        scan_archive(memoryview(gzip.compress(content)), "a.tar.gz", options)
    # Three members of 512 KiB when decompressed fit a block of 1 MiB alone, two fit together.
    small = gzip.compress(bytes(1 << 19))
    write_tar(tmp_path / "b.tar", [(f"{i}.txt.gz", small) for i in range(5)])
    plain = (tmp_path / "b.tar").read_bytes()
    assert scan_archive(memoryview(plain), "b.tar", options).shard.documents.tolist() == [2, 2, 1]
    with pytest.raises(UserError, match="with those before it more than 1048576 bytes"):
        scan_archive(memoryview(zst(plain)), "b.tar.zst", options)


def pretokenized(path: Path) -> None:
    write_tar(
        path,
        [
            ("a.npy", npy(10, 11, 7, 12, 7)),
            ("b.txt", b"text"),
            ("c.npy.zst", zst(npy(13, 1000, 7, 14, 5, 7, 15, dtype="<i8"))),
        ],
    )


def test_token_ids_need_their_tokenizer(tmp_path: Path) -> None:
    pretokenized(tmp_path / "a.tar")
    output = tmp_path / "manifest.json"
    with pytest.raises(UserError, match=r"a\.tar 'a\.npy' may hold token ids: give --tokenizer DIR.*--ignore-npy"):
        index([str(tmp_path)], output)
    manifest = index([str(tmp_path)], output, ids=IDS)
    assert documents(manifest) == [[10, 11], [12], "text", [15]]
    again = Manifest.read(output)
    assert (again.token_ids, again.tokenizer, again.fingerprint) == (IDS, IDS.fingerprint, manifest.fingerprint)
    assert again.losses.documents == 2 and "c.npy.zst: token id 1000 at place 1" in again.known_losses[0]["cause"]
    without = index([str(tmp_path)], output, ignore_npy=True)
    assert documents(without) == ["text"] and without.tokenizer is None
    write_tar(tmp_path / "b.tar", [("a.npy", npy(1, dtype="<f4")), ("b.txt", b"text")])
    with pytest.raises(
        UserError, match=r"b\.tar is damaged at byte 0: member 'a\.npy': .*float32 is no list of token ids"
    ):
        index([str(tmp_path / "b.tar")], output, ids=IDS)
    write_tar(tmp_path / "b.tar", [("b.txt", b"text")])
    assert index([str(tmp_path / "b.tar")], output, ids=IDS).tokenizer is None  # not of any use, so not recorded


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_can_be_skipped(corpus: Path, workers: int) -> None:
    output = corpus / "manifest.json"
    whole = index([str(corpus)], output, block_size=4096)
    good = {i: documents(Manifest(corpus, [shard], {})) for i, shard in enumerate(whole.shards)}
    content = (corpus / "2.tar").read_bytes()
    (corpus / "2.tar").write_bytes(content[:51_200] + b"\x99" * 4096 + content[55_296:])
    (corpus / "3.tar").write_bytes(b"")
    (corpus / "4.tar.gz").write_bytes(gzip.compress(content)[:700])
    bad = gzip.compress(b'{"text": "x"}')[:-1]
    write_tar(corpus / "5.tar", [("a.txt", b"a"), ("b.jsonl.gz", bad), ("c.txt", b"c"), ("d.txt", b"d")])
    with pytest.raises(UserError, match="--skip-damaged leaves out"):
        index([str(corpus)], output, workers=workers)
    manifest = index([str(corpus)], output, workers=workers, skip_damaged=True, block_size=4096)
    assert manifest.fingerprint == Manifest.read(output).fingerprint
    found = {shard.path: documents(Manifest(corpus, [shard], {})) for shard in manifest.shards if len(shard.offsets)}
    assert (found["0.tar"], found["1.tar"], found["5.tar"]) == (good[0], good[1], ["a", "c", "d"])
    kept = len(found["2.tar"])
    assert 0 < kept < 40 and found["2.tar"] == good[2][:kept]
    damaged = {part["shard"]: part for part in Manifest.read(output).losses.damaged}
    assert set(damaged) == {"2.tar", "3.tar", "4.tar.gz", "5.tar"} and manifest.losses.documents == 0
    assert "not a tar header" in damaged["2.tar"]["cause"]
    assert (
        damaged["2.tar"]["offset"] + damaged["2.tar"]["bytes"] == len(content) and damaged["2.tar"]["offset"] == 51_200
    )
    assert (damaged["3.tar"]["bytes"], damaged["4.tar.gz"]["offset"], damaged["4.tar.gz"]["bytes"]) == (0, 0, 700)
    assert (damaged["5.tar"]["offset"], damaged["5.tar"]["bytes"]) == (1024, 1024)
    assert len(manifest.shards[-1].offsets) == 2  # no block spans the member that is left out
    lines = manifest.losses.describe()
    assert "of 4 damaged shards are left out; how many documents they held is not known" in lines[0]


def test_ranges_in_names(tmp_path: Path) -> None:
    for name in ("s-08.tar", "s-09.tar", "s-10.tar", "x{1..2}.tar"):
        write_tar(tmp_path / name, [("a.txt", name.encode())])
    found = find_archives([str(tmp_path / "s-{08..10}.tar"), str(tmp_path / "x{1..2}.tar")], tmp_path / "m.json")
    assert found.names == ["s-08.tar", "s-09.tar", "s-10.tar", "x{1..2}.tar"]
    with pytest.raises(UserError, match=r"s-11\.tar' names no archive"):
        find_archives([str(tmp_path / "s-{08..11}.tar")], tmp_path / "m.json")
    with pytest.raises(UserError, match="must go up"):
        find_archives([str(tmp_path / "s-{10..08}.tar")], tmp_path / "m.json")


def test_urls_lie_below_what_they_share(tmp_path: Path) -> None:
    found = find_archives(
        ["https://host/a/b/y/{2..3}.tar", "https://host/a/b/x.tar.gz", "pipe:cat x{1..2}"],
        tmp_path / "m.json",
        allow_pipe=True,
    )
    assert found.root == "https://host/a/b" and found.names == ["pipe:cat x{1..2}", "x.tar.gz", "y/2.tar", "y/3.tar"]
    assert find_archives(["http://host/1.tar"], tmp_path / "m.json").root == "http://host"
    for inputs, message in (
        (["http://host/a.tar", "http://other/a.tar"], "on 2 servers"),
        (["http://host/a.tar", "https://host/a.tar"], "on 2 servers"),
        (["http://host/dir/"], "http servers have no listings"),
        (["http://host/*.tar"], "http servers have no listings"),
        (["http://host/a.tar?token=secret"], "has no query"),
        (["http://host/a.tar.bz2"], "decompress it"),
    ):
        with pytest.raises(UserError, match=message):
            find_archives(inputs, tmp_path / "m.json")


@pytest.mark.parametrize("workers", [1, 2])
def test_archives_on_a_server(corpus: Path, tmp_path: Path, workers: int) -> None:
    local = index([str(corpus)], corpus / "manifest.json", block_size=8192)
    with Server(tmp_path) as server:
        url = server.url
        manifest = index([f"{url}/data/{{0..3}}.tar"], tmp_path / "out.json", block_size=8192, workers=workers)
        assert manifest.root == f"{url}/data"
        assert manifest.fingerprint == local.fingerprint  # a local copy and the server are one data set
        assert documents(Manifest.read(tmp_path / "out.json")) == expected(4, 40)
        assert Manifest.read(tmp_path / "out.json").check_files() == []
        far = Manifest.read(f"{url}/data/manifest.json")
        assert far.root == f"{url}/data" and far.fingerprint == local.fingerprint and documents(far) == expected(4, 40)
        with pytest.raises(UserError, match=r"1 of 2 archives cannot be read:\n  9.tar: .*404"):
            index([f"{url}/data/0.tar", f"{url}/data/9.tar"], tmp_path / "out.json")
        with pytest.raises(UserError, match=r"manifest http://.*/none.json: .*404"):
            Manifest.read(f"{url}/none.json")


def test_a_server_without_ranges_gives_whole_shards(corpus: Path, tmp_path: Path) -> None:
    with Server(corpus) as server:
        server.fail("*", "no_ranges")
        manifest = index([f"{server.url}/{{0..3}}.tar"], tmp_path / "out.json", block_size=8192)
        assert [(shard.offsets.tolist(), shard.lengths.tolist()) for shard in manifest.shards] == [
            ([0], [(corpus / f"{i}.tar").stat().st_size]) for i in range(4)
        ]
        assert documents(manifest) == expected(4, 40)


def test_archives_of_a_bucket(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    import boto3

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    local = index([str(corpus)], corpus / "manifest.json")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in sorted(corpus.glob("*.tar")):
            client.upload_file(str(path), "bucket", f"text/v1/{path.name}")
        client.put_object(Bucket="bucket", Key="text/v1/readme.md", Body=b"no archive")
        for given in (
            "s3://bucket/text",
            "s3://bucket/text/v1/",
            "s3://bucket/t*/v1/*.tar",
            "s3://bucket/text/v1/{0..3}.tar",
        ):
            manifest = index([given], tmp_path / "out.json")
            assert (manifest.root, manifest.fingerprint) == ("s3://bucket/text/v1", local.fingerprint)
        assert documents(Manifest.read(tmp_path / "out.json")) == expected(4, 40)
        client.upload_file(str(corpus / "manifest.json"), "bucket", "text/v1/manifest.json")
        assert documents(Manifest.read("s3://bucket/text/v1/manifest.json")) == expected(4, 40)
        with pytest.raises(UserError, match=r"'s3://bucket/none' names no archive"):
            index(["s3://bucket/none"], tmp_path / "out.json")
        with pytest.raises(UserError, match=r"'s3://nobody/text' cannot be listed: "):
            index(["s3://nobody/text"], tmp_path / "out.json")
    finally:
        server.stop()


def test_commands(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [f"pipe:cat {corpus}/0.tar", f"pipe:gzip -c {corpus}/1.tar"]
    manifest = index([*commands, str(corpus / "2.tar")], corpus / "manifest.json", allow_pipe=True)
    assert [shard.path for shard in manifest.shards] == ["2.tar", *commands]
    assert [len(shard.offsets) for shard in manifest.shards[1:]] == [1, 1]
    assert sorted(documents(manifest, allow_pipe=True)) == sorted(expected(3, 40))
    monkeypatch.setattr(command, "Store", partial(Store, retries=1, wait=0.01))
    with pytest.raises(UserError, match=r"shard pipe:exit 3: .*exit status 3"):
        index(["pipe:exit 3"], corpus / "manifest.json", allow_pipe=True)
    with pytest.raises(UserError, match=r"shard pipe:true is damaged at byte 0: the file is empty"):
        index(["pipe:true"], corpus / "manifest.json", allow_pipe=True)


def test_the_command(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    output = corpus / "manifest.json"
    arguments = [str(corpus), "--output", str(output), "--block-size", "8KiB", "--workers", "1"]
    assert command.run(parser.parse_args(arguments)) == 0
    assert "4 shards" in (out := capsys.readouterr().out) and "160 documents" in out
    assert Manifest.read(output).info["options"]["block_size"] == 8192
    pretokenized(corpus / "tokens" / "a.tar")
    save_tokenizer(corpus / "tokenizer")
    assert command.run(parser.parse_args([*arguments, "--tokenizer", str(corpus / "tokenizer")])) == 0
    assert (
        "1 documents in 1 blocks cannot be read" in (out := capsys.readouterr().out) and "tokens/a.tar at byte 0" in out
    )
    assert Manifest.read(output).token_ids.sep_id == 3  # type: ignore[union-attr]
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--tokenizer", "x", "--ignore-npy"])
    capsys.readouterr()
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
    for text in ("0", "-1", "1.5M", "big", "1P"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)
    assert [auto_block_size(size) for size in (0, 1 << 20, 64 << 20, 100 << 20, 1 << 40)] == [
        4096,
        4096,
        65536,
        65536,
        1 << 20,
    ]
