"""The stream's contracts: the same batches whatever the ranks and workers, every document once an epoch, resume at any batch."""

import hashlib
import io
import pickle
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mlm_dist.data.block import BlockError, BlockMaker
from mlm_dist.data.index import index
from mlm_dist.data.lanes import Chunk
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.rows import Rows
from mlm_dist.data.stream import Batch, Stream
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.storage.store import Store
from tests.corpora import documents, save_corpus, save_tokenizer

TEXTS = documents(300)
NO_MASK = MaskConfig(rate=1e-12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.read(save_corpus(tmp_path_factory.mktemp("corpus"), TEXTS))


def steps(rows: int) -> np.ndarray:
    """Rows of a run whose batches are endless."""
    return np.zeros(rows, np.int64)


def maker(manifest: Manifest, tokenizer: TextTokenizer, **changes: object) -> BlockMaker:
    base = BlockMaker(
        manifest,
        Store(manifest.root),
        tokenizer,
        seq_len=32,
        packing="split",
        long_documents="chunk",
        mask=MaskConfig(),
        seed=7,
    )
    return replace(base, **changes)


def global_batches(
    made: BlockMaker,
    world: int,
    workers: int,
    start: int,
    stop: int,
    batch: int = 12,
    cursors: np.ndarray | None = None,
    **kwargs: object,
) -> list[Rows]:
    """Batches start..stop put together from all ranks, in row order, live rows only."""
    parts: list[list[Batch]] = []
    for rank in range(world):
        stream = Stream([made], batch, 4, rank=rank, world_size=world, workers=workers, **kwargs)
        batches = stream.batches(start, cursors)
        parts.append([next(batches) for _ in range(start, stop)])
    out = []
    for k in range(stop - start):
        whole = Rows.concat([p[k].rows for p in parts])
        index, live = np.concatenate([p[k].index for p in parts]), np.concatenate([p[k].live for p in parts])
        order = np.argsort(index)
        assert index[order].tolist() == list(range((start + k) * batch, (start + k + 1) * batch))
        out.append(whole.take(order[live[order]]))
    return out


def digest(rows: Rows) -> str:
    h = hashlib.sha256()
    for part in (
        rows.ids,
        rows.lengths,
        rows.segment_lengths,
        rows.segments,
        rows.positions,
        rows.labels,
        rows.selected,
    ):
        h.update(np.ascontiguousarray(part).tobytes())
    return h.hexdigest()


def digests(rows: list[Rows]) -> list[str]:
    return [digest(r) for r in rows]


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 2), (3, 0), (4, 1), (6, 1), (20, 0)])
def test_world_and_workers_change_nothing(corpus: Manifest, tokenizer: TextTokenizer, world: int, workers: int) -> None:
    made = maker(corpus, tokenizer)
    reference = digests(global_batches(made, 1, 0, 0, 30, lanes=5))
    assert len(set(reference)) == 30
    assert digests(global_batches(made, world, workers, 0, 30, lanes=5)) == reference


@pytest.mark.parametrize("batch", [1, 5, 7, 12])
@pytest.mark.parametrize("lanes", [1, 4, 5])
def test_resume_at_any_batch(corpus: Manifest, tokenizer: TextTokenizer, batch: int, lanes: int) -> None:
    made = maker(corpus, tokenizer)
    reference = digests(global_batches(made, 1, 0, 0, 24, batch, lanes=lanes))
    for k in (1, 2, 3, 11):
        cursors = np.zeros((lanes, 3), np.int64)
        for rank in range(3):  # the cursors of three ranks, gathered as a checkpoint gathers them
            stream = Stream([made], batch, 4, rank=rank, world_size=3, lanes=lanes)
            batches = stream.batches()
            last = [next(batches) for _ in range(k)][-1]
            cursors[rank::3] = last.cursors[rank::3]
        assert digests(global_batches(made, 2, 0, k, 24, batch, cursors, lanes=lanes)) == reference[k:]


def contents(rows: list[Rows], tokenizer: TextTokenizer) -> Counter[str]:
    """Decoded segments and how often each came."""
    out: Counter[str] = Counter()
    for part in rows:
        starts = np.cumsum(part.segment_lengths) - part.segment_lengths
        for start, length in zip(starts, part.segment_lengths, strict=True):
            ids = part.ids[start : start + length]
            assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
            out[" ".join(tokenizer.decode_token(i) for i in ids[1:-1])] += 1
    return out


