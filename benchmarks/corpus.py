"""The text of the data benchmark, once for all: as shards of ours, and as what the other libraries read. The documents are the same everywhere."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlm_dist.errors import UserError

# Debian's packages and where their prose lies. Their licences (GPL-2) allow all that is done here; nothing of them is kept in the repository.
PACKAGES = {"linux-doc": "**/_sources/**/*.rst.txt", "anarchism": "**/markdown/*.md.gz"}
SUFFIXES = (".txt", ".md", ".rst", ".txt.gz", ".md.gz", ".rst.gz")
# Files are cut into documents of about so many characters, the usual mean of web corpora.
DOCUMENT = 2300
SHARDS = 8
# `prepare` takes such blocks by itself for 256 MB of text and more; a corpus of a size that is quick to measure would get smaller ones.
BLOCK_SIZE = "256KiB"


@dataclass(frozen=True)
class Corpus:
    """One corpus in four forms under ``root``.

    Attributes:
        source: where the text is from, in words.
        documents, bytes: how much it is, in UTF-8.
    """

    root: Path
    source: str
    documents: int
    bytes: int

    @property
    def manifest(self) -> Path:
        """Shards of ours: tars of .jsonl members, several documents in each."""
        return self.root / "shards/manifest.json"

    @property
    def shards(self) -> list[str]:
        """The tars of the manifest."""
        return sorted(map(str, (self.root / "shards").glob("train-*.tar")))

    @property
    def val_manifest(self) -> Path:
        """Documents that are in none of the other forms, if ``make`` was asked for some."""
        return self.root / "shards/val.json"

    @property
    def single(self) -> list[str]:
        """Tars with one document a member (.txt)."""
        return sorted(map(str, (self.root / "single").glob("*.tar")))

    @property
    def jsonl(self) -> list[str]:
        """Plain .jsonl files."""
        return sorted(map(str, (self.root / "jsonl").glob("*.jsonl")))


def debian_text(work: Path) -> Path:
    """Directory with the text of PACKAGES, downloaded into ``work`` unless it is there. Raises UserError."""
    root = work / "debian"
    if not (root / "done").exists():
        root.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            try:
                depends = _run(["apt-cache", "depends", package], root)
                name = (re.findall(rf"Depends: ({package}-[\d.]+)$", depends, re.MULTILINE) or [package])[-1]
                _run(["apt-get", "download", name], root)
                (archive,) = root.glob(f"{name}_*.deb")
                _run(["dpkg", "-x", archive.name, package], root)
            except (OSError, subprocess.CalledProcessError, ValueError) as error:
                raise UserError(
                    f"--text: not given, and Debian's package {package} cannot be had ({_reason(error)}). Give a directory with text files: --text DIR"
                ) from error
        (root / "done").touch()
    return root


def _run(command: list[str], cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _reason(error: Exception) -> str:
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _files(text: Path | None, work: Path) -> tuple[list[Path], str]:
    if text is None:
        root = debian_text(work)
        files = [f for package, pattern in PACKAGES.items() for f in sorted((root / package).glob(pattern))]
        archives = ", ".join(sorted("_".join(deb.stem.split("_")[:2]) for deb in root.glob("*.deb")))
        return files, f"Debian packages {archives}"
    files = sorted(f for f in text.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
    return files, f"{text.name}/"


def _documents(file: Path) -> Iterator[str]:
    """The file's text, cut at empty lines into documents of about DOCUMENT characters."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    part: list[str] = []
    for paragraph in re.split(r"\n\s*\n", raw.decode(errors="replace")):
        part.append(paragraph)
        if sum(map(len, part)) >= DOCUMENT:
            yield "\n\n".join(part)
            part = []
    if any(paragraph.strip() for paragraph in part):
        yield "\n\n".join(part)


def make(
    text: Path | None,
    work: Path,
    limit: int | None,
    block_size: str | None = BLOCK_SIZE,
    val_fraction: float = 0.0,
) -> Corpus:
    """The corpus of ``text`` (None: Debian's packages), made in ``work`` unless it is there.

    Args:
        limit: about so many characters at most.
        block_size: of the shards; None: what ``prepare`` takes for a corpus of this size.
        val_fraction: share of the documents that is held out.

    Raises:
        UserError: there is no text.
    """
    files, source = _files(text, work)
    place = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:8] if text else "debian"
    kind = "" if (block_size, val_fraction) == (BLOCK_SIZE, 0.0) else f"-{block_size}-{val_fraction:g}"
    root = work / f"corpus-{place}-{limit or 'all'}{kind}"
    note = root / "corpus.json"
    if not note.exists():
        raw = root / "raw/documents.jsonl"
        raw.parent.mkdir(parents=True, exist_ok=True)
        characters = 0
        with raw.open("w") as out:
            for document in (document for file in files for document in _documents(file)):
                if limit is not None and characters > limit:
                    break
                characters += len(document)
                out.write(json.dumps({"text": document}) + "\n")
        if not characters:
            raise UserError(f"--text: {str(text)!r} holds no text; files {' '.join(SUFFIXES)} are read.")
        _prepare(raw, root / "shards", characters, block_size, val_fraction)
        count, size = _derive(root)
        note.write_text(json.dumps({"source": source, "documents": count, "bytes": size}))
    return Corpus(root, **json.loads(note.read_text()))


def _prepare(raw: Path, output: Path, characters: int, block_size: str | None, val_fraction: float) -> None:
    size = max(1, characters // SHARDS // 1024)
    command = [sys.executable, "-m", "mlm_dist.cli", "prepare", str(raw), "--output", str(output)]
    command += ["--val-fraction", str(val_fraction), "--shard-size", f"{size}KiB", "--overwrite"]
    if block_size is not None:
        command += ["--block-size", block_size]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _derive(root: Path) -> tuple[int, int]:
    """The training shards' documents, in their order, as single members and as plain .jsonl; (documents, bytes)."""
    count = size = 0
    for folder in ("single", "jsonl"):
        (root / folder).mkdir(exist_ok=True)
    for number, shard in enumerate(sorted((root / "shards").glob("train-*.tar"))):
        with (
            tarfile.open(shard) as source,
            (root / f"jsonl/{number:03d}.jsonl").open("wb") as lines,
            tarfile.open(root / f"single/{number:03d}.tar", "w") as single,
        ):
            for member in source:
                for line in source.extractfile(member).read().splitlines():
                    payload = json.loads(line)["text"].encode()
                    info = tarfile.TarInfo(f"{count:08d}.txt")
                    info.size = len(payload)
                    single.addfile(info, io.BytesIO(payload))
                    lines.write(line + b"\n")
                    count, size = count + 1, size + len(payload)
    return count, size


def token_lengths(corpus: Corpus, tokenizer: Path) -> list[int]:
    """Tokens of each document, without special ones."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    texts = [json.loads(line)["text"] for file in corpus.jsonl for line in Path(file).read_bytes().splitlines()]
    return [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
