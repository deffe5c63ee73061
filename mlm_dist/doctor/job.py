"""What a host sees of the run that a config describes: shards, model, run directory. Facts only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlm_dist import checkpoint
from mlm_dist.config import Config
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.shard import Shard
from mlm_dist.errors import UserError
from mlm_dist.opening import fill_note, opening_lines
from mlm_dist.storage.cache import place_of
from mlm_dist.storage.store import Store
from mlm_dist.storage.tries import StoreError

# What a host reads of each corpus, at most: blocks of several shards until either is used up.
READ_BYTES, READ_S, QUICK_SHARE = 256 << 20, 10.0, 16
SAMPLE_SHARDS = 8
SHARED_S = 15.0  # network file systems may keep what they know of a directory for so long
SHOWN = 5
# fp32 weights and two fp32 moments (see mlm_dist.checkpoint); all optimizers here have two.
CHECKPOINT_BYTES = 12


def digest(config: Config) -> str:
    """The same on hosts that read the same config."""
    return hashlib.sha256(config.dump().encode()).hexdigest()[:12]


def shards(config: Config, host: int, hosts: int, quick: bool) -> dict[str, Any]:
    """Every corpus of the config, as host number ``host`` of ``hosts`` sees it: {key: facts}.

    Sizes of all shards of a local corpus are compared with the manifest; those of a remote one by the first host alone,
    since thousands that ask would be an attack. Of some shards, others on each host, blocks are read and their checksums
    compared. ``lost`` is the share of the documents that is known to be unreadable, ``allowed`` what may be.
    """
    data = config.data
    named = [
        (f"data.sources[{i}].manifest" if data.sources else "data.manifest", source.manifest)
        for i, source in enumerate(data.corpora())
    ]
    if data.val_manifest:
        named.append(("data.val_manifest", data.val_manifest))
    found = {}
    for key, path in named:
        manifest = Manifest.read(path)
        # Less patient than training, so that it ends; and without the cache, which it would fill.
        store = Store(
            manifest.root,
            retries=min(1, data.read_retries),
            timeout=min(READ_S, data.read_timeout),
            allow_pipe=data.allow_pipe,
        )
        asked = host == 0 or not store.remote
        problems = manifest.shard_problems(store) if asked else []
        lost = {problem.shard: problem.documents for problem in problems}
        read = _read(manifest, store, host, hosts, QUICK_SHARE if quick else 1, lost)
        found[key] = {
            "place": path.partition("?")[0] if "://" in path else path,  # without a signature
            "shards": len(manifest.shards),
            "bad": len(problems),
            "causes": [f"{problem.shard}: {problem.cause}" for problem in problems[:SHOWN]],
            "lost": (sum(lost.values()) + read.pop("lost")) / max(1, manifest.num_documents),
            "allowed": data.max_bad_fraction,
            **read,
        }
    return found


def _read(
    manifest: Manifest, store: Store, host: int, hosts: int, share: int, gone: Mapping[str, int]
) -> dict[str, Any]:
    """{bytes, seconds, failed: causes, lost: documents of failed blocks of shards that are not ``gone``} of reading a sample."""
    count, seconds, failed, lost = 0, 0.0, [], 0
    began = time.monotonic()
    for shard, i in _sample(manifest.shards, host, hosts):
        start = time.monotonic()
        try:
            data = store.read(shard.path, int(shard.offsets[i]), int(shard.lengths[i]), int(shard.crc32[i]))
        except StoreError as error:
            failed.append(f"{shard.path} at byte {shard.offsets[i]}: {error}")
            lost += 0 if shard.path in gone else int(shard.documents[i])
        else:
            count, seconds = count + len(data), seconds + time.monotonic() - start
        if count >= READ_BYTES // share or time.monotonic() - began > READ_S / share or len(failed) >= SHOWN:
            break
    return {"bytes": count, "seconds": seconds, "failed": failed, "lost": lost}


def _sample(shards: tuple[Shard, ...], host: int, hosts: int) -> Iterator[tuple[Shard, int]]:
    """Blocks of up to SAMPLE_SHARDS shards, spread over all, others on each host: first the middle one of each, then all in turn."""
    want = min(SAMPLE_SHARDS, len(shards))
    step = len(shards) / (want * hosts)
    chosen = [shards[int((j * hosts + host) * step)] for j in range(want)]
    chosen = [shard for shard in chosen if len(shard.offsets)]
    for shard in chosen:
        yield shard, len(shard.offsets) // 2
    for shard in chosen:
        for i in range(len(shard.offsets)):
            if i != len(shard.offsets) // 2:
                yield shard, i


def start(config: Config, world_size: int, quick: bool) -> dict[str, Any]:
    """Open what training opens before its first step: tokenizer, model and DeepSpeed template, held against each other.

    Unless ``quick``, weights that the run begins from are read too.

    Raises:
        UserError: as training would.
    """
    from mlm_dist.inputs import Inputs
    from mlm_dist.model import bert, families, from_run

    if config.data.cache_dir:
        _check_cache(config.data.cache_dir)
    # Without the cache, which would be made and filled.
    config = replace(config, data=replace(config.data, cache_dir=None))
    inputs = Inputs(config, world_size)
    section = config.model
    # A run that has a checkpoint begins from that.
    if section.init != "config" and not quick and not checkpoint.committed(config.run.path()):
        if section.init == "run":
            assert section.name_or_path is not None
            section = replace(section, name_or_path=str(from_run.newest(section.name_or_path, lambda _message: None)))
        bert.build(section, inputs.bert_config, seed=config.run.seed, new_tokens=inputs.new_tokens)
    parameters = sum(parameter.numel() for parameter in families.new(inputs.bert_config, meta=True).parameters())
    stream = inputs.stream(0, world_size)
    said = opening_lines(config, inputs, stream, 0, parameters=parameters)
    return {
        "parameters": parameters,
        "stage": inputs.ds_config["zero_optimization"]["stage"],
        "tokenizer": inputs.tokenizer.fingerprint[:12],
        "summary": said[0],
        "said": [line for line in said[1:] if not line.startswith("note: ")],
        "notes": [line.removeprefix("note: ") for line in said[1:] if line.startswith("note: ")],
        "fill": stream.fill(),
        "fill_note": fill_note(config, inputs, stream),
        "lanes": stream.order.lanes,
    }


def _check_cache(directory: str) -> None:
    """Refuse what mlm_dist.storage.cache would refuse, without making it."""
    place = place_of(directory)
    if not os.access(nearest(place), os.W_OK):
        raise UserError(
            f"data.cache_dir: {str(place)!r} cannot be written; give a directory of your own, or null for no cache."
        )


def probe(place: Path, token: str, written: list[Path]) -> Path:
    """Write a file that the other hosts look for, in the run directory or the nearest directory above it that is there.

    ``written`` gets its path before the file is made, for this may be ended at any moment.
    """
    folder = nearest(place)
    path = folder / f".doctor-probe-{token}"
    written.append(path)
    path.write_text(token)
    return path


def remove(paths: list[Path]) -> None:
    """Take away those that are there."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def nearest(place: Path) -> Path:
    """The directory, or the nearest above it that is there, absolute."""
    place = place.expanduser().absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())


