"""The table of faults in docs/data.md: `python -m benchmarks.faults` damages a small corpus in every way of a list, trains an epoch of
it and prints what came of each, as Markdown.

A document counts as delivered when its tokens, whole and once, are in the rows of the epoch.
"""

import gzip
import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import zstandard

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.index import index
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.members import MAX_MEMBER_BYTES, TokenIds
from mlm_dist.data.stream import Stream
from mlm_dist.data.tar import Member, iter_members
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.data.verify import Problem, verify
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
from tests.corpora import WORDS, save_tokenizer

DOCUMENTS = 100
PER_MEMBER = 4
BLOCK = 4096
TEXTS = [" ".join([*str(i), *(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(60))]) for i in range(DOCUMENTS)]
BOMB_PIECE = 256 << 20


@dataclass
class Corpus:
    """A directory of four shards, 25 members of 4 documents: lines of JSON, plain and as `.zst` members, token ids, and a `.tar.gz`."""

    root: Path
    tokenizer: TextTokenizer

    def path(self, name: str) -> Path:
        """A shard's file."""
        return self.root / name

    def member(self, name: str, i: int) -> Member:
        """Member `i` of a plain shard, as it lies there now."""
        return list(iter_members(self.path(name).read_bytes(), whole=True))[i]

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Replace a shard by what `change` makes of it."""
        self.path(name).write_bytes(change(self.path(name).read_bytes()))

    def edit_member(self, name: str, i: int, change: Callable[[bytes], bytes]) -> None:
        """Write a shard again with another content of member `i`."""
        members = list(iter_members(self.path(name).read_bytes(), whole=True))
        files = [(m.name, change(bytes(m.data)) if j == i else bytes(m.data)) for j, m in enumerate(members)]
        self.path(name).write_bytes(pack(files))


@dataclass(frozen=True)
class Fault:
    """One way in which data go bad.

    Attributes:
        name: What the table calls it.
        damage: Does it to a corpus.
        when: `before` the manifest is made, or `after`; `vouched`: after, and the manifest was given the checksums of the bad bytes, so
            that only reading them tells.
        skip: Whether `index --skip-damaged` makes the manifest.
    """

    name: str
    damage: Callable[[Corpus], None]
    when: str = "after"
    skip: bool = False


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        refused: Why `index` made no manifest, or empty.
        delivered: Documents whose tokens were in the rows.
        strangers: Rows that are no document of the corpus, or one for the second time.
        ledger: Documents in the run's ledger.
        listed: Documents that the manifest lists as unreadable when it was made.
        damaged: Bytes that the manifest lists as left out, of an unknown number of documents.
        causes: Of what is lost, one line each.
        problems: What `mlm-dist data verify` finds.
    """

    refused: str = ""
    delivered: int = 0
    strangers: int = 0
    ledger: int = 0
    listed: int = 0
    damaged: int | None = None
    causes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def pack(files: list[tuple[str, bytes]]) -> bytes:
    """A tar of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zst(data: bytes) -> bytes:
    """One zstd frame with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def gz(data: bytes) -> bytes:
    """One gzip member, the same each time."""
    return gzip.compress(data, 1, mtime=0)


