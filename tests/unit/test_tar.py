import io
import itertools
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlm_dist.data.tar import TarError, iter_members, map_archive

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a-directory-with-a-long-name/" * 6
UNICODE = "Œuvres complètes/" * 12 + "日本語 — текст.txt"


def build(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, pax: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers=pax) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read(data: bytes | memoryview, **options: bool | int) -> list[tuple[str, bytes]]:
    return [(member.name, bytes(member.data)) for member in iter_members(data, **options)]


def test_formats_and_long_names() -> None:
    plain = [("a.txt", b"one"), ("b/empty.txt", b""), ("c.txt", b"x" * 512), ("d.txt", b"y" * 1025)]
    assert read(build(plain), whole=True) == plain
    with_prefix = [*plain, (LONG[:150] + "/f.txt", b"in the prefix field")]
    assert read(build(with_prefix), whole=True) == with_prefix
    long_names = [*plain, (LONG + "f.txt", b"long"), (UNICODE, b"unicode"), ("é.txt", b"short unicode")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert read(build(long_names, form), whole=True) == long_names
    assert read(build(long_names, tarfile.PAX_FORMAT, {"comment": "a global header"}), whole=True) == long_names


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    files=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=150),
            st.binary(max_size=1500),
        ),
        max_size=6,
    ),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_agrees_with_tarfile(files: list[tuple[str, bytes]], form: int) -> None:
    data = build(files, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]
    assert read(data, whole=True) == expected


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_members_cut_out_of_an_archive_read_alone(form: int) -> None:
    name = LONG + "m.txt" if form != tarfile.USTAR_FORMAT else "m.txt"
    files = [(f"{i}-{name}", bytes([65 + i]) * (300 * i)) for i in range(8)]
    data = build(files, form)
    members = list(iter_members(data, whole=True))
    assert members[0].start == 0
    for before, after in itertools.pairwise(members):
        assert before.end == after.start and after.start % 512 == 0
    for i in range(8):
        for j in range(i + 1, 9):
            start, end = members[i].start, members[j - 1].end
            run = list(iter_members(data[start:end], base=start))
            assert [(m.name, bytes(m.data), m.start, m.end) for m in run] == [
                (m.name, bytes(m.data), m.start, m.end) for m in members[i:j]
            ]


