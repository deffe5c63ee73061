"""Few, uneven, empty and giant: every layout ends, on any ranks and workers, with each document once an epoch."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.index import index
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.stream import Batch, Stream
from mlm_dist.data.tokenizer import TextTokenizer, choose_backend, load
from mlm_dist.storage.store import Store
from tests.corpora import WORDS, documents, save_tokenizer

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
EPOCHS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def corpus(root: Path, shards: list[list[str]], per_member: int = 3) -> Manifest:
    """Tars with ``per_member`` documents a .jsonl member, indexed; a shard may have no member."""
    for s, texts in enumerate(shards):
        with tarfile.open(root / f"{s:03d}.tar", "w") as tar:
            for m in range(0, len(texts), per_member):
                payload = "".join(json.dumps({"text": t}) + "\n" for t in texts[m : m + per_member]).encode()
                info = tarfile.TarInfo(f"{m:05d}.jsonl")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    return index([str(root)], root / "manifest.json", block_size=1024)


def epoch(manifest: Manifest, tokenizer: TextTokenizer, world: int, workers: int, seq_len: int) -> list[list[Batch]]:
    """What each rank gets, to the batch at which no rank has a live row."""
    maker = BlockMaker(
        manifest, Store(manifest.root), tokenizer, seq_len, "none", "chunk", MaskConfig(rate=1e-12), seed=1
    )
    out = []
    for rank in range(world):
        lanes = min(16, manifest.num_blocks)
        stream = Stream([maker], 16, 4, rank=rank, world_size=world, workers=workers, epochs=EPOCHS, lanes=lanes)
        mine = []
        for batch in stream.batches():
            if batch.index.size and not batch.live.any():
                break
            if not batch.index.size and batch.step > 400:
                break  # a rank without lanes has no end of its own
            mine.append(batch)
        out.append(mine)
    return out


def pieces(ranks: list[list[Batch]], tokenizer: TextTokenizer) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for batch in (batch for rank in ranks for batch in rank):
        rows = batch.rows.take(np.flatnonzero(batch.live))
        found.update(tuple(ids[1:-1].tolist()) for ids in np.split(rows.ids, np.cumsum(rows.lengths)[:-1]) if len(ids))
    return found


def wanted(texts: list[str], tokenizer: TextTokenizer, seq_len: int) -> Counter[tuple[int, ...]]:
    ids, offsets = tokenizer.encode(texts)
    out: Counter[tuple[int, ...]] = Counter()
    for document in np.split(ids, offsets[1:-1]):
        for start in range(0, len(document), seq_len - 2):
            out[tuple(document[start : start + seq_len - 2].tolist())] += EPOCHS
    return out


SHARDS: dict[str, list[list[str]]] = {
    "one shard": [documents(60, longest=20)],
    "seven uneven shards": [documents(n, seed=n, longest=20) for n in (1, 2, 3, 5, 8, 40, 90)],
    "an empty shard": [documents(20, longest=20), [], documents(20, seed=2, longest=20)],
    "one document": [["the of and to a"]],
    "empty documents": [["the of", "", "   ", "and to"], ["", ""]],
}


@pytest.mark.parametrize(
    ("name", "world", "workers"),
    [
        ("one shard", 8, 4),
        ("one shard", 1, 0),
        ("seven uneven shards", 4, 3),
        ("seven uneven shards", 1, 0),
        ("an empty shard", 2, 2),
        ("one document", 3, 2),
        ("one document", 1, 1),
        ("empty documents", 2, 1),
    ],
)
def test_each_document_once_an_epoch(
    tmp_path: Path, tokenizer: TextTokenizer, name: str, world: int, workers: int
) -> None:
    shards = SHARDS[name]
    manifest = corpus(tmp_path, shards)
    texts = [text for shard in shards for text in shard]
    assert manifest.num_documents == len(texts)
    found = pieces(epoch(manifest, tokenizer, world, workers, 64), tokenizer)
    assert found == wanted(texts, tokenizer, 64)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1)])
def test_a_document_of_ten_megabytes(tmp_path: Path, tokenizer: TextTokenizer, world: int, workers: int) -> None:
    tokenizer, _ = choose_backend(tokenizer, "nano", [])
    giant = " ".join(WORDS[i * i % 50] for i in range(2_900_000))
    assert len(giant) > 10_000_000
    texts = [giant, "the of and"]
    manifest = corpus(tmp_path, [texts], per_member=1)
    assert manifest.num_blocks == 2
    found = pieces(epoch(manifest, tokenizer, world, workers, 512), tokenizer)
    assert found == wanted(texts, tokenizer, 512)
