import hashlib
import itertools
import random
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_dist.data import dedup
from mlm_dist.data.dedup import EDGE, NODE, RECORD, Bands, NearHasher, hasher, ngram_hashes, normalize
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.prepare import prepare
from mlm_dist.data.prepare_options import PrepareOptions
from mlm_dist.errors import UserError
from tests.unit.test_prepare import documents, files

LINES: dict[str, Any] = {"split_by": "line", "shard_size": 20_000, "documents_per_member": 4}


def key_of(place: int, number: int = 0, seed: int = 0) -> bytes:
    return hashlib.blake2b(struct.pack("<QQQ", seed, number, place), digest_size=16, person=b"mlm_dist order").digest()


def prose(draw: random.Random, words: int) -> list[str]:
    return [f"word{draw.randrange(5000)}" for _ in range(words)]


def everything(output: Path) -> list[str]:
    return [text for name in ("manifest.json", "val.json") for text in documents(Manifest.read(output / name))]


def components(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Each node's cluster's lowest node."""
    lowest: dict[Any, Any] = {node: node for pair in pairs for node in pair}
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            low = min(lowest[a], lowest[b])
            changed |= lowest[a] != low or lowest[b] != low
            lowest[a] = lowest[b] = low
    return lowest


def test_exact_keeps_the_lowest_key_of_equal_texts(tmp_path: Path) -> None:
    """Equal but for white space and Unicode's form; case and punctuation count."""
    texts = [f"text {i}" for i in range(300)]
    lines = texts + [text.replace(" ", " \t ") for text in texts[:100]] + texts[50:60]
    lines += ["Text 7", "text 7.", "caf\u00e9", "cafe\u0301", "CAF\u00c9"]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    groups: dict[str, list[tuple[bytes, str]]] = {}
    place = 0
    for line in lines:
        groups.setdefault(normalize(line), []).append((key_of(place), line))
        place += len(line.encode()) + 1
    assert len(groups) == 304
    options = PrepareOptions(**LINES, val_fraction=0.2, dedup="exact")
    manifests, _ = prepare([str(tmp_path / "a.txt")], tmp_path / "out", options)
    assert Counter(everything(tmp_path / "out")) == Counter(min(group)[1] for group in groups.values())
    info = manifests["val"].info
    assert info["duplicates_removed"] == {"documents": len(lines) - 304, "clusters": 101}
    assert info["documents"] == {side: manifest.num_documents for side, manifest in manifests.items()}
    assert info["options"]["dedup"] == "exact" and "dedup_threshold" not in info["options"]


@pytest.fixture(scope="module")
def near_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 families of a text, some with variants of it at all distances."""
    draw = random.Random(5)
    lines = []
    for i in range(300):
        words = prose(draw, 60)
        for _ in range(i % 4):
            words = [word if draw.random() > 0.02 * (i % 5) else "changed" for word in words]
            lines.append(" ".join(words))
        lines.append(" ".join(words).upper() + "!")
    draw.shuffle(lines)
    path = tmp_path_factory.mktemp("near") / "a.txt"
    path.write_text("\n".join(lines))
    return path


def test_near_keeps_the_lowest_key_of_connected_documents(near_corpus: Path, tmp_path: Path) -> None:
    options = PrepareOptions(**LINES, val_fraction=0.2, dedup="near")
    manifests, _ = prepare([str(near_corpus)], tmp_path / "out", options)
    lines = near_corpus.read_text().split("\n")
    of = hasher(options, dedup.choose_bands(options))
    by_hash: dict[bytes, list[bytes]] = {}
    keys = {}
    place = 0
    for line in lines:
        keys[key_of(place)] = line
        for one in of(line):
            by_hash.setdefault(one, []).append(key_of(place))
        place += len(line) + 1
    lowest = components([pair for group in by_hash.values() for pair in itertools.pairwise(group)])
    expected = Counter(line for key, line in keys.items() if lowest.get(key, key) == key)
    assert Counter(everything(tmp_path / "out")) == expected
    assert 300 <= sum(expected.values()) < 0.7 * len(lines)
    removed = manifests["train"].info["duplicates_removed"]
    assert removed == {"documents": len(lines) - sum(expected.values()), "clusters": len(set(lowest.values()))}
    recorded = manifests["train"].info["options"]
    assert (recorded["dedup_threshold"], recorded["dedup_ngram"], recorded["dedup_permutations"]) == (0.7, 5, 128)
    assert recorded["dedup_bands"] == [14, 9]  # as FineWeb's 14 of 8, about


@pytest.mark.parametrize(("mode", "workers"), [("exact", 1), ("near", 2)])
def test_same_bytes_whatever_workers_and_input_order(
    near_corpus: Path, tmp_path: Path, mode: str, workers: int
) -> None:
    lines = near_corpus.read_text().split("\n")
    for k in range(3):
        (tmp_path / f"{k}.txt").write_text("\n".join(lines[k::3] + lines[:20]))
    inputs = [str(tmp_path / f"{k}.txt") for k in range(3)]
    options = PrepareOptions(**LINES, dedup=mode)  # type: ignore[arg-type]
    prepare(inputs, tmp_path / "one", options)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sources._PART_BYTES", "reading._MIN_UNIT_BYTES", "reading._MAX_UNIT_BYTES"):
            patch.setattr(f"mlm_dist.data.{name}", 60_000)
        patch.setattr("mlm_dist.data.duplicates._GROUP_BYTES", 150_000)
        prepare(inputs[::-1], tmp_path / "two", options, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_split_without_documents_after_removal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(["same text"] * 500 + ["other text"] * 500))
    with pytest.raises(UserError, match=r"puts none of \d+ documents on the (train|val) side"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", PrepareOptions(**LINES, val_fraction=1e-6, dedup="exact"))


def jaccard(a: list[str], b: list[str], ngram: int) -> float:
    sets = [{tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)} for words in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_a_band_agrees_as_often_as_minhash_says() -> None:
    """P(r minima agree) is the Jaccard similarity to the power of r."""
    draw = random.Random(3)
    bands = Bands(bands=32, rows=4)
    of = NearHasher(3, 128, bands)
    agreed, expected, variance = 0, 0.0, 0.0
    for _ in range(150):
        a = prose(draw, 300)
        b = [word if draw.random() > 0.03 else "changed" for word in a]
        p = jaccard(a, b, 3) ** bands.rows
        agreed += sum(x == y for x, y in zip(of(" ".join(a)), of(" ".join(b)), strict=True))
        expected += bands.bands * p
        variance += bands.bands * p * (1 - p)
    assert 1000 < expected < 4000
    # Minima of one table share its permutations, so the bands of a pair are not quite independent: 5 sigma and a bit.
    assert abs(agreed - expected) < 8 * variance**0.5


def test_hashes_stay_the_same_from_release_to_release() -> None:
    """Another number here means that a library has changed, and prepared data would not be made the same again."""
    near = hasher(PrepareOptions(dedup="near"), Bands(14, 9))(
        "The quick brown fox jumps over the lazy dog. 漢字 kana かな!"
    )
    assert len(near) == 14 and len(set(near)) == 14
    assert hashlib.sha256(b"".join(near)).hexdigest()[:16] == "b611dbdcc55901e1"
    exact = hasher(PrepareOptions(dedup="exact"), None)(" a \n b")
    assert exact == [hashlib.sha256(b"a b").digest()[:16]]


def test_what_makes_an_ngram() -> None:
    def count(text: str, ngram: int = 2) -> int:
        return len(ngram_hashes(text, ngram))

    assert np.array_equal(ngram_hashes("One, two: THREE", 2), ngram_hashes("one two three", 2)) and count("a b c") == 2
    assert count("a b a b a b") == 2  # a set
    assert count("one") == 1 and not np.array_equal(ngram_hashes("one", 2), ngram_hashes("two", 2))
    assert count("!?") == 1 and not np.array_equal(ngram_hashes("!?", 2), ngram_hashes("??", 2))
    assert count("漢字かな") == 3 and count("漢字 word") == 2 and count("한국어 단어") == 1
    assert np.array_equal(ngram_hashes("cafe\u0301 au lait", 2), ngram_hashes("caf\u00e9 au lait", 2))
    assert not np.array_equal(ngram_hashes("a b", 2), ngram_hashes("b a", 2))


def test_long_documents_take_little_memory() -> None:
    import tracemalloc

    of = NearHasher(5, 128, Bands(14, 9))
    text = " ".join(map(str, range(200_000)))  # 200,000 n-grams times 128 permutations are 100 MB
    tracemalloc.start()
    whole = of(text)
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_CHUNK", 777)
        assert of(text) == whole


keys = st.binary(min_size=16, max_size=16)


@settings(max_examples=100, deadline=None)
@given(
    found=st.lists(st.tuples(st.integers(0, 5), keys, st.integers(0, 99)), max_size=30, unique_by=lambda one: one[1])
)
def test_group_finds_all_pairs(found: list[tuple[int, bytes, int]]) -> None:
    hashes = [bytes([i] * 15) + b"\0" for i in range(6)]
    data = b"".join(hashes[i] + key + size.to_bytes(8, "little") for i, key, size in found)
    pairs = dedup.group(data)
    expected = set()
    for i in range(6):
        members = sorted((key, size) for j, key, size in found if j == i)
        expected |= {(*members[0], *other) for other in members[1:]}
    full = {(a.ljust(16, b"\0"), m, b.ljust(16, b"\0"), n) for (a, m), (b, n) in pairs.tolist()}
    assert full == expected and len(pairs) == len(expected) and RECORD.itemsize == 40


@settings(max_examples=100, deadline=None)
@given(
    ends=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60),
    at_once=st.integers(1, 60),
    files_=st.integers(1, 4),
)
def test_merge_gives_all_but_the_lowest_of_each_component(
    tmp_path_factory: pytest.TempPathFactory, ends: list[tuple[int, int]], at_once: int, files_: int
) -> None:
    draw = random.Random(1)
    nodes = sorted(draw.choice([b"the same", b"another "]) + draw.randbytes(8) for _ in range(41))
    pairs = [(nodes[min(a, b)], nodes[max(a, b)]) for a, b in ends if a != b]
    edges = np.array([((a, a[0]), (b, b[0])) for a, b in pairs], EDGE)
    directory = tmp_path_factory.mktemp("edges")
    paths = [directory / f"{i}.npy" for i in range(files_)]
    for i, path in enumerate(paths):
        np.save(path, edges[i::files_])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "_MERGE_EDGES", at_once)
        removed = dedup.merge(paths, exact=False)
    lowest = components(pairs)
    expected = sorted(node for node, low in lowest.items() if node != low)
    assert [bytes(key).ljust(16, b"\0") for key in removed.nodes["key"]] == expected
    assert removed.nodes["size"].tolist() == [key[0] for key in expected]
    assert removed.clusters == len(set(lowest.values()))


def test_buckets_of_keys(tmp_path: Path) -> None:
    draw = random.Random(2)
    for buckets in (1, 3, 16, 4096):
        found = [b"\0" * 16, b"\xff" * 16, *(draw.randbytes(15) + b"\0" for _ in range(2000))]
        for b in range(buckets):
            edge = -(-(b << 64) // buckets)
            found += [value.to_bytes(8, "big") + b"\0" * 8 for value in (edge, edge - 1) if value >= 0]
        found = sorted(set(found))
        array = np.array(found, "S16")
        numbers = dedup.buckets_of(array, buckets).tolist()
        assert numbers == [dedup.bucket_of(key, buckets) for key in found] and set(numbers) <= set(range(buckets))
        np.save(tmp_path / "keys.npy", array)
        for b in {0, buckets // 2, buckets - 1}:
            expected = {key for key, number in zip(found, numbers, strict=True) if number == b}
            assert dedup.keys_of_bucket(tmp_path / "keys.npy", b, buckets) == expected
    assert NODE.itemsize == 24


def test_options_out_of_range_and_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("threshold", 0.0),
        ("threshold", 1.0),
        ("ngram", 0),
        ("permutations", 4),
        ("permutations", 9999),
    ):
        with pytest.raises(UserError, match=f"--dedup-{name} is {value}; it must be"):
            PrepareOptions(**{f"dedup_{name}": value})
    (tmp_path / "a.txt").write_text("one\ntwo")
    monkeypatch.setitem(sys.modules, "datasketch", None)
    near = PrepareOptions(**LINES, val_fraction=0, dedup="near")
    with pytest.raises(UserError, match=r"--dedup near needs the package datasketch: pip install 'mlm-dist\[dedup\]'"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", near)
    assert not (tmp_path / "out").exists()
    exact = PrepareOptions(**LINES, val_fraction=0, dedup="exact")
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "out", exact)[1]
