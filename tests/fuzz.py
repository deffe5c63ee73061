"""Mutated archives, manifests and members: `python -m tests.fuzz --count 100000`.

Every input is made from its number alone, so `--first N --count 1` repeats one. What is asked of the readers: they give documents
or one of their own errors, within bounds of memory and time; what `index` counts is what a reader of the blocks gets; and an
archive that they take is the one that Python's `tarfile` sees.
"""

import argparse
import copy
import gzip
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import zstandard

from mlm_dist.data.archive import block_documents
from mlm_dist.data.losses import Losses
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, MemberError, TokenIds, read_documents
from mlm_dist.data.scan import ScanOptions, scan_archive
from mlm_dist.data.tar import iter_members
from mlm_dist.errors import UserError

IDS = TokenIds("ab" * 32, 1000, 7, (0, 5, 6))
MAX_BYTES = 4 << 20
MEMORY = 512 << 20
SECONDS = 5.0
OPTIONS = ScanOptions(block_size=4096, ids=IDS, max_bytes=MAX_BYTES)
SKIPPING = ScanOptions(block_size=4096, ids=IDS, max_bytes=MAX_BYTES, skip_damaged=True)
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    127,
    255,
    511,
    512,
    513,
    65535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
]
VALUES = [
    None,
    True,
    False,
    1.5,
    float("nan"),
    "",
    "x",
    "../x",
    "/x",
    "pipe:x",
    "s3://b/x",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    *NUMBERS,
]


class TooSlow(BaseException):
    """An input took longer than it may."""


def zst(data: bytes) -> bytes:
    """One zstd frame with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def npy(*content: int, dtype: str = "<u2") -> bytes:
    """An array file."""
    out = io.BytesIO()
    np.save(out, np.array(content, dtype))
    return out.getvalue()


LINES = "".join(json.dumps({"text": f"line {i} ü\u2028", "n": [i, {"a": None}]}) + "\n" for i in range(20)).encode()
MEMBERS = {
    "a.txt": "text ü\n".encode() * 30,
    "b.json": b'{"text": "one", "id": 5}',
    "c.jsonl": LINES,
    "d.jsonl.gz": gzip.compress(LINES),
    "e.jsonl.zst": zst(LINES),
    "f.npy": npy(10, 11, 7, 12, 7, 999),
    "g.npy.gz": gzip.compress(npy(*range(10, 400), dtype="<i8")),
    "h.txt": b"",
    "i.png": bytes(700),
    "j.jsonl.zst": zst(bytes(MAX_BYTES + 1)),
    "a-directory-with-a-long-name/" * 6 + "k ü.txt": b"long name",
}


def archive(names: list[str], form: int) -> bytes:
    """A tar of these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(MEMBERS[name])
            tar.addfile(info, io.BytesIO(MEMBERS[name]))
    return out.getvalue()


