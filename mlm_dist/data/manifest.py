"""What the training data is: shards, their blocks, and a fingerprint over all of it."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlm_dist.data.archive import PIPE
from mlm_dist.data.losses import Losses
from mlm_dist.data.members import TokenIds
from mlm_dist.data.shard import Shard, is_url, json_field, shard_from_json
from mlm_dist.errors import UserError
from mlm_dist.files import write_atomically
from mlm_dist.storage.store import Store, StoreError, read_object

FORMAT = "mlm_dist.manifest"
VERSION = 1
SCHEMES = ("http", "https", "s3", "gs")
_FILE = "file://"
_MAX_SHOWN = 50


class Manifest:
    """The shards of one data set, in their order.

    Attributes:
        root: Directory that the shards' paths are relative to, or the URL of one.
        shards: The shards.
        info: How the data were made, for people; the fingerprint does not cover it.
        token_ids: What the ids of `.npy` members mean; None when the data set has none (such members are not read then).
        losses: What could not be read when the manifest was made; the fingerprint does not cover it.

    Raises:
        UserError: No shards, no block in any, a path that is there twice, or a root that is another kind of URL.
    """

    def __init__(
        self,
        root: Path | str,
        shards: Iterable[Shard],
        info: dict[str, Any],
        *,
        token_ids: TokenIds | None = None,
        losses: Losses | None = None,
    ) -> None:
        if isinstance(root, str):
            _check_url(root)
        self.root = root
        self.shards = tuple(shards)
        self.info = info
        self.token_ids = token_ids
        self.losses = losses or Losses()
        if not self.shards:
            raise UserError("no shards: a manifest needs at least one")
        if not self.num_blocks:
            raise UserError(f"none of the {len(self.shards)} shards has a block")
        seen: set[str] = set()
        for shard in self.shards:
            if shard.path in seen:
                raise UserError(f"the shard {shard.path!r} is there twice")
            seen.add(shard.path)

    @property
    def num_blocks(self) -> int:
        """Blocks of all shards."""
        return sum(len(shard.offsets) for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(int(shard.lengths.sum()) for shard in self.shards)

    @property
    def num_documents(self) -> int:
        """Documents of all blocks."""
        return sum(int(shard.documents.sum()) for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' paths, sizes, checksums and blocks, and `token_ids`; what else there is does not enter."""
        digest = hashlib.sha256(f"{FORMAT} {VERSION} {len(self.shards)}\n".encode())
        for shard in self.shards:
            digest.update(json.dumps([shard.path, shard.size, shard.sha256, len(shard.offsets)]).encode() + b"\n")
            for column in (shard.offsets, shard.lengths, shard.documents, shard.crc32):
                digest.update(column.astype("<i8").tobytes())
        if self.token_ids is not None:
            digest.update(json.dumps(_ids_to_json(self.token_ids), sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that made the token ids of `.npy` members; None without such members."""
        return self.token_ids.fingerprint if self.token_ids else None

    @property
    def known_losses(self) -> list[dict[str, Any]]:
        """Blocks in which documents were unreadable when the manifest was made: {shard, offset, documents, cause}; at most the first 1000 (see `losses`)."""
        return self.losses.listed

    @property
    def text_field(self) -> str | None:
        """The field of JSON members that was counted as text, where ``index`` made the manifest; else None."""
        options = self.info.get("options")
        field = (
            options.get("field") if self.info.get("tool") == "mlm-dist index" and isinstance(options, dict) else None
        )
        return field if isinstance(field, str) else None

    def shard_path(self, i: int) -> Path:
        """Where shard `i` of a local data set lies."""
        assert isinstance(self.root, Path) and not self.shards[i].path.startswith(PIPE)
        return self.root / self.shards[i].path

    def where(self, shard: Shard) -> str:
        """Where a shard lies, in words: a path, a URL or a command."""
        return shard.path if shard.path.startswith(PIPE) else f"{str(self.root).partition('?')[0]}/{shard.path}"

    def shard_problems(self, store: Store | None = None) -> list["ShardProblem"]:
        """The shards that are gone or of another size than the manifest says, without reading them. Commands are not run.

        Args:
            store: Where to look; a plain one over `root` if not given.
        """
        shards = [shard for shard in self.shards if not shard.path.startswith(PIPE)]
        sizes = (store or Store(self.root)).sizes([shard.path for shard in shards])
        found = []
        for shard, size in zip(shards, sizes, strict=True):
            if size != shard.size:
                cause = size if isinstance(size, str) else f"has {size} bytes; the manifest says {shard.size}"
                found.append(ShardProblem(shard.path, int(shard.documents.sum()), cause))
        return found

    def check_files(self, max_bad_fraction: float = 0.0, store: Store | None = None) -> list["ShardProblem"]:
        """`shard_problems`, which may hold at most this share of the documents.

        Raises:
            UserError: They hold more, or the share is 0 and there are any; lists them.
        """
        problems = self.shard_problems(store)
        lost = sum(problem.documents for problem in problems)
        if problems and (not max_bad_fraction or lost > max_bad_fraction * self.num_documents):
            root = str(self.root).partition("?")[0]
            lines = [f"\n  shard {root}/{problem.shard}: {problem.cause}" for problem in problems[:_MAX_SHOWN]]
            lines += [f"\n  and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
            raise UserError(
                f"{len(problems)} of {len(self.shards)} shards, with {lost} of {self.num_documents} documents, cannot be read or are not those of the manifest"
                + (f" (a share of {max_bad_fraction} may be lost)" if max_bad_fraction else "")
                + ":"
                + "".join(lines)
            )
        return problems

    @classmethod
    def read(cls, path: str | Path) -> "Manifest":
        """Read and check a manifest, a file or at a URL.

        Raises:
            UserError: A missing or unreadable file, one that is no manifest, any field that is wrong, or a fingerprint
                that does not belong to the shards.
        """
        content, root = _load(path)
        path = str(path).partition("?")[0] if isinstance(root, str) else path
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:  # RecursionError: a million brackets
            raise UserError(f"manifest {path} is not JSON: {error}") from error
        try:
            return cls._from_json(root, parsed)
        except UserError as error:
            raise UserError(f"manifest {path}: {error}") from error

    @classmethod
    def _from_json(cls, root: Path | str, content: Any) -> "Manifest":
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"format is {found!r:.80}; it must be {FORMAT!r}")
        if content.get("version") != VERSION:
            raise UserError(f"version is {content.get('version')!r:.80}; this program reads version {VERSION}")
        shards = json_field(content, "shards", list)
        stated_root = json_field(content, "root", str) if "root" in content else None
        if stated_root is not None and "?" in stated_root:
            raise UserError(f"root is {stated_root!r:.200}; it must not have a query")
        if isinstance(root, str) and stated_root is not None and _server(stated_root) != _server(root):
            raise UserError(
                f"root is {stated_root!r:.200}, on another server than the manifest, which would get the requests and headers meant for "
                "this one; if it is right, keep a copy of the manifest here and name that"
            )
        manifest = cls(
            root if stated_root is None else stated_root,
            [shard_from_json(i, shard) for i, shard in enumerate(shards)],
            json_field(content, "info", dict),
            token_ids=_ids_from_json(json_field(content, "tokenizer", dict)) if "tokenizer" in content else None,
            losses=Losses.from_json(content["losses"]) if "losses" in content else None,
        )
        stated = json_field(content, "fingerprint", str)
        if stated != manifest.fingerprint:
            raise UserError(
                f"fingerprint is {stated:.80}, but the shards listed give {manifest.fingerprint}: the file was changed by "
                "hand or damaged; make it again"
            )
        return manifest

    def write(self, path: str | Path) -> None:
        """Write the file whole or not at all: a temporary file beside it, fsync, rename."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            **({"root": self.root.partition("?")[0]} if isinstance(self.root, str) else {}),
            **({"tokenizer": _ids_to_json(self.token_ids)} if self.token_ids else {}),
            "info": self.info,
            **({"losses": self.losses.to_json()} if self.losses != Losses() else {}),
            "shards": [
                {
                    "path": shard.path,
                    "size": shard.size,
                    "sha256": shard.sha256,
                    "blocks": {
                        "offset": shard.offsets.tolist(),
                        "length": shard.lengths.tolist(),
                        "documents": shard.documents.tolist(),
                        "crc32": shard.crc32.tolist(),
                    },
                }
                for shard in self.shards
            ],
        }
        write_atomically(Path(path), json.dumps(content, separators=(",", ":")).encode() + b"\n")


@dataclass(frozen=True)
class ShardProblem:
    """A shard that cannot be read as its manifest says.

    Attributes:
        shard: Its path in the manifest.
        documents: How many it holds, by the manifest.
        cause: What is wrong, one line.
    """

    shard: str
    documents: int
    cause: str


def _load(path: str | Path) -> tuple[bytes, Path | str]:
    """(the bytes, the directory or its URL) of a manifest."""
    if isinstance(path, str) and is_url(path) and not path.startswith(_FILE):
        where, mark, query = path.partition("?")
        root = f"{where.rpartition('/')[0]}{mark}{query}"  # which the shards may need, too
        try:
            _check_url(root)
            return read_object(path), root
        except (StoreError, UserError) as error:
            raise UserError(f"manifest {where}: {error}") from error
    path = Path(str(path).removeprefix(_FILE))
    try:
        return path.read_bytes(), path.parent
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"manifest {path}: {cause}; make one by `mlm-dist prepare` or `index`") from error


