"""Validation: the same number whatever the ranks, over every document of the set once."""

import math
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.stream import DataConfig, Stream, open_stream
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.errors import UserError
from mlm_dist.evaluate import EvalConfig, validate
from mlm_dist.storage.store import Store
from tests.corpora import documents, save_corpus, save_tokenizer

TEXTS = documents(150)
Micro = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.read(save_corpus(tmp_path_factory.mktemp("corpus"), TEXTS))


class Group:
    """Control groups of ranks that are threads of this process."""

    def __init__(self, world: int):
        self.world, self.gate, self.slots = world, threading.Barrier(world, timeout=60), [None] * world

    def member(self, rank: int) -> "Member":
        return Member(self, rank)


class Member:
    def __init__(self, group: Group, rank: int):
        self.group, self.rank = group, rank

    def _all(self, value: Any) -> list[Any]:
        self.group.slots[self.rank] = value
        self.group.gate.wait()
        out = list(self.group.slots)
        self.group.gate.wait()
        return out

    def sum(self, values: list[int]) -> list[int]:
        return [sum(column) for column in zip(*self._all(values), strict=True)]

    def gather(self, obj: Any) -> list[Any] | None:
        out = self._all(obj)
        return out if self.rank == 0 else None


class Model:
    """Stands for the model: a loss of each labelled place that depends on all that the model would see there."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows: list[tuple[list[int], list[int]]] = []

    def __call__(self, micro: Micro) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls += 1
        seen = micro["input_ids"].flatten()[micro["selected"]].double()
        place = micro["position_ids"].flatten()[micro["selected"]].double()
        labels = micro["labels"]
        loss = (seen * 0.37 + place * 0.013 + labels.double() * 1.1).sin() + 2.0
        truth = micro["input_ids"].flatten().clone()
        truth[micro["selected"]] = labels
        for ids, segments in zip(truth.view_as(micro["input_ids"]), micro["segment_ids"], strict=True):
            self.rows.append((ids.tolist(), segments.tolist()))
        return loss.sum(), (labels % 3 == 0).sum()


def open_val(manifest: Manifest, tokenizer: TextTokenizer, rank: int, world: int, batch: int, **data: Any) -> Stream:
    config = DataConfig(seq_len=32, workers=0, **data)
    maker = BlockMaker(
        manifest,
        Store(manifest.root),
        tokenizer,
        seq_len=32,
        packing=config.packing,
        long_documents=config.long_documents,
        mask=MaskConfig(),
        seed=1234,
        shuffle=False,
    )
    return open_stream(
        config,
        [maker],
        global_batch=batch,
        micro_batch=5,
        rank=rank,
        world_size=world,
        epochs=1,
        validation=True,
    )


def measure(
    manifest: Manifest, tokenizer: TextTokenizer, world: int, batch: int = 16, **data: Any
) -> tuple[list[dict[str, float]], list[Model]]:
    """What every rank got, and its model."""
    group, models = Group(world), [Model() for _ in range(world)]
    results: list[dict[str, float]] = [{} for _ in range(world)]

    def rank(r: int) -> None:
        results[r] = validate(open_val(manifest, tokenizer, r, world, batch, **data), models[r], group.member(r))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, models


@pytest.mark.parametrize("packing", ["none", "split", "best_fit"])
def test_the_same_on_any_number_of_ranks(manifest: Manifest, tokenizer: TextTokenizer, packing: str) -> None:
    ((alone,), _) = measure(manifest, tokenizer, 1, packing=packing)
    for world in (2, 3, 7):
        results, models = measure(manifest, tokenizer, world, packing=packing)
        assert results[0] == pytest.approx(alone, rel=1e-12)
        assert results[1:] == [{}] * (world - 1)
        assert len({m.calls for m in models}) == 1  # the model's collectives would hang otherwise
    assert alone["lost_documents"] == 0 and alone["selected"] > 500
    assert alone["perplexity"] == pytest.approx(math.exp(alone["loss"]))


@pytest.mark.parametrize("batch", [1, 5, 64, 1000])
def test_the_batch_changes_memory_not_the_result(manifest: Manifest, tokenizer: TextTokenizer, batch: int) -> None:
    ((reference,), _) = measure(manifest, tokenizer, 1)
    ((other,), _) = measure(manifest, tokenizer, 1, batch=batch)
    assert other == pytest.approx(reference, rel=1e-12)


def test_the_same_each_time(manifest: Manifest, tokenizer: TextTokenizer) -> None:
    stream = open_val(manifest, tokenizer, 0, 1, 16)
    first, second = (validate(stream, Model(), Group(1).member(0)) for _ in range(2))
    assert first == second


def test_accuracy_is_what_the_model_got_right(manifest: Manifest, tokenizer: TextTokenizer) -> None:
    ((result,), _) = measure(manifest, tokenizer, 1)
    maker = open_val(manifest, tokenizer, 0, 1, 16).makers[0]
    labels = np.concatenate(
        [maker.rows(b, 0, lambda rows: np.zeros(rows, np.int64))[0].labels for b in range(manifest.num_blocks)]
    )
    assert result["selected"] == len(labels)
    assert result["accuracy"] == pytest.approx((labels % 3 == 0).mean())


@pytest.mark.parametrize("world", [1, 3])
def test_every_document_once(manifest: Manifest, tokenizer: TextTokenizer, world: int) -> None:
    _, models = measure(manifest, tokenizer, world, packing="best_fit", long_documents="truncate")
    got: Counter[tuple[int, ...]] = Counter()
    for ids, segments in (row for m in models for row in m.rows):
        for number in range(1, max(segments) + 1):
            content = tuple(i for i, s in zip(ids, segments, strict=True) if s == number)[1:-1]
            if content:  # a row that only fills up has none
                got[content] += 1
    content, offsets = tokenizer.encode(TEXTS)
    assert got == Counter(tuple(content[a:b][:30].tolist()) for a, b in pairwise(offsets))


@pytest.mark.parametrize("world", [1, 3])
def test_unigram_entropy_of_a_known_corpus(tmp_path: Path, tokenizer: TextTokenizer, world: int) -> None:
    # Over the ordinary tokens: the 60%, of 30%, and 10%. Words out of the vocabulary are no ordinary tokens.
    texts = ["the the of zebra", "the the of the", "of and the quagga"] * 20
    manifest = Manifest.read(save_corpus(tmp_path, texts))
    results, _ = measure(manifest, tokenizer, world)
    shares = np.asarray([6, 3, 1]) / 10
    assert results[0]["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)


def test_lost_documents_are_counted(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    manifest = Manifest.read(save_corpus(tmp_path, TEXTS, shards=1))
    shard = manifest.shards[0]
    lost = [0, len(shard.offsets) - 1]
    with manifest.shard_path(0).open("r+b") as file:
        for block in lost:
            file.seek(int(shard.offsets[block]) + 600)
            file.write(b"\xff\xff")
    for world in (1, 3):
        results, _ = measure(manifest, tokenizer, world)
        assert results[0]["lost_documents"] == shard.documents[lost].sum()


@pytest.mark.parametrize(("key", "value"), [("every", 0), ("batch", 0)])
def test_wrong_settings(key: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"eval\.{key}: {value} must be at least 1"):
        EvalConfig(**{key: value}).check()
