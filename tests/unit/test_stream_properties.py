"""The claim, over random corpora: the batches are the same on any ranks and workers, from any point on; nothing comes twice, nothing is missing."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from mlm_dist.data import lanes
from mlm_dist.data.batches import BatchWarmup
from mlm_dist.data.block import BlockMaker
from mlm_dist.data.inspect import digests
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.rows import Rows
from mlm_dist.data.stream import Batch, Stream
from mlm_dist.data.tokenizer import TextTokenizer, choose_backend, load
from mlm_dist.storage.store import Store
from tests.corpora import WORDS, save_corpus, save_tokenizer


@dataclass
class Case:
    """A run: its data and how it is spread."""

    corpora: list[list[str]]
    weights: list[float] | None
    shards: int
    per_member: int
    members_per_block: int
    seq_len: int
    packing: str
    batch: int
    warmup: BatchWarmup | None
    lanes: int
    seed: int
    mask: MaskConfig
    message: int
    epochs: int | None
    world: int
    workers: int
    stop: int
    world_after: int
    workers_after: int


@st.composite
def spreads(draw: st.DrawFn) -> dict[str, int]:
    """Ranks and loader workers before and after the stop. Workers are processes and take their time, so they are few."""
    workers, workers_after = draw(st.sampled_from([(0, 0)] * 8 + [(3, 0), (0, 2)]))
    world, world_after = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return {
        "world": min(world, 2) if workers else world,
        "workers": workers,
        "world_after": min(world_after, 2) if workers_after else world_after,
        "workers_after": workers_after,
    }


@st.composite
def cases(draw: st.DrawFn) -> Case:
    corpora = []
    for i in range(draw(st.integers(1, 2))):
        lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=40))
        # Each document begins with its number, so that each is known again; some are empty.
        corpora.append(
            [
                " ".join([str(i), *str(d), *(WORDS[(d * 7 + w) % 50] for w in range(n))]) if n else ""
                for d, n in enumerate(lengths)
            ]
        )
    if not any(text.strip() for texts in corpora for text in texts):
        corpora[0][0] = "the of and"
    seq_len = draw(st.sampled_from([8, 17, 64]))
    batch = smallest = draw(st.integers(1, 9))
    warmup = None
    if draw(st.booleans()):
        batch *= draw(st.integers(2, 4))
        warmup = BatchWarmup(smallest, draw(st.integers(1, 10 * batch * seq_len)))
    schedule = draw(st.booleans())
    return Case(
        corpora=corpora,
        weights=draw(st.none() | st.lists(st.floats(0.1, 5), min_size=len(corpora), max_size=len(corpora))),
        shards=draw(st.integers(1, 4)),
        per_member=draw(st.integers(1, 6)),
        members_per_block=draw(st.integers(1, 3)),
        seq_len=seq_len,
        packing=draw(st.sampled_from(["none", "split", "best_fit"])),
        batch=batch,
        warmup=warmup,
        lanes=draw(st.integers(1, smallest)),
        seed=draw(st.integers(0, 2**60)),
        mask=MaskConfig(
            strategy=draw(st.sampled_from(["token", "mask_only", "whole_word", "span"])),
            rate=0.3,
            rate_schedule="linear" if schedule else "constant",
            rate_end=0.1 if schedule else None,
            rate_steps=7 if schedule else None,
        ),
        message=draw(st.integers(1, 800)),
        epochs=draw(st.none() | st.integers(1, 3)),
        stop=draw(st.integers(0, 12)),
        **draw(spreads()),
    )


STEPS = 14


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def makers(case: Case, root: Path, tokenizer: TextTokenizer) -> list[BlockMaker]:
    out = []
    for source, texts in enumerate(case.corpora):
        path = save_corpus(
            root / str(source),
            texts,
            shards=min(case.shards, len(texts)),
            per_member=case.per_member,
            members_per_block=case.members_per_block,
        )
        manifest = Manifest.read(path)
        out.append(
            BlockMaker(
                manifest,
                Store(manifest.root),
                tokenizer,
                seq_len=case.seq_len,
                packing=case.packing,
                long_documents="chunk",
                mask=case.mask,
                seed=case.seed,
                source=source,
            )
        )
    return out


def ranks(
    case: Case, made: list[BlockMaker], world: int, workers: int, start: int, stop: int, cursors: np.ndarray | None
) -> list[list[Batch]]:
    """Batches start..stop of every rank."""
    out = []
    for rank in range(world):
        stream = Stream(
            made,
            case.batch,
            3,
            rank=rank,
            world_size=world,
            workers=workers,
            epochs=case.epochs,
            lanes=case.lanes,
            weights=case.weights,
            warmup=case.warmup,
        )
        batches = stream.batches(start, cursors)
        out.append([next(batches) for _ in range(start, stop)])
        batches.close()
    return out


def whole(parts: list[list[Batch]]) -> list[tuple[str, str, int]]:
    """Digests and corpus bytes of every global batch, whose rows must be those that come next in the run."""
    out = []
    following: int | None = None
    for batches in zip(*parts, strict=True):
        rows = Rows.concat([b.rows for b in batches])
        index = np.concatenate([b.index for b in batches])
        order = np.argsort(index)
        first = int(index.min()) if following is None else following
        following = first + len(index)
        assert index[order].tolist() == list(range(first, following))
        live = np.concatenate([b.live for b in batches])
        out.append((*digests(rows.take(order[live[order]])), sum(b.bytes for b in batches)))
    return out


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_any_ranks_workers_backend_messages_and_stop_give_the_same_batches(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    fast, _ = choose_backend(tokenizer, "nano", [])
    assert fast.nano is not None
    with tempfile.TemporaryDirectory() as directory:
        made = makers(case, Path(directory), tokenizer)
        monkeypatch.setattr(lanes, "MESSAGE_TOKENS", 256)
        reference = whole(ranks(case, made, 1, 0, 0, STEPS, None))
        fast_made = makers(case, Path(directory), fast)
        monkeypatch.setattr(lanes, "MESSAGE_TOKENS", case.message)
        before = ranks(case, fast_made, case.world, case.workers, 0, case.stop, None)
        assert whole(before) == reference[: case.stop]
        # The kill: what is left is one cursor a lane, each from the rank that served it.
        cursors = np.zeros((case.lanes, 3), np.int64)
        if case.stop:
            for rank, batches in enumerate(before):
                cursors[rank :: case.world] = batches[-1].cursors[rank :: case.world]
        after = ranks(case, made, case.world_after, case.workers_after, case.stop, STEPS, cursors)
        note(str(cursors))
        assert whole(after) == reference[case.stop :]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_every_token_as_often_as_there_are_epochs(tokenizer: TextTokenizer, case: Case) -> None:
    case.epochs, case.weights = case.epochs or 1, None
    with tempfile.TemporaryDirectory() as directory:
        made = makers(case, Path(directory), tokenizer)
        stream = Stream(made, case.batch, 3, epochs=case.epochs, lanes=case.lanes, warmup=case.warmup)
        got: Counter[int] = Counter()
        for batch in stream.batches():
            if not batch.live.any():
                break
            rows = batch.rows.take(np.flatnonzero(batch.live))
            assert (rows.lengths <= case.seq_len).all()
            got.update(rows.original_ids().tolist())
        ids, _ = tokenizer.encode([text for texts in case.corpora for text in texts])
        wanted = Counter({token: n * case.epochs for token, n in Counter(ids.tolist()).items()})
        for special in (tokenizer.cls_id, tokenizer.sep_id):
            got.pop(special, None)
        assert got == wanted