def _server(url: str) -> tuple[str, str]:
    """Scheme and host, with port, of a URL."""
    scheme, _, rest = url.partition("://")
    return scheme.lower(), re.split(r"[/?]", rest)[0].rpartition("@")[2].lower()


def _check_url(root: str) -> None:
    scheme, _, rest = root.partition("://")
    where = rest.partition("?")[0] if scheme in ("http", "https") else rest
    if scheme not in SCHEMES or not where.strip("/") or re.search(r"[\s\0#]", rest) or "?" in where:
        raise UserError(
            f"root is {root!r:.200}; it must be the URL of a directory, of one of {', '.join(f'{s}://' for s in SCHEMES)}"
        )


def _ids_to_json(ids: TokenIds) -> dict[str, Any]:
    return {
        "fingerprint": ids.fingerprint,
        "vocab_size": ids.vocab_size,
        "sep_id": ids.sep_id,
        "banned": list(ids.banned),
    }


def _ids_from_json(content: dict[str, Any]) -> TokenIds:
    try:
        size = json_field(content, "vocab_size", int)
        if not 0 < size <= 1 << 31:
            raise UserError(f"vocab_size is {size}; it must be from 1 to {1 << 31}")
        special = [json_field(content, "sep_id", int), *json_field(content, "banned", list)]
        for value in special:
            if type(value) is not int or not 0 <= value < size:
                raise UserError(f"the special id {value!r:.80} is no number below vocab_size {size}")
        return TokenIds(json_field(content, "fingerprint", str), size, special[0], tuple(special[1:]))
    except UserError as error:
        raise UserError(f"tokenizer: {error}") from error
