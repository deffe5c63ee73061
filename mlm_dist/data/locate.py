"""The archives that a user names: files, directories, globs, URLs and commands, as paths below one root."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mlm_dist.data.archive import ARCHIVE_SUFFIXES, PIPE
from mlm_dist.data.shard import is_url
from mlm_dist.errors import UserError

_OTHER_SUFFIXES = (".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".zip")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_RANGE = 1_000_000


@dataclass(frozen=True)
class Archives:
    """Where the archives are.

    Attributes:
        root: The directory that the names are relative to, or its URL.
        names: Shard paths as a manifest lists them, sorted, each once.
    """

    root: Path | str
    names: list[str]


def find_archives(inputs: Sequence[str], output: Path, *, allow_pipe: bool = False) -> Archives:
    """The archives that the inputs name.

    Args:
        inputs: Files, directories (searched at any depth), globs, URLs (s3 and gs also prefixes and globs) and
            `pipe:COMMAND`; each may hold ranges, as `{000..146}`.
        output: The manifest to be written: local archives lie in or below its directory.
        allow_pipe: Whether commands may be named.

    Raises:
        UserError: An input that names nothing or no archive, files and URLs together, an archive outside the directory.
    """
    texts = [text for given in inputs for text in ([given] if os.path.exists(given) else _expand(given))]
    commands = [text for text in texts if text.startswith(PIPE)]
    urls = [text for text in texts if is_url(text)]
    paths = [text for text in texts if not text.startswith(PIPE) and not is_url(text)]
    if commands and not allow_pipe:
        raise UserError(
            f"{commands[0]!r:.200} is a command; --allow-pipe lets it run, here and (data.allow_pipe) in every training run"
        )
    if urls and paths:
        raise UserError(
            f"{paths[0]!r} is a file and {urls[0]!r} a URL; the archives of one manifest lie below one root: make two manifests"
        )
    if urls:
        root, names = _below_common_url([url for text in urls for url in _find_urls(text)])
        return Archives(root, sorted({*names, *commands}))
    directory = output.parent.resolve()
    local = {_name_below(path, directory) for path in _find_files(paths)}
    return Archives(directory, sorted({*local, *commands}))


def _expand(text: str) -> Iterator[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`, as in the shell and in webdataset."""
    match = None if text.startswith(PIPE) else _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last, width = int(match[1]), int(match[2]), len(match[1])
    if not 0 <= last - first < _MAX_RANGE:
        raise UserError(f"{text!r}: the range {match[0]} must go up, by less than {_MAX_RANGE}")
    for number in range(first, last + 1):
        yield from _expand(f"{text[: match.start()]}{number:0{width}d}{text[match.end() :]}")


def _find_files(texts: Sequence[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for text in texts:
        path = Path(text)
        if os.path.isdir(text):
            matches = _search(path)
        elif os.path.exists(text):
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not matches:
            raise UserError(
                f"{text!r} names no archive: give {', '.join(ARCHIVE_SUFFIXES)} files, directories that hold some, globs or URLs"
            )
        for match in matches:
            _check_suffix(str(match))
            if match.is_file():
                found[Path(os.path.abspath(match))] = None
    return list(found)


def _search(directory: Path) -> list[Path]:
    found = sorted(
        path for suffix in ARCHIVE_SUFFIXES for path in directory.rglob(f"*{suffix}") if not path.name.startswith(".")
    )
    stems: dict[str, Path] = {}
    for path in found:
        stem = str(path)[: -len(next(suffix for suffix in ARCHIVE_SUFFIXES if str(path).endswith(suffix)))]
        other = stems.setdefault(stem, path)
        if other != path:
            raise UserError(
                f"{other} and {path} look like one archive twice: remove one, or name the archives that you want"
            )
    return found


def _check_suffix(name: str) -> None:
    if name.lower().endswith(_OTHER_SUFFIXES):
        raise UserError(
            f"{name} is compressed in a way that is not read: decompress it, or pack it as .tar.gz or .tar.zst"
        )


def _name_below(path: Path, root: Path) -> str:
    # Not resolved: a link in the manifest's directory to an archive elsewhere is a fine way to lay out a corpus.
    for below in (path, path.parent.resolve() / path.name):
        if below.is_relative_to(root):
            return below.relative_to(root).as_posix()
    raise UserError(
        f"the archive {path} lies outside {root}, the manifest's directory: choose an --output in a directory above "
        "all archives, or link them into it"
    )


def _find_urls(text: str) -> list[str]:
    scheme, rest = text.split("://", 1)
    if re.search(r"[\s?#]", rest) and scheme in ("http", "https"):
        raise UserError(f"{text!r}: a URL of an archive has no query, fragment or blanks")
    _check_suffix(text)
    exact = text.lower().endswith(ARCHIVE_SUFFIXES) and not re.search(r"[*?\[]", rest)
    if exact:
        return [text]
    if scheme in ("http", "https"):
        raise UserError(
            f"{text!r} names no archive: http servers have no listings, so name each {', '.join(ARCHIVE_SUFFIXES)}; a range may do: shard-{{0000..0146}}.tar"
        )
    return _list_store(text, scheme, rest)


def _list_store(text: str, scheme: str, rest: str) -> list[str]:
    """The archives that a prefix or glob of an object store names."""
    from mlm_dist.storage.store import StoreError, list_objects

    pattern = rest if re.search(r"[*?\[]", rest) else f"{rest.rstrip('/')}/**"
    try:
        found = list_objects(f"{scheme}://{pattern}")
    except StoreError as error:
        raise UserError(f"{text!r} cannot be listed: {error}") from error
    found = [url for url in found if url.lower().endswith(ARCHIVE_SUFFIXES)]
    if not found:
        raise UserError(f"{text!r} names no archive: there is no {', '.join(ARCHIVE_SUFFIXES)} there")
    return found


def _below_common_url(urls: Sequence[str]) -> tuple[str, list[str]]:
    hosts = {urlsplit(url)[:2] for url in urls}
    if len(hosts) > 1:
        raise UserError(
            f"the archives lie on {len(hosts)} servers or buckets ({urls[0]}, ...): make a manifest for each"
        )
    directories = [url.rpartition("/")[0].split("/") for url in urls]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*directories, strict=False))
    root = "/".join(parts[0] for parts in shared)
    return root, [url[len(root) + 1 :] for url in urls]