def make_tar(rng: random.Random) -> bytes:
    """A small archive, sound or mutated below the checksums of its headers."""
    names = rng.sample(sorted(set(MEMBERS) - {"j.jsonl.zst"}), rng.randint(1, 5))
    if rng.random() < 0.1:
        names.append("j.jsonl.zst")
    data = archive(names, rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    data = data[: -(-len(data.rstrip(b"\0")) // 512) * 512 + 1024]  # less padding: more mutations that mean something
    if rng.random() < 0.5:
        data = sign_headers(mutate_header(data, rng))
    return data


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Change fields of some headers."""
    out = bytearray(data)
    heads = [i for i in range(0, len(out), 512) if out[i + 257 : i + 262] == b"ustar"]
    for start in rng.sample(heads, min(len(heads), rng.randint(1, 2))):
        field, width = rng.choice([(0, 100), (124, 12), (124, 12), (156, 1), (156, 1), (257, 8), (345, 155)])
        if field == 124:
            number = rng.choice([n for n in NUMBERS if n >= 0])
            value = rng.choice(
                [
                    b"%011o\0" % min(number, 8**11 - 1),
                    b"\x80" + (number % (1 << 88)).to_bytes(11, "big"),
                    b"%d" % number,
                ]
            )
        elif field == 156:
            value = rng.choice([b"\0", *[bytes([c]) for c in b"01234567LKxgSVNXQ"]])
        else:
            value = rng.randbytes(rng.randint(1, width))
        out[start + field : start + field + min(len(value), width)] = value[:width]
    return bytes(out)


def sign_headers(data: bytes) -> bytes:
    """Give every header the checksum that its bytes have now."""
    out = bytearray(data)
    for i in range(0, len(out) - 511, 512):
        if out[i + 257 : i + 262] == b"ustar":
            out[i + 148 : i + 156] = b" " * 8
            out[i + 148 : i + 156] = b"%06o\0 " % sum(out[i : i + 512])
    return bytes(out)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change, insert, remove, repeat or cut some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(out) + 1)
        length = min(rng.choice([1, 1, 2, 8, 64, 512, 4096]), len(out) - at)
        kind = rng.randrange(7)
        if kind == 0 and length:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            out[at : at + length] = bytes([rng.choice(b'\0\xff 09{}[]"\\')]) * length
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.choice([1, 7, 512]))
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            out[at:at] = out[at : at + length]
        else:
            del out[at:]
    return bytes(out)


def check_archive(name: str, data: bytes) -> bool:
    """Index an archive, whole and with damage skipped, and read back what was counted. Gives whether it was taken."""
    view = memoryview(data)
    for options in (SKIPPING, OPTIONS):
        try:
            found = scan_archive(view, name, options)
        except UserError:
            assert options is OPTIONS, "damage was to be skipped"
            return False
        shard = found.shard
        for offset, length, count, crc32 in zip(
            shard.offsets, shard.lengths, shard.documents, shard.crc32, strict=True
        ):
            block = data[offset : offset + length]
            documents = [check_document(d) for d in block_documents(block, name, ids=IDS, max_bytes=MAX_BYTES)]
            lost = sum(loss["documents"] for loss in found.losses if loss["offset"] == offset)
            assert (zlib.crc32(block), documents.count(True), documents.count(False)) == (crc32, count, lost)
    assert not found.damaged
    if name.endswith(".tar"):
        check_against_tarfile(data)
    return True


def check_document(document: object) -> bool:
    """A document is what the rows can be made of. Gives whether it is one."""
    if isinstance(document, LostDocument):
        assert document.cause and len(document.cause) < 2000
        document.cause.encode()
        return False
    if isinstance(document, str):
        document.encode()
        return True
    assert isinstance(document, np.ndarray) and document.dtype == IDS.dtype and document.ndim == 1
    assert not np.isin(document, (IDS.sep_id, *IDS.banned)).any() and (document < IDS.vocab_size).all()
    return True


def check_against_tarfile(data: bytes) -> None:
    """`tarfile` finds the same members in an archive that was taken."""
    ours = [(member.name, bytes(member.data)) for member in iter_members(data, whole=True)]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]
    assert [data for _, data in ours] == [data for _, data in theirs]
    for our, their in zip(ours, theirs, strict=True):
        our_name, their_name = (os.fsencode(name).rstrip(b"/") for name in (our[0], their[0]))
        # tarfile takes the prefix field of any header, also where no magic says that it is one, and a long name to the end of its
        # padding, whatever size its header gives.
        assert (b"/" + their_name).endswith(b"/" + our_name) or their_name.startswith(our_name)


def fuzz_tar(rng: random.Random) -> bool:
    data = make_tar(rng)
    return check_archive("a.tar", mutate(data, rng) if rng.random() < 0.6 else data)


def fuzz_compressed(rng: random.Random) -> bool:
    name, compress = rng.choice(
        [("a.tar.gz", lambda data: gzip.compress(data, 1)), ("b/a.TAR.ZST", zst), ("pipe:cat a", zst)]
    )
    data = make_tar(rng)
    if rng.random() < 0.3:
        data = mutate(data, rng)
    data = compress(data)
    return check_archive(name, mutate(data, rng) if rng.random() < 0.6 else data)


def fuzz_member(rng: random.Random) -> bool:
    name = rng.choice(sorted(MEMBERS))
    data = MEMBERS[name]
    if name == "f.npy" and rng.random() < 0.7:  # a header of the right length
        text = mutate(data[10:128], rng)
        data = data[:8] + len(text).to_bytes(2, "little") + text + data[128:]
    elif name[-3:] == ".gz" and rng.random() < 0.5:
        data = gzip.compress(mutate(gzip.decompress(data), rng), 1)
    else:
        data = mutate(data, rng)
    try:
        return all([check_document(d) for d in read_documents(name, data, ids=IDS, max_bytes=MAX_BYTES)])
    except MemberError:
        return False


def manifest_json() -> str:
    """The text of a manifest with every field there is."""
    shards = [scan_archive(memoryview(make_tar(random.Random(i))), f"{i}.tar", SKIPPING).shard for i in (1, 2, 3)]
    lost = {"shard": "1.tar", "offset": 0, "documents": 2, "cause": "bad JSON"}
    part = {"shard": "2.tar", "offset": 0, "bytes": 2, "cause": "cut"}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.json"
        Manifest("s3://bucket/x", shards, {"a": 1}, token_ids=IDS, losses=Losses.of([lost], [part])).write(path)
        return path.read_text()


def fuzz_manifest(rng: random.Random, path: Path, text: str) -> bool:
    if rng.random() < 0.3:
        path.write_bytes(mutate(text.encode(), rng))
    else:
        content = json.loads(text)
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate_json(content, rng)
        path.write_text(json.dumps(content))
        if rng.random() < 0.8:
            sign_manifest(path, content)
    try:
        manifest = Manifest.read(path)
    except UserError as error:
        assert len(str(error)) < 20_000
        return False
    for shard in manifest.shards:
        ends = shard.offsets + shard.lengths
        assert (shard.offsets >= 0).all() and (ends <= shard.size).all() and (ends[:-1] <= shard.offsets[1:]).all()
        assert not str(shard.path).startswith("/") and manifest.where(shard)
    assert manifest.num_documents >= 0 and manifest.num_bytes > 0 and manifest.losses.describe() is not None
    manifest.write(path)
    assert Manifest.read(path).fingerprint == manifest.fingerprint
    return True


def mutate_json(content: dict | list, rng: random.Random) -> None:
    """Change, remove or repeat a value somewhere below."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    if not keys:
        return
    key = rng.choice(keys)  # type: ignore[arg-type]
    value = content[key]  # type: ignore[index, call-overload]
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        mutate_json(value, rng)
    elif rng.random() < 0.2:
        del content[key]  # type: ignore[arg-type]
    elif rng.random() < 0.2 and isinstance(content, list):
        content.append(copy.deepcopy(rng.choice(content)))
    else:
        content[key] = copy.deepcopy(rng.choice(VALUES))  # type: ignore[index, call-overload]


def sign_manifest(path: Path, content: dict) -> None:
    """Write the fingerprint that the changed manifest would have, if it is one in all else."""
    try:
        Manifest.read(path)
    except UserError as error:
        words = str(error).split("the shards listed give ")
        if len(words) == 2:
            content["fingerprint"] = words[1][:64]
            path.write_text(json.dumps(content))


def limit_memory(extra: int) -> None:
    """Let this process have this many bytes more of address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def run(first: int, count: int) -> int:
    """Run inputs `first` to `first + count - 1`; gives the exit code."""

    def too_slow(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    text = manifest_json()
    taken: Counter[str] = Counter()
    met: Counter[str] = Counter()
    slowest = 0.0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.json"
        targets: list[tuple[str, Callable[[random.Random], bool]]] = [
            ("tar", fuzz_tar),
            ("compressed", fuzz_compressed),
            ("member", fuzz_member),
            ("manifest", lambda rng: fuzz_manifest(rng, path, text)),
        ]
        warnings.simplefilter("error")
        limit_memory(MEMORY)
        for number in range(first, first + count):
            name, target = targets[number % len(targets)]
            start = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                taken[name] += target(random.Random(number))
            except (Exception, TooSlow):
                signal.setitimer(signal.ITIMER_REAL, 0)
                traceback.print_exc()
                print(
                    f"input {number} ({name}) failed; again: python -m tests.fuzz --first {number} --count 1",
                    file=sys.stderr,
                )
                return 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            met[name] += 1
            slowest = max(slowest, time.monotonic() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    shares = ", ".join(f"{name} {taken[name]} of {met[name]}" for name, _ in targets)
    print(
        f"{count} inputs in {time.monotonic() - began:.0f} s; taken: {shares}; slowest {slowest:.2f} s; peak {peak} MiB"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first input (default 0)")
    parser.add_argument("--count", type=int, default=2000, help="how many inputs (default 2000)")
    args = parser.parse_args()
    return run(args.first, args.count)


if __name__ == "__main__":
    sys.exit(main())
