"""Duplicate documents: which there are, and which one of each group stays.

Pass 1 gives each document one hash (exact) or several (near), and writes (hash, key, size) into the segment of the hash.
`group` finds the equal hashes of a segment. `merge` joins the pairs of all segments to clusters; of each cluster the
document with the lowest key stays. Keys and hashes are functions of the documents and the options alone, and so is the result.

Exact: equal SHA-256 of the text in Unicode's form NFC, each run of white space one space. The first 16 bytes are compared:
among 10^10 documents two different ones are taken for equal with a probability of 10^-19.

Near: MinHash (Broder, "On the resemblance and containment of documents", 1997) over the set of word n-grams, and LSH by
bands (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3): two documents are a pair if all the minima of
a band agree. Bands and rows are those that `datasketch` finds best for the threshold. Pairs are not compared again, as is
usual for corpora of text (Penedo et al., "The FineWeb Datasets", 2024).
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlm_dist.data.prepare_options import PrepareOptions
from mlm_dist.data.rng import keyed_philox
from mlm_dist.data.tables import require

# size: bytes of the document in the output, and the lowest bit says whether it is held out.
RECORD = np.dtype([("hash", "S16"), ("key", "S16"), ("size", "<u8")])
NODE = np.dtype([("key", "S16"), ("size", "<u8")])
EDGE = np.dtype([("low", NODE), ("high", NODE)])

# Han, kana and their like are written without spaces: each is a word, as in BERT's own tokenizer.
_HAN = "\u2e80-\u2fdf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(f"[{_HAN}]|[^\\W{_HAN}]+")
_ASCII_WORD = re.compile(r"\w+")  # the same in ASCII, twice as fast
_CHUNK = 4096  # n-grams at once: times 128 permutations they fit a cache
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MERGE_EDGES = 2 << 20


@dataclass(frozen=True)
class Bands:
    """How the minima of a document are grouped.

    Attributes:
        bands: Groups, each a hash of the document's.
        rows: Minima of a group.
    """

    bands: int
    rows: int


def choose_bands(options: PrepareOptions) -> Bands | None:
    """The bands for `--dedup near`, else None.

    Raises:
        UserError: The package is not installed.
    """
    if options.dedup != "near":
        return None
    datasketch = require("datasketch", "dedup", "--dedup near")
    found = datasketch.MinHashLSH(threshold=options.dedup_threshold, num_perm=options.dedup_permutations)
    return Bands(int(found.b), int(found.r))


def hasher(options: PrepareOptions, bands: Bands | None) -> Callable[[str], list[bytes]]:
    """The function that gives a document's hashes, 16 bytes each; without deduplication it gives none."""
    if options.dedup == "none":
        return lambda text: []
    if bands is None:
        return lambda text: [hashlib.sha256(normalize(text).encode()).digest()[:16]]
    return NearHasher(options.dedup_ngram, options.dedup_permutations, bands)


def normalize(text: str) -> str:
    """Text in which differences that `--dedup exact` does not see are gone."""
    return " ".join(unicodedata.normalize("NFC", text).split())


class NearHasher:
    """MinHash signatures cut into bands.

    Args:
        ngram: Words of an n-gram. A document of fewer words is one n-gram; one without words is its normalized text.
        permutations: Of `datasketch.MinHash`.
        bands: Bands and rows.
    """

    def __init__(self, ngram: int, permutations: int, bands: Bands) -> None:
        from datasketch import MinHash

        self._ngram = ngram
        self._bands = bands
        raw = keyed_philox("dedup", "permutations").random_raw(2 * permutations)
        table = (raw >> np.uint64(32)).astype(np.uint32).reshape(2, permutations)
        table[0] |= np.uint32(1)
        # The scheme is named since its numbers are to be the same in every release of the library.
        self._sketch = MinHash(permutations, permutations=table, scheme="affine32", hashfunc=int)

    def __call__(self, text: str) -> list[bytes]:
        """The document's hashes, one a band."""
        grams = ngram_hashes(text, self._ngram)
        self._sketch.clear()
        for start in range(0, len(grams), _CHUNK):
            self._sketch.update_batch(grams[start : start + _CHUNK].tolist())
        used = self._sketch.hashvalues[: self._bands.bands * self._bands.rows].astype("<u4")
        return [
            hashlib.blake2b(row.tobytes(), digest_size=16, person=b"band %d" % i).digest()
            for i, row in enumerate(used.reshape(self._bands.bands, self._bands.rows))
        ]


def ngram_hashes(text: str, ngram: int) -> np.ndarray:
    """uint64 [distinct n-grams], each below 2^32, ascending: hashes of the n-grams of words in lower case without punctuation."""
    words = (_ASCII_WORD if text.isascii() else _WORD).findall(unicodedata.normalize("NFC", text).lower())
    if len(words) < ngram:
        return np.array([zlib.crc32(" ".join(words or [normalize(text)]).encode())], np.uint64)
    each = np.fromiter(map(zlib.crc32, " ".join(words).encode().split(b" ")), np.uint64, len(words))
    count = len(words) - ngram + 1
    mixed = np.zeros(count, np.uint64)
    for k in range(ngram):
        mixed = (mixed + each[k : k + count]) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(32)
    return np.unique((mixed * _MULTIPLIER) >> np.uint64(32))


def bucket_of(key: bytes, buckets: int) -> int:
    """In which of `buckets` equal ranges of the 128-bit numbers a key (big-endian) lies."""
    return int.from_bytes(key[:8], "big") * buckets >> 64


def buckets_of(keys: np.ndarray, buckets: int) -> np.ndarray:
    """int64 [n]: `bucket_of` of S16 [n] keys."""
    high, _ = _halves(keys)
    low = (high & np.uint64(0xFFFFFFFF)) * np.uint64(buckets) >> np.uint64(32)
    return (((high >> np.uint64(32)) * np.uint64(buckets) + low) >> np.uint64(32)).astype(np.int64)