def words(texts: list[str], tokenizer: TextTokenizer) -> list[list[str]]:
    return [tokenizer.backend.encode(t, add_special_tokens=False).tokens for t in texts]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize(("world", "workers", "lanes"), [(1, 0, 3), (2, 2, 5), (4, 0, 3)])
def test_each_document_once_an_epoch(
    corpus: Manifest, tokenizer: TextTokenizer, packing: str, world: int, workers: int, lanes: int
) -> None:
    made = maker(corpus, tokenizer, seq_len=400, packing=packing, mask=NO_MASK)
    rows = global_batches(made, world, workers, 0, 80, lanes=lanes, epochs=2)
    assert contents(rows, tokenizer) == Counter({" ".join(tokens): 2 for tokens in words(TEXTS, tokenizer)})
    assert len(rows[-1]) == 0


@pytest.mark.parametrize("packing", ["none", "split", "best_fit"])
def test_each_token_once_when_documents_are_cut(corpus: Manifest, tokenizer: TextTokenizer, packing: str) -> None:
    made = maker(corpus, tokenizer, packing=packing, mask=NO_MASK)
    rows = global_batches(made, 2, 0, 0, 150, epochs=1)
    assert len(rows[-1]) == 0
    expected = Counter(token for tokens in words(TEXTS, tokenizer) for token in tokens)
    got = Counter(token for text, n in contents(rows, tokenizer).items() for token in text.split() for _ in range(n))
    assert got == expected
    assert max(int(r.lengths.max()) for r in rows if len(r)) <= 32


