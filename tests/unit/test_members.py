import gzip
import io
import json
import warnings
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard

from mlm_dist.data.members import (
    LostDocument,
    MemberError,
    TokenIds,
    decompress,
    holds_documents,
    is_ids_member,
    is_text_member,
    label,
    read_documents,
)

SEP = 7
IDS = TokenIds("f" * 64, 1000, SEP, (0, 5))


def read(name: str, data: bytes, **options: object) -> list[Any]:
    return list(read_documents(name, data, **options))  # type: ignore[arg-type]


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def cause(document: object) -> str:
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


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", ">u2", ">i8"])
@pytest.mark.parametrize(("suffix", "encode"), [("", bytes), (".gz", gzip.compress), (".zst", zst)])
def test_token_ids_are_cut_into_documents_after_each_separator(dtype: str, suffix: str, encode) -> None:  # type: ignore[no-untyped-def]
    for content, expected in (
        ([], []),
        ([SEP], [[]]),
        ([10], [[10]]),
        ([10, 11, SEP, 12], [[10, 11], [12]]),
        ([10, 11, SEP, 12, SEP], [[10, 11], [12]]),
        ([SEP, SEP, 999, SEP, SEP], [[], [], [999], []]),
    ):
        found = read("a.b.NPY" + suffix, encode(npy(np.array(content, dtype))), ids=IDS)
        assert [document.tolist() for document in found] == expected
        assert all(document.dtype == np.uint16 for document in found)
    wide = TokenIds("f" * 64, 1 << 17, SEP, ())
    (document,) = read("a.npy", npy(np.array([70_000], np.int32)), ids=wide)
    assert document.dtype == np.uint32 and document.tolist() == [70_000]


def test_a_document_with_an_impossible_id_is_lost_alone() -> None:
    for bad, expected in (
        (1000, "token id 1000 at place 4 of the array is outside 0 to 999"),
        (-1, "token id -1 at place 4 of the array is outside 0 to 999"),
        (1 << 40, "token id 1099511627776 at place 4 "),
        (0, "token id 0 at place 4 of the array is a special token"),
        (5, "token id 5 at place 4 of the array is a special token"),
    ):
        array = np.array([10, 11, SEP, 12, bad, bad, 13, SEP, 14], np.int64)
        before, lost, after = read("a.npy", npy(array), ids=IDS)
        assert (before.tolist(), after.tolist()) == ([10, 11], [14]) and expected in cause(lost)
        assert expected.replace("place 4", "place 0") in cause(read("a.npy", npy(np.array([bad])), ids=IDS)[0])


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    raw = text.encode("latin1")
    return b"\x93NUMPY" + version + len(raw).to_bytes(2 if version[0] == 1 else 4, "little") + raw


def test_an_array_that_cannot_be_ids_loses_the_member() -> None:
    good = npy(np.arange(10, 20, dtype=np.uint16))
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    head = "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }"
    for data, expected in (
        (npy(np.zeros(3)), "1 dimensions and type float64"),
        (npy(np.zeros(3, np.uint8)), "type uint8 is no list of token ids"),
        (npy(np.zeros(3, bool)), "type bool"),
        (npy(np.zeros((3, 2), np.int32)), "2 dimensions"),
        (npy(np.array(3)), "0 dimensions"),
        (npy(np.zeros(3, [("a", "<u2")])), "is no list"),
        (objects.getvalue(), "type object"),
        (good[:-1], "19 bytes of ids where its header says 20"),
        (good + b"\0\0", "22 bytes of ids"),
        (good + good, "bytes of ids"),
        (b"", "header"),
        (good[:50], "header"),
        (b"PK" + good[2:], "header"),
        (good[:6] + b"\x03" + good[7:], "header"),
        (header("{" * 9000), "header"),
        (header("[" * 200), "header"),
        (header(head % "'a'"), "header"),
        (header(head % -3), "says -6"),
        (header(head % (1 << 60)), "0 bytes of ids where its header says"),
        (header(head % 1, b"\x02\x00") + b"\0", "1 bytes of ids where its header says 2"),
        (header(head % "10L") + bytes(2), "bytes of ids"),
        (header("9" * 5000), "header"),
        (header("{'descr': __import__('os'), 'fortran_order': False, 'shape': (1,), }"), "header"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(MemberError, match=expected):
                read("a.npy", data, ids=IDS)


def test_arrays_are_read_only_by_those_who_know_the_ids() -> None:
    data = npy(np.zeros(3))
    for name in ("a.npy", "x/b.NPY.gz", "c.npy.zst"):
        assert is_ids_member(name) and not is_text_member(name)
        assert holds_documents(name, IDS) and not holds_documents(name, None)
        assert read(name, data) == []  # embeddings beside the text, say
    assert not is_ids_member("._a.npy") and not holds_documents("a.npz", IDS)


def test_ids_of_a_tokenizer() -> None:
    tokenizer = SimpleNamespace(fingerprint="ab", vocab_size=9, cls_id=3, sep_id=2, pad_id=0, mask_id=1)
    assert TokenIds.of(tokenizer) == TokenIds("ab", 9, 2, (0, 1, 3))  # type: ignore[arg-type]


def test_causes_stay_short_and_printable() -> None:
    lost = read("a.json", json.dumps({"k" * 1_000_000: 1, "b": 2}).encode())[0]
    assert len(cause(lost)) < 200 and "'b'" in cause(lost)
    assert label("a/b é.txt") == "a/b é.txt"
    shown = label("\x1b[2J\udcff\n" + "x" * 1_000_000)
    assert shown.isprintable() and shown.isascii() and len(shown) < 300 and shown.startswith("\\x1b[2J\\udcff\\n")


def test_gzip_data_in_one_piece_is_not_copied_for_each_piece_that_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = 0
    make = zlib.decompressobj

    class Counting:
        def __init__(self, wbits: int) -> None:
            self.inner = make(wbits=wbits)

        def decompress(self, data: bytes, limit: int) -> bytes:
            nonlocal fed
            fed += len(data)
            return self.inner.decompress(data, limit)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    content = np.random.Philox(key=1).random_raw(1 << 20).tobytes()
    data = gzip.compress(content, 1)
    assert b"".join(decompress([data], ".gz")) == content
    assert len(data) <= fed < 2 * len(data)
