"""`mlm-dist prepare`: text to shuffled WebDataset shards, their manifests and a held-out part.

The output is a function of the documents, their places in the sorted list of inputs, and the options. Shards are made
in a hidden directory and renamed when all are whole; the manifests come last.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlm_dist import __version__
from mlm_dist.data.dedup import choose_bands
from mlm_dist.data.index import parse_size
from mlm_dist.data.job import Job, Share, open_job
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.prepare_options import PrepareOptions, Side
from mlm_dist.data.prepared import MANIFESTS, find_finished, make_manifests, publish, recipe_of
from mlm_dist.data.reading import Corpus, find_units, read_share
from mlm_dist.data.shuffle import finish
from mlm_dist.data.sources import BUILTINS, INPUTS_HELP, SPLITS, Source, add_dataset_arguments, find_sources, sources_of
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.data.workers import WorkerPool, default_workers
from mlm_dist.errors import UserError

_TEMPORARY = ".prepare-tmp"


@dataclass(frozen=True)
class Outcome:
    """What a process of `prepare` has to tell.

    Attributes:
        manifests: Of each side; empty if the data are not finished.
        written: False when a run with the same inputs and options had finished before.
        unread: The parts that have not read their shares.
    """

    manifests: dict[Side, Manifest] = field(default_factory=dict)
    written: bool = True
    unread: Sequence[int] = ()


def prepare(
    inputs: Sequence[str],
    output: Path,
    options: PrepareOptions,
    *,
    builtins: Sequence[str] = (),
    workers: int = 1,
    overwrite: bool = False,
) -> tuple[dict[Side, Manifest], bool]:
    """Write shards and manifests to a directory; what an interrupted run has done there is taken up.

    Args:
        inputs: Text files, parquet files, saved datasets, directories, globs.
        output: The directory.
        options: What to make of them.
        builtins: Texts that come with Python, names from `sources.BUILTINS`.
        workers: Processes.
        overwrite: Whether to replace what another run of this command made there.

    Returns:
        The manifests, and whether anything was written: False when a run with the same inputs and options had finished.

    Raises:
        UserError: Wrong inputs or options, no document on a side of the split, a directory that holds other data or
            that another process is working on.
    """
    sources = find_sources(inputs, builtins, options.split_by, field=options.field)
    outcome = prepare_part(sources, output, options, workers=workers, overwrite=overwrite)
    return outcome.manifests, outcome.written


def prepare_part(
    sources: Sequence[Source],
    output: Path,
    options: PrepareOptions,
    *,
    share: Share = Share(),  # noqa: B008
    wait: float = 0.0,
    workers: int = 1,
    overwrite: bool = False,
) -> Outcome:
    """Do one process' part of `prepare`: read its share, and write shards when all parts have read theirs.

    The output is the same bytes for any number of parts.

    Args:
        sources: The same in all parts.
        output: Directory, the same in all parts, on a file system that they share.
        options: The same in all parts.
        share: Which part this is.
        wait: Seconds to wait for other parts' reading.
        workers: Processes of this part.
        overwrite: Whether to replace what another run made there. With more parts than one, the finished data of this
            very run, and what other parts have done of it, stay.

    Raises:
        UserError: As `prepare`.
    """
    corpus = Corpus(sources, options, _load_tokenizer(options), choose_bands(options))
    recipe = recipe_of(corpus)
    before: dict[Side, Manifest] = {}

    def needless(interrupted: bool) -> bool:
        if not overwrite or share.count > 1:
            try:
                before.update(find_finished(output, recipe, sources, interrupted) or {})
            except UserError:
                if not overwrite:
                    raise
        return bool(before)

    root = output / _TEMPORARY
    try:
        if (output / MANIFESTS["train"]).exists() and not root.exists() and needless(False):
            return Outcome(before, written=False)  # and nothing is touched: the directory may be read-only
        with open_job(root, _describe(recipe, sources), share, overwrite=overwrite, needless=needless) as job:
            if job is None:
                return Outcome(before, written=False)
            try:
                return _do(job, corpus, output, recipe, wait, workers)
            except FileNotFoundError:
                # Another part may have finished meanwhile, and removed what this one was at.
                if job.exists() or not (done := find_finished(output, recipe, sources, True)):
                    raise
                job.sweep()
                return Outcome(done)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error


def _load_tokenizer(options: PrepareOptions) -> TextTokenizer | None:
    if options.tokenizer is None:
        return None
    try:
        return load(options.tokenizer)
    except UserError as error:
        raise UserError(str(error).replace("data.tokenizer", "--tokenizer")) from error


def _describe(recipe: dict[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """What makes a job this one. Inputs that were written to in between are other inputs, whatever their sizes."""
    times = [source.modified for source in sources]
    latest = datetime.fromtimestamp(max(times) / 1e9, UTC).isoformat(timespec="seconds")
    written = f"{latest} ({hashlib.sha256(json.dumps(times).encode()).hexdigest()[:8]})"
    return {**recipe, "version": __version__, "inputs last written": written}


def _do(job: Job, corpus: Corpus, output: Path, recipe: dict[str, Any], wait: float, workers: int) -> Outcome:
    try:
        with WorkerPool(workers) as pool:
            units = find_units(corpus, job)
            read_share(units, job, pool)
            job.mark_read()
            if unread := job.wait_for_readers(wait):
                return Outcome(unread=unread)
            made = finish(corpus, units, job, pool)
    except UserError:
        if job.share.count == 1:
            job.abandon()
        raise
    manifests = make_manifests(made, corpus, output, recipe)
    with job.closing():
        publish(manifests, output, job.directory)
    return Outcome(manifests)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = PrepareOptions()
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=INPUTS_HELP,
    )
    add("--output", type=Path, required=True, help="directory for shards, manifest.json and val.json")
    add("--builtin", action="append", default=[], choices=BUILTINS, help="text that every Python carries; no download")
    add(
        "--split-by",
        choices=SPLITS,
        default=default.split_by,
        help="what one document is (default: a file; .jsonl always has one document a line)",
    )
    add(
        "--field",
        default=default.field,
        help="field of .jsonl records, or column of tables, that is the text (default: %(default)s)",
    )
    add("--documents-per-member", type=int, default=default.documents_per_member, help="at most (default: %(default)s)")
    add(
        "--shard-size",
        type=parse_size,
        default=default.shard_size,
        metavar="SIZE",
        help="text of a shard, before compression, about (default: 256MiB)",
    )
    add("--block-size", type=parse_size, metavar="SIZE", help="bytes read at once (default: by corpus, 4KiB to 1MiB)")
    add(
        "--val-fraction",
        type=float,
        default=default.val_fraction,
        help="documents to hold out, chosen by hash of their text; 0 for none (default: %(default)s)",
    )
    add("--seed", type=int, default=default.seed, help="of the shuffle (default: %(default)s)")
    add("--compress", choices=("none", "zst"), default=default.compress, help="members (default: %(default)s)")
    add("--tokenizer", metavar="DIR", help="write token ids (.npy) of this tokenizer instead of text")
    _add_dedup(parser, default)
    add_dataset_arguments(parser)
    add("--workers", type=int, default=default_workers(), help="processes; changes nothing else (default: cores)")
    add(
        "--part",
        metavar="I/N",
        help="do one of N parts, each a process on any machine that shares the directory; the output is the same",
    )
    add(
        "--wait",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="with --part: wait so long for other parts to read (default: leave; the last one writes all shards)",
    )
    add("--overwrite", action="store_true", help="replace what this command made in the directory before")


def _add_dedup(parser: argparse.ArgumentParser, default: PrepareOptions) -> None:
    add = parser.add_argument
    add(
        "--dedup",
        choices=("none", "exact", "near"),
        default=default.dedup,
        help="leave out duplicates: equal texts, or also near ones by MinHash (extra `dedup`) (default: %(default)s)",
    )
    add(
        "--dedup-threshold",
        type=float,
        default=default.dedup_threshold,
        metavar="J",
        help="near: Jaccard similarity of word n-grams from which documents are likely taken for one (default: %(default)s)",
    )
    add("--dedup-ngram", type=int, default=default.dedup_ngram, help="near: words of an n-gram (default: %(default)s)")
    add(
        "--dedup-permutations",
        type=int,
        default=default.dedup_permutations,
        help="near: length of a MinHash signature (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    options = PrepareOptions(**{name: getattr(args, name) for name in PrepareOptions.__dataclass_fields__})
    share = Share.parse(args.part) if args.part else Share()
    if not 0 <= args.wait < 1e6:
        raise UserError(f"--wait is {args.wait}; it must be a number of minutes, 0 or more")
    sources = find_sources(**sources_of(args), split_by=options.split_by, field=options.field)
    outcome = prepare_part(
        sources,
        args.output,
        options,
        share=share,
        wait=args.wait * 60,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    _report(outcome, args.output, share)
    return 0


def _report(outcome: Outcome, output: Path, share: Share) -> None:
    if outcome.unread:
        parts = ", ".join(str(Share(i, share.count)) for i in outcome.unread)
        print(
            f"part {share} has read its share; the shards are written when all parts have. Still to read: {parts}. "
            "Start those with the same command (--part I/N); the last one to read writes all shards. "
            "With --wait MINUTES a part that has read stays and helps."
        )
        return
    if not outcome.written:
        print(f"{output} is already prepared with these inputs and options; nothing to do")
    for side, manifest in outcome.manifests.items():
        print(
            f"{output / MANIFESTS[side]}: {manifest.num_documents} documents, {len(manifest.shards)} shards, "
            f"{manifest.num_blocks} blocks, {manifest.num_bytes} bytes, fingerprint {manifest.fingerprint[:12]}"
        )
    info = outcome.manifests["train"].info
    if removed := info.get("duplicates_removed"):
        print(f"{removed['documents']} duplicates of {removed['clusters']} documents were left out")
    if info["lost_documents"]:
        causes = "".join(f"\n  {cause}" for cause in info["lost"])
        print(f"{info['lost_documents']} documents could not be read and were left out, first of all:{causes}")