def test_split_fills_rows(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    made = maker(corpus, tokenizer)
    for block in range(5):
        rows, _ = made.rows(block, 0, steps)
        assert (rows.lengths[:-1] >= 30).all()


def test_best_fit_wastes_less_than_one_piece_a_row(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    fill = {}
    for packing in ("none", "best_fit"):
        rows = Rows.concat(
            [
                maker(corpus, tokenizer, seq_len=128, packing=packing).rows(b, 0, steps)[0]
                for b in range(corpus.num_blocks)
            ]
        )
        fill[packing] = rows.lengths.sum() / (128 * len(rows))
    assert fill["best_fit"] > 1.3 * fill["none"]


def test_truncate_keeps_the_head_of_each_document(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    made = maker(corpus, tokenizer, packing="none", long_documents="truncate", mask=NO_MASK)
    got = contents(global_batches(made, 1, 0, 0, 30, epochs=1), tokenizer)
    assert got == Counter(" ".join(tokens[:30]) for tokens in words(TEXTS, tokenizer))


def test_epochs_differ_in_order_and_masks(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    made = maker(corpus, tokenizer, packing="none", seq_len=400)
    first, _ = made.rows(3, 0, steps)
    second, _ = made.rows(3, 1, steps)
    assert sorted(first.lengths) == sorted(second.lengths)
    assert digest(first) != digest(second)
    assert digest(first) == digest(made.rows(3, 0, steps)[0])


def test_equal_text_in_two_blocks_gets_different_masks(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    text = " ".join(TEXTS[:3])
    manifest = Manifest.read(save_corpus(tmp_path, [text] * 4, shards=1, per_member=1))
    made = maker(manifest, tokenizer, packing="none", seq_len=400)
    masks = {tuple(made.rows(b, e, steps)[0].positions.tolist()) for b in range(4) for e in range(2)}
    assert len(masks) == 8


def test_documents_that_spell_special_tokens_stay_text(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    manifest = Manifest.read(save_corpus(tmp_path, ["the [SEP] of [MASK] and [CLS] a"], shards=1))
    rows, _ = maker(manifest, tokenizer, mask=NO_MASK).rows(0, 0, steps)
    inner = rows.ids[1:-1]
    assert not np.isin(inner, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id]).any()


def test_the_end_gives_dead_rows_forever(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    stream = Stream([maker(corpus, tokenizer)], 12, 4, epochs=1)
    seen_dead = False
    for _, batch in zip(range(200), stream.batches(), strict=False):
        assert not (seen_dead and batch.live.any())
        seen_dead = seen_dead or not batch.live.any()
    assert seen_dead
    assert batch.selected == batch.tokens == batch.bytes == 0


def test_bytes_account_for_the_whole_corpus(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    stream = Stream([maker(corpus, tokenizer)], 12, 4, epochs=2)
    assert sum(b.bytes for _, b in zip(range(300), stream.batches(), strict=False)) == 2 * corpus.num_bytes


def test_accumulation_is_the_same_on_all_ranks_and_covers_all_rows(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    made = maker(corpus, tokenizer)
    for world in (1, 2, 3, 7):
        streams = [Stream([made], 11, 2, rank=r, world_size=world, lanes=4) for r in range(world)]
        for step in range(8):
            counts = streams[0].rank_counts(step)
            assert counts.sum() == 11
            assert all(s.micro_batches(step) == -(-counts.max() // 2) for s in streams)
        for stream in streams:
            batch = next(stream.batches())
            micro = stream.collate(batch)
            assert len(micro) == stream.micro_batches(0)
            assert sum(int(m["labels"].numel()) for m in micro) == batch.selected


def test_more_ranks_than_lanes_gives_empty_rows(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    stream = Stream([maker(corpus, tokenizer)], 4, 2, rank=5, world_size=6, lanes=2)
    batch = next(stream.batches())
    assert len(batch.rows) == 0
    micro = stream.collate(batch)
    assert all(
        m["labels"].numel() == 0 and m["input_ids"][0, :2].tolist() == [tokenizer.cls_id, tokenizer.sep_id]
        for m in micro
    )


def test_collate_marks_segments_and_restarts_positions(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    rows, _ = maker(corpus, tokenizer, seq_len=64, packing="best_fit").rows(0, 0, steps)
    micro = rows.collate(tokenizer.pad_id)
    ids, segments, positions = micro["input_ids"], micro["segment_ids"], micro["position_ids"]
    assert ids.shape[1] % 8 == 0
    assert torch.equal(segments == 0, (torch.arange(ids.shape[1])[None] >= torch.from_numpy(rows.lengths)[:, None]))
    assert ((ids == tokenizer.cls_id) == ((positions == 0) & (segments > 0))).all()
    flat = ids.flatten()[micro["selected"]]
    changed = flat != micro["labels"]
    assert (flat[changed] != tokenizer.cls_id).all() and len(flat) == rows.selected.sum()


@pytest.mark.parametrize("one_shape", [False, True])
def test_flat_micro_batches_hold_the_same_rows(corpus: Manifest, tokenizer: TextTokenizer, one_shape: bool) -> None:
    made = maker(corpus, tokenizer, seq_len=64, packing="best_fit")
    padded, flat = (Stream([made], 5, 4, flat=flat, one_shape=one_shape) for flat in (False, True))
    batch = next(flat.batches())
    wide, narrow = padded.collate(batch), flat.collate(batch)
    assert len(wide) == len(narrow) == 2
    empty = flat.empty_micro_batch()
    for one, other in zip([*wide, padded.empty_micro_batch()], [*narrow, empty], strict=True):
        inside = one["segment_ids"] > 0
        assert torch.equal(other["input_ids"][0, : inside.sum()], one["input_ids"][inside])
        assert torch.equal(other["labels"], one["labels"])
        if one_shape:
            assert one["input_ids"].shape == (4, 64) and other["input_ids"].shape == (1, 256)
            assert other["max_length"] == 64
        else:
            assert other["input_ids"].numel() == inside.sum() == other["cu_seqlens"][-1]
    assert empty["labels"].numel() == 0


def test_a_broken_block_is_lost_whole_with_an_exact_count(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = save_corpus(tmp_path, TEXTS, shards=2, per_member=5)
    manifest = Manifest.read(path)
    shard = manifest.shards[1]
    with manifest.shard_path(1).open("r+b") as file:
        file.seek(int(shard.offsets[2]) + 700)
        file.write(b"\xff\xff\xff")
    made = maker(manifest, tokenizer, packing="none", seq_len=400, mask=NO_MASK)
    stream = Stream([made], 12, 4, epochs=1, lanes=3)
    batches = [b for _, b in zip(range(40), stream.batches(), strict=False)]
    faults = [f for b in batches for f in b.faults]
    assert [(f.shard, f.offset, f.documents, f.whole) for f in faults] == [
        (shard.path, int(shard.offsets[2]), int(shard.documents[2]), True)
    ]
    assert "checksum" in faults[0].cause
    delivered = sum(int(b.live.sum()) for b in batches)
    assert delivered == len(TEXTS) - faults[0].documents
    # With the loss in the ledger, the run goes the same way, even when the block can be read again.
    save_corpus(tmp_path, TEXTS, shards=2, per_member=5)
    again = Stream([replace(made)], 12, 4, epochs=1, lanes=3).batches(lost=frozenset({(0, 0, faults[0].block)}))
    assert [digest(next(again).rows) for _ in batches] == [digest(b.rows) for b in batches]


def test_a_bad_record_loses_itself_only(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    import zlib

    from mlm_dist.data.manifest import Shard

    payload = b'{"text": "the of"}\n{"text": 3}\nnot json\n{"text": "and a"}\n'
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("x.jsonl")
        info.size = len(payload)
        tar.addfile(info, io.BytesIO(payload))
    data = (tmp_path / "a.tar").read_bytes()
    block = data[:1024]
    one = [
        np.asarray([v], t) for v, t in ((0, np.int64), (1024, np.int64), (4, np.int64), (zlib.crc32(block), np.uint32))
    ]
    manifest = Manifest(tmp_path, [Shard("a.tar", len(data), hashlib.sha256(data).hexdigest(), *one)], {})
    rows, faults = maker(manifest, tokenizer, packing="none", mask=NO_MASK).rows(0, 0, steps)
    assert len(rows) == 2
    assert [(f.whole, f.documents) for f in faults] == [(False, 1), (False, 1)]


def test_merge_orders_by_row_number(corpus: Manifest, tokenizer: TextTokenizer) -> None:
    rows, _ = maker(corpus, tokenizer).rows(0, 0, steps)
    n = len(rows)
    index = np.arange(n)[::-1].copy()
    chunk = Chunk(rows, index, np.zeros((n, 3), np.int64), index * 10, np.ones(n, bool), [])
    merged = Chunk.merge([chunk.slice(0, n // 2), chunk.slice(n // 2, n)])
    assert merged.bytes.tolist() == (np.arange(n) * 10).tolist()
    assert digest(merged.rows.take(index)) == digest(rows)


def test_resume_with_more_lanes_than_a_message_has_rows(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    manifest = Manifest.read(save_corpus(tmp_path, documents(700, longest=20), shards=2, per_member=1))
    made = maker(manifest, tokenizer)
    for workers in (0, 2):
        stream = Stream([made], 64, 8, workers=workers)
        assert stream.order.lanes == 43  # does not divide 64: the resume begins inside a round
        batches = stream.batches()
        first = [next(batches) for _ in range(4)]
        again = stream.batches(1, first[0].cursors)
        assert [digest(next(again).rows) for _ in range(3)] == [digest(b.rows) for b in first[1:]]


def test_a_lane_that_lost_everything_is_empty_alike_whatever_the_ranks(
    corpus: Manifest, tokenizer: TextTokenizer
) -> None:
    made = maker(corpus, tokenizer)
    order = Stream([made], 8, 4, lanes=4).order
    lost = frozenset((0, epoch, int(block)) for epoch in range(2) for block in order.blocks(epoch, 1))
    reference: list[list[bool]] = []
    for world, workers in ((1, 0), (2, 0), (1, 2), (4, 1)):
        live = np.zeros((60, 8), bool)
        for rank in range(world):
            stream = Stream([made], 8, 4, rank=rank, world_size=world, workers=workers, lanes=4)
            for step, batch in zip(range(60), stream.batches(lost=lost), strict=False):
                live[step, batch.index - 8 * step] = batch.live
        reference = reference or live.tolist()
        assert live.tolist() == reference
    assert not np.asarray(reference)[0, [1, 5]].any() and np.asarray(reference)[-1].all()


def test_a_block_begun_that_is_gone_stops_the_resume(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = save_corpus(tmp_path, [" ".join(TEXTS)], shards=1)
    stream = Stream([maker(Manifest.read(path), tokenizer)], 4, 4)
    cursors = next(stream.batches()).cursors
    assert cursors[0, 2] == 4  # inside the block
    Manifest.read(path).shard_path(0).write_bytes(b"")
    gone = Stream([maker(Manifest.read(path), tokenizer)], 4, 4)
    with pytest.raises(BlockError, match="4 rows are in the run already"):
        next(gone.batches(1, cursors))


def test_a_tokenizer_sent_to_a_worker_still_takes_special_tokens_for_text(tokenizer: TextTokenizer) -> None:
    text = ["the [MASK] of"]
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode(text)[0].tolist() == tokenizer.encode(text)[0].tolist()
    assert tokenizer.mask_id not in tokenizer.encode(text)[0]


def test_bytes_of_blocks_without_text_are_counted_once_also_after_a_resume(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    texts = [text if i % 13 == 0 else "   " for i, text in enumerate(documents(120, longest=40))]
    manifest = Manifest.read(save_corpus(tmp_path, texts, shards=1, per_member=1))
    stream = Stream([maker(manifest, tokenizer)], 8, 4, lanes=8, epochs=3)
    batches = [b for _, b in zip(range(60), stream.batches(), strict=False)]
    assert sum(b.bytes for b in batches) == 3 * manifest.num_bytes
    for k in (1, 2, 3, 10):
        again = stream.batches(k, batches[k - 1].cursors)
        assert [next(again).bytes for _ in range(10)] == [b.bytes for b in batches[k : k + 10]]


def test_what_the_manifest_told_of_is_no_news(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, payload in (
            ("a.txt", b"the of"),
            ("b.txt", b"\xff\xfe"),
            ("._a.txt", b"\x00\x05\xff"),
            ("c.txt", b"and"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    manifest = index([str(tmp_path / "a.tar")], tmp_path / "manifest.json")
    assert manifest.num_documents == 2 and manifest.losses.documents == 1
    rows, faults = maker(manifest, tokenizer, packing="none").rows(0, 0, steps)
    assert len(rows) == 2 and faults == []


@pytest.mark.parametrize("labels", ["masked", "all_with_padding"])
def test_work_is_counted_without_padding_and_ended_lanes(
    corpus: Manifest, tokenizer: TextTokenizer, labels: str
) -> None:
    packing = "none" if labels == "all_with_padding" else "best_fit"
    mask = MaskConfig(labels=labels)
    made = maker(corpus, tokenizer, packing=packing, mask=mask)
    stream = Stream([made], global_batch=8, micro_batch=8, lanes=8, epochs=1)
    checked = ended = 0
    for batch in stream.batches():
        if not batch.live.any():
            break
        tokens = attended = 0
        for row in np.flatnonzero(batch.live):
            one, start = batch.rows.take(np.array([row])), 0
            for length in one.segment_lengths:
                real = int((one.ids[start : start + length] != tokenizer.pad_id).sum())
                tokens, attended, start = tokens + real, attended + real**2, start + int(length)
        assert (batch.tokens, batch.attended) == (tokens, attended)
        checked, ended = checked + 1, ended + int((~batch.live).sum())
    assert checked > 5 and ended


@pytest.mark.parametrize(("batch", "lanes", "world"), [(12, 12, 1), (12, 8, 2), (10, 4, 3), (12, 12, 5), (7, 4, 3)])
def test_the_most_rows_of_a_rank_are_those_of_some_batch(
    corpus: Manifest, tokenizer: TextTokenizer, batch: int, lanes: int, world: int
) -> None:
    stream = Stream([maker(corpus, tokenizer)], global_batch=batch, micro_batch=2, world_size=world, lanes=lanes)
    counts = [np.bincount(np.arange(k * batch, (k + 1) * batch) % lanes % world, minlength=world) for k in range(40)]
    assert stream.most_rows() == max(int(c.max()) for c in counts)


@pytest.mark.parametrize(("world", "workers", "batch"), [(1, 0, 12), (2, 1, 12), (3, 2, 7)])
def test_origins_are_the_blocks_that_the_rows_come_from(
    corpus: Manifest, tokenizer: TextTokenizer, world: int, workers: int, batch: int
) -> None:
    made = maker(corpus, tokenizer, mask=NO_MASK)
    of_block = {}
    seen = set()
    for rank in range(world):
        stream = Stream([made], batch, 4, rank=rank, world_size=world, workers=workers, epochs=2, lanes=5)
        for mine in stream.batches():
            if not mine.live.any():
                break
            origins = stream.origins(mine)
            assert len(origins) == mine.live.sum()
            for row, at in zip(np.flatnonzero(mine.live).tolist(), origins, strict=True):
                key = at.epoch, at.block
                if key not in of_block:
                    rows = made.rows(at.block, at.epoch, steps)[0]
                    of_block[key] = [rows.slice(i, i + 1).ids.tolist() for i in range(len(rows))]
                of_block[key].remove(mine.rows.slice(row, row + 1).ids.tolist())  # each row of a block once
                assert (at.shard, at.offset, at.length) == made.where(at.block)
                seen.add(key)
    assert not any(of_block.values())
    assert len(seen) == 2 * len(made.sizes())