@cache
def bomb(encode: Callable[[bytes], bytes], size: int = MAX_MEMBER_BYTES + 1) -> bytes:
    """A compressed stream of at least `size` zeros: frames of 256 MiB, one after the other."""
    return encode(bytes(BOMB_PIECE)) * -(-size // BOMB_PIECE)


def make_corpus(root: Path, tokenizer: TextTokenizer) -> Corpus:
    """Write the shards."""
    groups = [TEXTS[i : i + PER_MEMBER] for i in range(0, DOCUMENTS, PER_MEMBER)]
    lines = ["".join(json.dumps({"text": text}) + "\n" for text in group).encode() for group in groups]
    shards = {
        "plain.tar": [(f"{i:02d}.jsonl", lines[i]) for i in range(10)],
        "zst.tar": [(f"{i:02d}.jsonl.zst", zst(lines[i])) for i in range(10, 15)],
        "ids.tar": [(f"{i:02d}.npy", npy(groups[i], tokenizer)) for i in range(15, 20)],
        "packed.tar.gz": [(f"{i:02d}.jsonl", lines[i]) for i in range(20, 25)],
    }
    root.mkdir(parents=True)
    for name, files in shards.items():
        content = pack(files)
        (root / name).write_bytes(gz(content) if name.endswith(".gz") else content)
    return Corpus(root, tokenizer)


def npy(texts: list[str], tokenizer: TextTokenizer) -> bytes:
    """The token ids of these texts, each ended by [SEP]."""
    content = [i for text in texts for i in [*tokenizer.encode([text])[0].tolist(), tokenizer.sep_id]]
    out = io.BytesIO()
    np.save(out, np.array(content, np.uint16))
    return out.getvalue()


def _write(name: str, content: bytes) -> Callable[[Corpus], None]:
    return lambda corpus: corpus.edit(name, lambda _: content)


def _member(name: str, i: int, change: Callable[[bytes], bytes]) -> Callable[[Corpus], None]:
    return lambda corpus: corpus.edit_member(name, i, change)


def _cut_in_member(corpus: Corpus) -> None:
    member = corpus.member("plain.tar", 5)
    corpus.edit("plain.tar", lambda data: data[: member.start + 700])


def _cut_at_header(corpus: Corpus) -> None:
    member = corpus.member("plain.tar", 5)
    corpus.edit("plain.tar", lambda data: data[: member.start])


def _garbage(corpus: Corpus) -> None:
    start = corpus.member("plain.tar", 5).start
    corpus.edit("plain.tar", lambda data: data[:start] + b"\xa5" * 4096 + data[start + 4096 :])


def _flip(name: str, at: int) -> Callable[[Corpus], None]:
    return lambda corpus: corpus.edit(name, lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def _record(old: bytes, new: bytes) -> Callable[[Corpus], None]:
    return _member("plain.tar", 3, lambda data: data.replace(old, new, 1))


def _bomb_member(corpus: Corpus) -> None:
    corpus.edit_member("zst.tar", 2, lambda _: bomb(zst))


def _bomb_archive(corpus: Corpus) -> None:
    corpus.path("packed.tar.gz").write_bytes(bomb(gz))


_NOT_A_TAR = b"<!DOCTYPE html><title>503 Service Unavailable</title>" * 100
_STRUCTURE: list[tuple[str, Callable[[Corpus], None]]] = [
    ("cut in a member", _cut_in_member),
    ("cut at a header", _cut_at_header),
    ("4 KiB of garbage over headers", _garbage),
    ("an empty file", _write("plain.tar", b"")),
    ("not a tar", _write("plain.tar", _NOT_A_TAR)),
    ("a `.zst` member that is cut", _member("zst.tar", 2, lambda data: data[:-5])),
    ("a `.zst` member of more than 1 GiB (a bomb)", _bomb_member),
    ("a `.npy` member with a damaged header", _member("ids.tar", 2, lambda data: data[:20] + b"\xff" + data[21:])),
    ("a `.tar.gz` with a byte changed", _flip("packed.tar.gz", 300)),
    ("a `.tar.gz` of more than 1 GiB (a bomb)", _bomb_archive),
]
_SINGLE: list[tuple[str, Callable[[Corpus], None]]] = [
    ("a record that is not JSON", _record(b'"text": ', b'"text" ')),
    ("a record without the field", _record(b'"text"', b'"body"')),
    ("a record that is not UTF-8", _record(b"1 2 ", b"\xff 2 ")),
    ("a token id outside the vocabulary", _member("ids.tar", 2, lambda data: data[:-6] + b"\xff\xff" + data[-4:])),
]
FAULTS = [
    *(Fault(name, damage) for name, damage in _STRUCTURE),
    *(Fault(name, damage) for name, damage in _SINGLE),
    Fault("a byte of text changed", _flip("plain.tar", 700)),
    Fault("bytes added at the end", lambda corpus: corpus.edit("plain.tar", lambda data: data + bytes(100))),
    Fault("a shard gone", lambda corpus: corpus.path("plain.tar").unlink()),
    Fault(_STRUCTURE[6][0], _bomb_member, "vouched"),
    Fault(_STRUCTURE[7][0], _STRUCTURE[7][1], "vouched"),
    *(Fault(name, damage, "before") for name, damage in _SINGLE),
    *(Fault(name, damage, "before") for name, damage in _STRUCTURE),
    *(Fault(name, damage, "before", skip=True) for name, damage in _STRUCTURE),
]


def run_fault(fault: Fault, root: Path, tokenizer: TextTokenizer) -> Outcome:
    """Make the corpus and its manifest, damage it, verify it and train an epoch of it."""
    corpus = make_corpus(root, tokenizer)
    output = root / "manifest.json"

    def make_manifest(skip: bool = False) -> Manifest:
        return index([str(root)], output, block_size=BLOCK, ids=TokenIds.of(tokenizer), skip_damaged=skip)

    if fault.when == "before":
        fault.damage(corpus)
        try:
            manifest = make_manifest(fault.skip)
        except UserError as error:
            return Outcome(refused=str(error).replace(f"{root}/", ""))
    else:
        manifest = make_manifest()
        fault.damage(corpus)
        if fault.when == "vouched":
            manifest = vouch(manifest)
    store = Store(manifest.root, wait=0.0)
    outcome = train(manifest, store, tokenizer)
    losses = manifest.losses
    outcome.listed = losses.documents
    outcome.damaged = sum(part["bytes"] for part in losses.damaged) if losses.damaged else None
    outcome.causes += [entry["cause"] for entry in (*losses.listed, *losses.damaged)]
    outcome.problems = verify(manifest, store)
    return outcome


def vouch(manifest: Manifest) -> Manifest:
    """The manifest with sizes and checksums of the shards as they are now, each as one block."""
    shards = []
    for i, shard in enumerate(manifest.shards):
        content = manifest.shard_path(i).read_bytes()
        end = len(content) if shard.path.endswith(".gz") else list(iter_members(content))[-1].end
        shards.append(
            replace(
                shard,
                size=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
                offsets=np.array([0]),
                lengths=np.array([end]),
                documents=np.array([int(shard.documents.sum())]),
                crc32=np.array([zlib.crc32(content[:end])], np.uint32),
            )
        )
    return Manifest(manifest.root, shards, manifest.info, token_ids=manifest.token_ids)


def train(manifest: Manifest, store: Store, tokenizer: TextTokenizer) -> Outcome:
    """One epoch of rows of one document each."""
    maker = BlockMaker(
        manifest=manifest,
        store=store,
        tokenizer=tokenizer,
        seq_len=400,
        packing="none",
        long_documents="chunk",
        mask=MaskConfig(),
        seed=0,
    )
    expected = Counter(tuple(tokenizer.encode([text])[0].tolist()) for text in TEXTS)
    outcome = Outcome()
    for batch in Stream([maker], 8, 8, lanes=2, epochs=1).batches():
        outcome.ledger += sum(fault.documents for fault in batch.faults)
        outcome.causes += [fault.cause for fault in batch.faults]
        if not batch.live.any():
            break
        rows = batch.rows.take(np.flatnonzero(batch.live))
        ids = np.split(rows.original_ids(), np.cumsum(rows.lengths)[:-1])
        for document in (tuple(row[1:-1].tolist()) for row in ids):
            if expected[document]:
                expected[document] -= 1
                outcome.delivered += 1
            else:
                outcome.strangers += 1
    return outcome


def table(outcomes: list[tuple[Fault, Outcome]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| fault | documents in | delivered | in the ledger | cause given |"
    yield "|---|---|---|---|---|"
    heads = {
        "after": "**met in training** (whole blocks; the manifest knows how many documents each holds)",
        "vouched": "**the manifest's checksums are those of the bad bytes**",
        "before": "**there when `index` makes the manifest**: single documents are listed in it",
        "refused": "**the same**: a damaged archive is refused",
        "skip": "**the same with `--skip-damaged`**: the manifest lists the bytes that are left out",
    }
    last = ""
    for fault, outcome in outcomes:
        group = "refused" if outcome.refused else "skip" if fault.skip else fault.when
        if group != last:
            yield f"| {heads[group]} | | | | |"
            last = group
        cause = (
            outcome.refused or next(iter(outcome.causes), "none lost; `verify` and the start of a run tell of it")
        ).replace("|", "\\|")
        if outcome.refused:
            yield f"| {fault.name} | {DOCUMENTS} | - | - | {cause} |"
        else:
            lost = f"{outcome.listed} in the manifest" if outcome.listed else str(outcome.ledger)
            if outcome.damaged is not None:
                lost = f"unknown: {outcome.damaged} bytes in the manifest"
            yield f"| {fault.name} | {DOCUMENTS} | {outcome.delivered} | {lost} | {cause} |"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tokenizer = load(str(save_tokenizer(root / "tokenizer")))
        outcomes = [(fault, run_fault(fault, root / f"fault-{i}", tokenizer)) for i, fault in enumerate(FAULTS)]
    print("\n".join(table(outcomes)))


if __name__ == "__main__":
    main()
