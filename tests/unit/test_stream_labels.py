"""Labels on padding: rows of the stream are what the tutorial feeds its model."""

from pathlib import Path

import numpy as np
import torch

from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.stream import Stream
from mlm_dist.data.tokenizer import load
from mlm_dist.storage.store import Store
from tests.corpora import documents, save_corpus, save_tokenizer


def stream(root: Path, labels: str) -> Stream:
    manifest = Manifest.read(save_corpus(root, documents(60)))
    tokenizer = load(str(save_tokenizer(root / "tokenizer")))
    mask = MaskConfig(strategy="mask_only", labels=labels)
    maker = BlockMaker(manifest, Store(manifest.root), tokenizer, 24, "none", "truncate", mask, seed=3)
    return Stream([maker], 10, 10)


def test_all_with_padding_is_labels_on_every_place(tmp_path: Path) -> None:
    padded, plain = stream(tmp_path, "all_with_padding"), stream(tmp_path, "all")
    with_pads, without = next(padded.batches()), next(plain.batches())
    micro, reference = padded.collate(with_pads)[0], plain.collate(without)[0]
    pad = padded.tokenizer.pad_id
    assert micro["input_ids"].shape == (10, 24) and micro["selected"].tolist() == list(range(240))
    real = micro["input_ids"] != pad
    assert real.sum(1).tolist() == without.rows.lengths.tolist() and not real.all()
    # The same tokens with the same masks; positions go on and labels say [PAD] where the padding is.
    assert torch.equal(micro["input_ids"][real], reference["input_ids"][reference["segment_ids"] > 0])
    labels = micro["labels"].view(10, 24)
    assert (labels[~real] == pad).all() and torch.equal(labels[real], reference["labels"])
    assert torch.equal(micro["position_ids"], torch.arange(24).expand(10, 24))
    assert torch.equal(micro["segment_ids"], torch.where(real, 1, -1))
    # Padding is predicted but is no text.
    assert with_pads.selected == 240 and with_pads.tokens == without.tokens == int(real.sum())


def test_tokens_count_what_is_neither_padding_nor_dead(tmp_path: Path) -> None:
    ended = stream(tmp_path, "all_with_padding")
    ended.epochs = 1
    counted, live = 0, 0
    for batch in ended.batches():
        if not batch.live.any():
            assert batch.tokens == batch.selected == 0
            break
        counted += batch.tokens
        live += int(batch.live.sum())
    _, offsets = ended.tokenizer.encode(documents(60))
    assert live == 60 and counted == int(np.minimum(np.diff(offsets), 22).sum()) + 2 * 60