def _halves(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S16 [n] as the numbers that they are, uint64 [n] twice: sorting these is many times faster than sorting bytes."""
    words = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0].copy(), words[:, 1].copy()


def _order(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: an order in which S16 [n] keys ascend."""
    high, low = _halves(keys)
    order = np.argsort(high)
    high_sorted, low_sorted = high[order], low[order]
    if ((high_sorted[1:] == high_sorted[:-1]) & (low_sorted[1:] != low_sorted[:-1])).any():
        return np.lexsort((low, high))  # different keys with equal first halves: hardly ever
    return order


def records(hashes: Sequence[bytes], key: bytes, size: int, held_out: bool) -> Iterable[tuple[bytes, bytes]]:
    """(hash, record) of a document for each of its hashes."""
    tail = key + (size << 1 | held_out).to_bytes(8, "little")
    return ((one, one + tail) for one in hashes)


def group(data: bytes) -> np.ndarray:
    """Pairs of documents with an equal hash: in each group the one with the lowest key and another.

    Args:
        data: `RECORD`s.

    Returns:
        EDGE [pairs].
    """
    found = np.frombuffer(data, RECORD)
    found = found[_order(found["hash"])]
    again = found["hash"][1:] == found["hash"][:-1]
    ends = np.zeros(min(len(found), 1), bool)
    found = found[np.concatenate([ends, again]) | np.concatenate([again, ends])]  # those that are not alone
    found = found[np.lexsort((found["key"], found["hash"]))]
    first = np.concatenate([np.ones(min(len(found), 1), bool), found["hash"][1:] != found["hash"][:-1]])
    lowest = np.maximum.accumulate(np.where(first, np.arange(len(found)), 0))
    edges = np.zeros(int((~first).sum()), EDGE)
    for name, rows in (("low", lowest[~first]), ("high", np.flatnonzero(~first))):
        edges[name]["key"] = found["key"][rows]
        edges[name]["size"] = found["size"][rows]
    return edges


@dataclass(frozen=True)
class Removed:
    """The documents that do not stay.

    Attributes:
        nodes: NODE [removed], by ascending key.
        clusters: Groups of duplicates that they come from.
    """

    nodes: np.ndarray
    clusters: int


def merge(paths: Sequence[Path], *, exact: bool) -> Removed:
    """Join pairs to clusters (connected components) and give all documents but the lowest of each.

    Memory: about 250 bytes for each document that has a duplicate, and 0.5 GB.

    Args:
        paths: Files of EDGE arrays.
        exact: Whether each document has one hash, so that the pairs are clusters already.
    """
    if exact:
        edges = np.concatenate([np.zeros(0, EDGE), *(np.load(path) for path in paths)])
        nodes = edges["high"]
        return Removed(nodes[_order(nodes["key"])], len(_distinct(edges["low"])))
    nodes = np.zeros(0, NODE)

    def at_least() -> int:
        return max(_MERGE_EDGES, len(nodes))  # so that the work on all nodes for each batch pays

    for edges in _batches(paths, at_least):
        nodes = _distinct(np.concatenate([nodes, edges["low"], edges["high"]]))
    labels = np.arange(len(nodes))
    known = _halves(nodes["key"])
    for edges in _batches(paths, at_least):
        ends = [labels[_positions(known, _halves(edges[name]["key"]))] for name in ("low", "high")]
        labels = _components(len(nodes), *ends)[labels]
    # Nodes are in the order of their keys, so the first of each cluster is its lowest.
    lowest = np.unique(labels, return_index=True)[1]
    stays = np.zeros(len(nodes), bool)
    stays[lowest] = True
    return Removed(nodes[~stays], len(lowest))


def _distinct(nodes: np.ndarray) -> np.ndarray:
    """Each of the nodes once, by ascending key."""
    nodes = nodes[_order(nodes["key"])]
    keys = nodes["key"]
    return nodes[np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]])]


def _positions(known: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """int64 [n]: where each of the wanted keys is among known ones in ascending order, all of which hold it."""
    order = np.argsort(wanted[0])  # a search that ascends finds what it needs in the cache
    found = np.empty(len(order), np.int64)
    found[order] = np.searchsorted(known[0], wanted[0][order])
    while (later := known[1][found] != wanted[1]).any():  # keys with equal first halves
        found[later] += 1
    return found


def _batches(paths: Sequence[Path], least: Callable[[], int]) -> Iterable[np.ndarray]:
    """The files' arrays, joined to no fewer than `least()` edges."""
    waiting: list[np.ndarray] = []
    for path in paths:
        waiting.append(np.load(path))
        if sum(map(len, waiting)) >= least():
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int32 [count]: the connected component of each of `count` nodes under the edges (left[i], right[i])."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    apart = left != right
    graph = coo_array((np.ones(int(apart.sum()), np.int32), (left[apart], right[apart])), shape=(count, count))
    labels: Any = connected_components(graph, directed=False)[1]
    return labels


def keys_of_bucket(path: Path, bucket: int, buckets: int) -> frozenset[bytes]:
    """The keys of one bucket (see `bucket_of`) in a `.npy` file of keys, S16, in ascending order."""
    keys = np.load(path, mmap_mode="r")
    first, last = (-(-(b << 64) // buckets) for b in (bucket, bucket + 1))
    start = np.searchsorted(keys, first.to_bytes(8, "big"))
    end = np.searchsorted(keys, last.to_bytes(8, "big")) if last < 1 << 64 else len(keys)
    return frozenset(bytes(key).ljust(16, b"\0") for key in keys[start:end])
