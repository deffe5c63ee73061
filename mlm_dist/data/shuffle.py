"""The passes of `mlm-dist prepare`: a shuffle that needs no common state, in bounded memory.

Every document gets a key, a hash of (seed, number of its source, place in it), and lies where its key says. So neither
the number of processes nor the order of anything enters.

1. read: documents go to spill files, into one segment for each range of keys ("bucket");
2. with deduplication: equal hashes are found in other segments, and joined (see `dedup`);
3. write: a shard is a run of buckets; each bucket is sorted by key and written (see `shards`).

Each is a set of tasks of a `Job`, so any number of processes can share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlm_dist.data.duplicates import remove_duplicates
from mlm_dist.data.job import Job
from mlm_dist.data.prepare_options import PrepareOptions, Side
from mlm_dist.data.reading import Corpus, ReadResult, Unit
from mlm_dist.data.shard import Shard, shard_from_json
from mlm_dist.data.shards import Spilled, plan_shards, write_shard
from mlm_dist.data.workers import WorkerPool
from mlm_dist.errors import UserError


@dataclass(frozen=True)
class Shuffled:
    """What was written.

    Attributes:
        shards: Of each side that has documents, in their order; their files lie in the job's directory.
        block_size: Bytes that blocks of a side have at most, if their members allow.
        read: What was read.
        removed: Duplicates, {documents, clusters}; None without deduplication.
    """

    shards: dict[Side, list[Shard]]
    block_size: dict[Side, int]
    read: ReadResult
    removed: dict[str, int] | None


def finish(corpus: Corpus, units: Sequence[Unit], job: Job, pool: WorkerPool) -> Shuffled:
    """The passes after reading, when all parts have read.

    Raises:
        UserError: No document on a side of the split.
    """
    read = ReadResult.empty(corpus.buckets)
    for unit in units:
        read.add(job.result(unit.name))
    _check_any(read, corpus)
    spilled = Spilled(job.directory, len(units), corpus.buckets, corpus.token_ids)
    removed = None
    if corpus.options.dedup != "none":
        spilled, removed = remove_duplicates(corpus, spilled, read, job, pool)
    _check_sides(read, corpus.options)
    tasks = {task.name: task for task in plan_shards(read.sizes, spilled, corpus.options)}
    weights = [int(read.sizes[t.side][t.buckets.start : t.buckets.stop].sum()) for t in tasks.values()]
    written = job.run(pool, write_shard, tasks, weights, "Writing")
    shards: dict[Side, list[Shard]] = {}
    for i, (task, content) in enumerate(zip(tasks.values(), written, strict=True)):
        shards.setdefault(task.side, []).append(shard_from_json(i, content))
    for side, found in shards.items():
        count = sum(int(shard.documents.sum()) for shard in found)
        assert count == read.documents[side], f"{read.documents[side]} documents became {count}"
    return Shuffled(shards, {task.side: task.block_size for task in tasks.values()}, read, removed)


def _check_any(read: ReadResult, corpus: Corpus) -> None:
    if not sum(read.documents.values()):
        causes = "".join(f"\n  {cause}" for cause in read.causes[:3])
        raise UserError(f"the {len(corpus.sources)} inputs hold no document that can be read{causes}")


def _check_sides(read: ReadResult, options: PrepareOptions) -> None:
    for side, count in read.documents.items():
        if not count and (side == "train" or options.val_fraction):
            raise UserError(
                f"--val-fraction {options.val_fraction} puts none of {sum(read.documents.values())} documents on the "
                f"{side} side: choose {'more' if side == 'val' else 'less'}, or split the text into more documents "
                "(--split-by paragraph)"
            )
