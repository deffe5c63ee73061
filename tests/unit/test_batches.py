"""Batches that grow: what the schedule says without walking is what a walk over all steps gives."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_dist.config import TrainConfig
from mlm_dist.data.batches import BatchSchedule, BatchWarmup
from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig, rates
from mlm_dist.data.rows import Rows
from mlm_dist.data.stream import Stream
from mlm_dist.data.tokenizer import load
from mlm_dist.data.torch_dataset import MaskedLanguageDataset
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
from tests.corpora import documents, save_corpus, save_tokenizer


def test_a_small_one_by_hand() -> None:
    schedule = BatchSchedule.growing(BatchWarmup(start=4, tokens=320), 12, seq_len=8)
    # 320 token places are 40 rows: 4 rows a batch until row 20, 8 rows until row 40 is passed, then 12.
    assert [schedule.size(k) for k in range(10)] == [4, 4, 4, 4, 4, 8, 8, 8, 12, 12]
    assert [schedule.first(k) for k in range(10)] == [0, 4, 8, 12, 16, 20, 28, 36, 44, 56]
    assert (schedule.smallest, schedule.largest, schedule.full_from) == (4, 12, 8)


@given(
    start=st.integers(1, 9),
    times=st.integers(2, 40),
    tokens=st.integers(1, 100_000),
    seq_len=st.sampled_from([8, 128, 512]),
)
def test_sizes_follow_the_tokens_so_far(start: int, times: int, tokens: int, seq_len: int) -> None:
    largest = start * times
    schedule = BatchSchedule.growing(BatchWarmup(start, tokens), largest, seq_len)
    rows, batch_of = 0, []
    for k in range(400):
        # Each of the times - 1 sizes below the largest for as many tokens.
        size = min(largest, start * (1 + rows * seq_len * (times - 1) // tokens))
        assert (schedule.first(k), schedule.size(k)) == (rows, size)
        batch_of += [k] * size
        rows += size
    assert schedule.batch_of(np.arange(rows)).tolist() == batch_of
    # Far out, by arithmetic: resume at such a step walks over nothing.
    far, full = 10**12, schedule.full_from
    assert schedule.first(far) == schedule.first(full) + (far - full) * largest
    assert schedule.batch_of(np.asarray([schedule.first(far) - 1, schedule.first(far)])).tolist() == [far - 1, far]


@given(size=st.integers(1, 5000), step=st.integers(0, 10**12))
def test_a_constant_schedule_is_multiplication(size: int, step: int) -> None:
    schedule = BatchSchedule.constant(size)
    assert (schedule.first(step), schedule.size(step), schedule.full_from) == (step * size, size, 0)
    assert schedule.batch_of(np.asarray([step * size, step * size + size - 1])).tolist() == [step, step]


def test_growing_batches_change_no_row_and_masks_follow_their_batch(tmp_path: Path) -> None:
    manifest = Manifest.read(save_corpus(tmp_path / "corpus", documents(300)))
    tokenizer = load(str(save_tokenizer(tmp_path / "tokenizer")))

    def stream(mask: MaskConfig, batch: int, warmup: BatchWarmup | None) -> Stream:
        store = Store(manifest.root)
        maker = BlockMaker(
            manifest, store, tokenizer, seq_len=32, packing="split", long_documents="chunk", mask=mask, seed=7
        )
        return Stream([maker], batch, 4, lanes=3, warmup=warmup)

    mask = MaskConfig(rate=0.6, rate_schedule="linear", rate_end=0.05, rate_steps=8)
    growing = stream(mask, 16, BatchWarmup(4, 32 * 60))
    assert [growing.schedule.size(k) for k in range(10)] == [4, 4, 4, 4, 4, 8, 8, 8, 12, 12]
    for k, batch in zip(range(10), growing.batches(), strict=False):
        rate = float(rates(mask, np.asarray([k]))[0])
        constant = stream(MaskConfig(rate=rate), 4, None).batches()
        same = Rows.concat([next(constant).rows for _ in range(growing.schedule.first(k + 1) // 4)])
        wanted = same.slice(growing.schedule.first(k), growing.schedule.first(k + 1))
        for part in ("ids", "lengths", "positions", "labels"):
            assert getattr(batch.rows, part).tolist() == getattr(wanted, part).tolist()


def test_the_dataset_of_rows_is_as_long_as_its_batches(tmp_path: Path) -> None:
    manifest = Manifest.read(save_corpus(tmp_path / "corpus", documents(100)))
    tokenizer = load(str(save_tokenizer(tmp_path / "tokenizer")))
    maker = BlockMaker(
        manifest,
        Store(manifest.root),
        tokenizer,
        seq_len=32,
        packing="split",
        long_documents="chunk",
        mask=MaskConfig(),
        seed=7,
    )
    dataset = MaskedLanguageDataset(Stream([maker], 12, 4, warmup=BatchWarmup(4, 32 * 40)), steps=9)
    assert len(dataset) == 5 * 4 + 3 * 8 + 12 == sum(1 for _ in dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_start": 8}, "batch_warmup_tokens: None"),
        ({"batch_warmup_tokens": 1000}, "batch_start: None"),
        ({"batch_start": 12, "batch_warmup_tokens": 1000}, r"12 rows must divide .*64.* is 8"),
        ({"batch_start": 64, "batch_warmup_tokens": 1000}, r"be fewer; the nearest number that does is 32"),
        ({"batch_start": 0, "batch_warmup_tokens": 1000}, "batch_start: 0 must be at least 1"),
        ({"batch_start": 8, "batch_warmup_tokens": 0}, "batch_warmup_tokens: 0 must be at least 1"),
    ],
)
def test_growth_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    TrainConfig(steps=1, global_batch=64, batch_start=8, batch_warmup_tokens=1).check()
    with pytest.raises(UserError, match=message):
        TrainConfig(steps=1, global_batch=64, **changes).check()
