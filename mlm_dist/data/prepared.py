"""The finished output of `mlm-dist prepare`: what describes it, how it is put in place and known again."""

import json
import os
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlm_dist import __version__
from mlm_dist.data.job import difference
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.prepare_options import Side
from mlm_dist.data.reading import Corpus
from mlm_dist.data.shuffle import Shuffled
from mlm_dist.data.sources import Source, digest
from mlm_dist.errors import UserError
from mlm_dist.files import sync_directory

MANIFESTS: dict[Side, str] = {"train": "manifest.json", "val": "val.json"}


def recipe_of(corpus: Corpus) -> dict[str, Any]:
    """What the manifests record of the inputs and options, so that a second run knows its own output."""
    sources = corpus.sources
    options = corpus.options.recorded()
    if corpus.tokenizer:
        options["tokenizer"] = corpus.tokenizer.fingerprint
    if corpus.bands:
        options["dedup_bands"] = [corpus.bands.bands, corpus.bands.rows]
    return {
        "options": options,
        "sources": {
            "files": sum(source.kind != "builtin" for source in sources),
            "builtin": [source.label for source in sources if source.kind == "builtin"],
            "bytes": sum(source.size for source in sources),
            "digest": digest(sources),
        },
    }


def find_finished(
    output: Path, recipe: dict[str, Any], sources: Sequence[Source], interrupted: bool
) -> dict[Side, Manifest] | None:
    """The manifests of a finished run of the same recipe, or None when nothing is there.

    Args:
        output: The directory.
        recipe: The recipe.
        sources: The sources.
        interrupted: Whether a run was cut off, so that shards without a manifest may be its own.

    Raises:
        UserError: Something else is there.
    """
    again = "give another directory, or --overwrite to replace it"
    main = output / MANIFESTS["train"]
    if not main.exists():
        strangers = [path.name for path in output.iterdir() if _is_ours(path.name)]
        if strangers and not interrupted:
            raise UserError(f"--output {output} holds {min(strangers)} without a manifest; {again}")
        return None
    try:
        manifests = {side: Manifest.read(output / name) for side, name in _manifests_of(recipe)}
        for manifest in manifests.values():
            manifest.check_files()
    except UserError as error:
        raise UserError(f"--output {output} holds something that is not whole ({error}); {again}") from error
    for key, wanted in recipe.items():
        found = manifests["train"].info.get(key)
        if found != wanted:
            raise UserError(f"--output {output} was made with other {key}: {difference(found, wanted)}; {again}")
    made = main.stat().st_mtime_ns
    for source in sources:
        if source.modified > made:
            raise UserError(f"--output {output} is older than the input {source.name}; {again}")
    return manifests


def _manifests_of(recipe: dict[str, Any]) -> list[tuple[Side, str]]:
    sides: list[Side] = ["train", "val"] if recipe["options"]["val_fraction"] else ["train"]
    return [(side, MANIFESTS[side]) for side in sides]


def _is_ours(name: str) -> bool:
    return re.fullmatch(r"(train|val)-\d{5,}\.tar", name) is not None


def make_manifests(made: Shuffled, corpus: Corpus, output: Path, recipe: dict[str, Any]) -> dict[Side, Manifest]:
    """The manifests of what was written."""
    manifests: dict[Side, Manifest] = {}
    for side, shards in made.shards.items():
        info = {
            "tool": "mlm-dist prepare",
            "version": __version__,
            "side": side,
            **recipe,
            "block_size": made.block_size[side],
            "documents": made.read.documents,
            "lost_documents": made.read.lost,
            "lost": made.read.causes,
            **({"duplicates_removed": made.removed} if made.removed else {}),
        }
        manifests[side] = Manifest(output, shards, info, token_ids=corpus.token_ids)
    return manifests


def publish(manifests: dict[Side, Manifest], output: Path, directory: Path) -> None:
    """Put the shards and then the manifests in place. A manifest is never there beside shards of another run.

    It can be cut off anywhere and begun again, since nothing is removed that a publication of the same data has put there.
    """
    for side, name in MANIFESTS.items():
        if (output / name).exists() and not _is_there(output / name, manifests.get(side)):
            (output / name).unlink(missing_ok=True)
    ours = {shard.path for manifest in manifests.values() for shard in manifest.shards}
    for path in list(output.iterdir()):
        if _is_ours(path.name) and path.name not in ours:
            path.unlink(missing_ok=True)
    for name in sorted(ours):
        if (directory / name).exists():  # else it was moved before the cut
            with suppress(FileNotFoundError):  # or right now, by a part that no lock keeps out
                os.replace(directory / name, output / name)
    for manifest in manifests.values():
        manifest.check_files()
    for side in reversed(manifests):  # the main one last: it says that the run has finished
        if not _is_there(output / MANIFESTS[side], manifests[side]):
            temporary = directory / uuid.uuid4().hex
            manifests[side].write(temporary)
            sync_directory(output)
            os.replace(temporary, output / MANIFESTS[side])
    sync_directory(output)


def _is_there(path: Path, manifest: Manifest | None) -> bool:
    """Whether the file is this manifest."""
    if manifest is None or not path.exists():
        return False
    try:
        found = Manifest.read(path)
    except UserError:
        return False
    # As JSON has it: a tuple that was written is read as a list.
    return found.fingerprint == manifest.fingerprint and found.info == json.loads(json.dumps(manifest.info))