def test_what_is_no_file_is_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (
            ("d.txt", tarfile.DIRTYPE),
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("fifo.txt", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "x" * 200  # takes an extension header
            archive.addfile(info)
        info = tarfile.TarInfo("real.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"real"))
    assert read(out.getvalue(), whole=True) == [("real.txt", b"real")]


def test_v7_header_and_base_256_size() -> None:
    header = bytearray(build([("v7.txt", b"hello")])[:512])

    def signed(raw: bytearray) -> bytes:
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
        return bytes(raw) + b"hello".ljust(512, b"\0") + bytes(1024)

    header[156] = 0
    header[257:512] = bytes(255)
    assert read(signed(header), whole=True) == [("v7.txt", b"hello")]
    header[124:136] = b"\x80" + (5).to_bytes(11, "big")
    assert read(signed(header), whole=True) == [("v7.txt", b"hello")]
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    with pytest.raises(TarError, match="cut in a member's data"):
        read(signed(header))
    header[124:136] = b"\xff" * 12
    with pytest.raises(TarError, match="size field"):
        read(signed(header))


def test_every_cut_is_an_error() -> None:
    files = [(f"{i}.txt", b"data" * 100 * i) for i in range(1, 5)]
    data = build(files)
    end = list(iter_members(data))[-1].end
    # At header boundaries, too: there tarfile and webdataset see a shorter, whole archive.
    for cut in [*range(1, end + 512, 128), end]:
        with pytest.raises(TarError) as caught:
            read(data[:cut], whole=True)
        assert 0 <= caught.value.offset <= cut
    assert read(data[: end + 512], whole=True) == files


def test_garbage_is_an_error_with_its_place() -> None:
    files = [(f"{i}.txt", b"d" * 700) for i in range(6)]
    data = build(files)
    third = list(iter_members(data))[2].start
    for damage, cause in (
        (b"\xa5" * 4096, "not a tar header"),
        (bytes(512), "after the end mark"),
        (b"x", "checksum"),
    ):
        broken = data[:third] + damage + data[third + len(damage) :]
        members = iter_members(broken, base=1_000_000, whole=True)
        assert [next(members).name, next(members).name] == ["0.txt", "1.txt"]
        with pytest.raises(TarError, match=cause) as caught:
            next(members)
        assert caught.value.offset >= 1_000_000 + third
        assert str(caught.value.offset) in str(caught.value)
    with pytest.raises(TarError, match="after the end mark"):
        read(data + data, whole=True)


def test_any_flipped_header_byte_is_an_error() -> None:
    data = build([("name.txt", b"text")])
    for i in set(range(512)) - {155}:  # that one lies behind the NUL that ends the checksum and means nothing
        broken = bytearray(data)
        broken[i] ^= 0x15
        with pytest.raises(TarError):
            read(bytes(broken), whole=True)


def test_sparse_and_unknown_types_and_broken_pax_are_errors() -> None:
    sparse = tarfile.TarInfo("s.txt")
    sparse.type = tarfile.GNUTYPE_SPARSE
    unknown = tarfile.TarInfo("u.txt")
    unknown.type = b"Q"
    for info, cause in ((sparse, "sparse"), (unknown, "type b'Q'")):
        with pytest.raises(TarError, match=cause):
            read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    info = tarfile.TarInfo("p.txt")
    info.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(TarError, match="sparse"):
        read(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    for key in ("path", "size"):
        with pytest.raises(TarError, match="global header"):
            read(build([("a.txt", b"x")], tarfile.PAX_FORMAT, {key: "1"}))
    whole = build([(UNICODE, b"x")], tarfile.PAX_FORMAT)
    with pytest.raises(TarError, match="PAX"):
        read(whole.replace(b" path=", b" path:"))


def test_extension_headers_are_bounded() -> None:
    def extended(kind: bytes, payload: bytes) -> bytes:
        info = tarfile.TarInfo("@")
        info.type, info.size = kind, len(payload)
        member = build([("real.txt", b"text")])
        return info.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512) + member

    assert read(extended(b"L", b"x" * (1 << 20)), whole=True) == [("x" * (1 << 20), b"text")]
    for kind in (b"L", b"K", b"x", b"g"):
        with pytest.raises(TarError, match="extension header of 1048577 bytes"):
            read(extended(kind, b"x" * ((1 << 20) + 1)), whole=True)
    for kind, payload in ((b"L", b""), (b"L", b"\0name"), (b"x", b"8 path=\n")):
        with pytest.raises(TarError, match="empty name"):
            read(extended(kind, payload), whole=True)
    for digits in (b"9" * 21, b"9" * 5000, b"-1", b"1e3"):  # Python converts no number of more than 4300 digits
        record = b" size=" + digits + b"\n"
        length = next(n for n in range(len(record), len(record) + 6) if len(b"%d" % n) + len(record) == n)
        with pytest.raises(TarError, match="as the member's size"):
            read(extended(b"x", b"%d" % length + record), whole=True)


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(TarError(512, "cause")))
    assert (error.offset, error.cause, str(error)) == (512, "cause", "at byte 512: cause")


def test_mapped_file(tmp_path: Path) -> None:
    files = [(f"{i}.txt", b"z" * i) for i in range(50)]
    path = tmp_path / "a.tar"
    path.write_bytes(build(files))
    assert read(map_archive(path), whole=True) == files
    path.write_bytes(bytes(10240))
    assert read(map_archive(path), whole=True) == []
    path.write_bytes(b"")
    with pytest.raises(TarError, match="empty"):
        read(map_archive(path), whole=True)
    with pytest.raises(OSError):
        map_archive(tmp_path / "none.tar")
