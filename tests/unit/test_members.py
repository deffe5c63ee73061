import gzip
import json

import pytest
import zstandard

from mlm_dist.data.members import LostDocument, MemberError, decompress, is_text_member, read_documents


def read(name: str, data: bytes, **options: object) -> list[str | LostDocument]:
    return list(read_documents(name, data, **options))  # type: ignore[arg-type]


def cause(document: str | LostDocument) -> str:
    assert isinstance(document, LostDocument)
    return document.cause


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def test_kinds_of_members() -> None:
    lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(["one\n", "zwei ü", "\u2028 three"]))
    expected = ["one\n", "zwei ü", "\u2028 three"]
    for encode, suffix in ((bytes, ""), (gzip.compress, ".gz"), (zst, ".zst")):
        assert read("dir.d/a.txt" + suffix, encode("text ü\n\nmore".encode())) == ["text ü\n\nmore"]
        assert read("a.json" + suffix, encode(b'{"body": "b"}'), field="body") == ["b"]
        assert read("a.b.JSONL" + suffix.upper(), encode(lines.encode())) == expected
    assert read("a.jsonl", memoryview(lines.encode())) == expected  # type: ignore[arg-type]
    assert read("a.jsonl", b'\n  \n{"text": "a"}\r\n\n{"text": "b"}') == ["a", "b"]
    assert read("a.txt", b"\xef\xbb\xbfbom") == ["bom"] and read("a.json", b'\xef\xbb\xbf{"text": "bom"}') == ["bom"]
    assert read("a.txt", b"") == [""] and read("a.jsonl", b"") == []


def test_other_members_give_nothing() -> None:
    for name in ("a.cls", "a.png", "txt", "a.txt.bz2", "a.txt/b", "jsonl", "a.tar.gz"):
        assert not is_text_member(name) and read(name, b"text") == []
    for name in ("a.txt", "x/a.json", "a.jsonl.gz", "a.v2.TXT.ZST"):
        assert is_text_member(name)


def test_a_bad_record_is_lost_alone() -> None:
    bad = {
        b'{"text": "cut': "bad JSON",
        b"[1]": "list",
        b'"text"': "str",
        b'{"title": "t", "body": "b"}': "no field 'text' (there are: 'title', 'body')",
        b'{"text": 5}': "int",
        b'{"text": null}': "NoneType",
        b'{"text": "\xff"}': "not UTF-8: byte 0xff",
        b'{"text": "\\ud800"}': "surrogate",
        b"[" * 100_000: "bad JSON",
        b'{"text": "a", "n": ' + b"9" * 10_000 + b"}": "bad JSON",
    }
    for line, expected in bad.items():
        before, lost, after = read("a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
        assert (before, after) == ("a", "b") and expected in cause(lost)
        assert expected in cause(read("a.json", line)[0])
    assert "not UTF-8" in cause(read("a.txt", b"caf\xe9 au lait")[0])


@pytest.mark.parametrize(("suffix", "encode"), [(".gz", gzip.compress), (".zst", zst)])
def test_broken_compression_loses_the_member(suffix: str, encode) -> None:  # type: ignore[no-untyped-def]
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(5000))
    data = encode(content)
    assert len(read("a.jsonl" + suffix, data)) == 5000
    assert len(read("a.jsonl" + suffix, data + data)) == 10000  # members and frames may follow each other
    for cut in (0, 1, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(MemberError):
            read("a.jsonl" + suffix, data[:cut])
    with pytest.raises(MemberError):
        read("a.jsonl" + suffix, b"plain text")
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0xFF
    with pytest.raises(MemberError):
        read("a.jsonl" + suffix, bytes(damaged))


@pytest.mark.parametrize(("suffix", "encode"), [(".gz", gzip.compress), (".zst", zst)])
def test_decompression_is_bounded(suffix: str, encode) -> None:  # type: ignore[no-untyped-def]
    bomb = encode(bytes(64 << 20))
    with pytest.raises(MemberError, match="more than 1048576 bytes"):
        read("a.txt" + suffix, bomb, max_bytes=1 << 20)
    assert len(b"".join(decompress([bomb], suffix))) == 64 << 20  # type: ignore[arg-type]


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize(("suffix", "encode"), [(".gz", gzip.compress), (".zst", zst)])
def test_streams_in_pieces(suffix: str, encode, piece: int) -> None:  # type: ignore[no-untyped-def]
    content = b"".join(b"%d " % (i * i) for i in range(3000))
    data = encode(content) + encode(b"") + encode(b"tail")
    pieces = [data[i : i + piece] for i in range(0, len(data), piece)]
    assert b"".join(decompress(pieces, suffix)) == content + b"tail"  # type: ignore[arg-type]
