"""The pass of `mlm-dist prepare` that takes out duplicates; `dedup` says what they are."""

import os
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlm_dist.data import dedup
from mlm_dist.data.job import Job
from mlm_dist.data.prepare_options import SIDES
from mlm_dist.data.reading import Corpus, ReadResult, segment
from mlm_dist.data.shards import Spilled
from mlm_dist.data.spill import read_segment
from mlm_dist.data.workers import WorkerPool

_GROUP_BYTES = 64 << 20  # of records that a task compares, about; one segment of them is in memory at a time


@dataclass(frozen=True)
class _GroupTask:
    spilled: Spilled
    buckets: range

    @property
    def name(self) -> str:
        return f"pairs-{self.buckets.start:04d}"

    @property
    def path(self) -> Path:
        return self.spilled.directory / f"{self.name}.npy"


@dataclass(frozen=True)
class _MergeTask:
    paths: tuple[Path, ...]
    exact: bool
    output: Path
    buckets: int


def remove_duplicates(
    corpus: Corpus, spilled: Spilled, read: ReadResult, job: Job, pool: WorkerPool
) -> tuple[Spilled, dict[str, int]]:
    """Find the duplicates and take them off what was read.

    Returns:
        What is to be written, and how many are not: {documents, clusters}.
    """
    records = sum(read.documents.values()) * (corpus.bands.bands if corpus.bands else 1)
    size = records * dedup.RECORD.itemsize
    step = max(corpus.buckets * _GROUP_BYTES // max(size, 1), 1)
    groups = [
        _GroupTask(spilled, range(start, min(start + step, corpus.buckets))) for start in range(0, corpus.buckets, step)
    ]
    tasks = {task.name: task for task in groups}
    job.run(pool, _group, tasks, [size // len(tasks)] * len(tasks), "Comparing")
    paths = tuple(task.path for task in groups)
    merge = _MergeTask(paths, corpus.bands is None, job.directory / "removed.npy", corpus.buckets)
    (found,) = job.run(pool, _merge, {"merge": merge}, [1], "Joining")
    for side in SIDES:
        read.documents[side] -= found["documents"][side]
        read.sizes[side] -= np.array(found["sizes"][side], np.int64)
    counts = {"documents": sum(found["documents"].values()), "clusters": found["clusters"]}
    return replace(spilled, removed=merge.output), counts


def _group(task: _GroupTask) -> dict[str, Any]:
    spilled = task.spilled
    segments = (segment("hash", bucket, spilled.buckets) for bucket in task.buckets)
    pairs = [dedup.group(read_segment(spilled.paths, one)) for one in segments]
    _save(task.path, np.concatenate(pairs))
    return {}


def _merge(task: _MergeTask) -> dict[str, Any]:
    removed = dedup.merge(task.paths, exact=task.exact)
    keys, sizes = removed.nodes["key"], removed.nodes["size"]
    _save(task.output, np.ascontiguousarray(keys))
    buckets = dedup.buckets_of(keys, task.buckets)
    result = ReadResult.empty(task.buckets)
    for held_out, side in enumerate(SIDES):
        ours = (sizes & np.uint64(1)) == held_out
        result.documents[side] = int(ours.sum())
        np.add.at(result.sizes[side], buckets[ours], (sizes[ours] >> np.uint64(1)).astype(np.int64))
    return {**result.to_json(), "clusters": removed.clusters}


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