def shared(path: Path, token: str) -> dict[str, Any]:
    """Whether this host sees the probe file, and after how many seconds; whether it may write beside it, and how far the clock that
    dates files is ahead of this host's, in seconds."""
    began = time.monotonic()
    seen = _holds(path, token)
    while not seen and time.monotonic() - began < SHARED_S:
        time.sleep(0.25)
        seen = _holds(path, token)
    after = time.monotonic() - began
    own = path.parent / f"{path.name}-{os.getpid()}-{os.urandom(3).hex()}"
    facts: dict[str, Any] = {"folder": str(path.parent), "seen": seen, "after": after}
    try:
        own.touch()
        ahead = own.stat().st_mtime - time.time()
        own.unlink()
    except OSError as error:
        return facts | {"unwritable": error.strerror}
    return facts | {"unwritable": None, "files_ahead": ahead}


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False


def room(place: Path, config: Config | None, parameters: int | None) -> dict[str, Any]:
    """Free bytes for a run's directory and, where the model is known, what its checkpoints will take.

    ``needed`` is what the kept checkpoints and the one being written take beyond those that are there; ``kept_for_good`` what
    ``checkpoint.keep_every`` adds in the course of the run.
    """
    facts: dict[str, Any] = {"folder": str(nearest(place)), "free": shutil.disk_usage(nearest(place)).free}
    if config is not None and parameters is not None:
        one = parameters * CHECKPOINT_BYTES
        have = len(checkpoint.committed(place))
        every, steps = config.checkpoint.keep_every, config.train.steps
        kept = config.checkpoint.keep + (config.checkpoint.keep_best if config.data.val_manifest else 0)
        facts |= {
            "checkpoint": one,
            "needed": max(1, kept + 1 - have) * one,
            "kept_for_good": one * (steps // every) if every and steps else 0,
        }
    return facts
