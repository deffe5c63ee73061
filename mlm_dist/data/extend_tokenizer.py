"""`mlm-dist tokenizer extend`: add the frequent words of a corpus to a pre-trained WordPiece vocabulary."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_dist.data.tokenizer import TextTokenizer, choose_backend, from_pretrained, load_pretrained
from mlm_dist.data.train_tokenizer import manifest_documents, save
from mlm_dist.errors import UserError

if TYPE_CHECKING:
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

RECORD = "extension.json"
FORMAT = "mlm_dist.tokenizer_extension"
VERSION = 1
_BATCH_CHARACTERS = 1 << 22
# What a fast tokenizer must agree on with the reference before it counts, besides PROBES.
_AGREE_DOCUMENTS = 64
_EXAMPLES = 10
_PREFIX = "##"


@dataclass
class WordCounts:
    """The words of a corpus by how a vocabulary splits them.

    Attributes:
        words: how many there are, each as often as it occurs.
        pieces: the tokens that they make.
        split: how often each word of two or more pieces occurs.
    """

    words: int = 0
    pieces: int = 0
    split: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Extension:
    """A vocabulary of which the last words were added to a base.

    Attributes:
        base_size: entries of the base, and so the id of the first new word.
        base_sha256: SHA-256 hex of the base's vocabulary as a vocab.txt.
        words: new word -> ids of the pieces that the base splits it into, in the order of the new ids.
    """

    base_size: int
    base_sha256: str
    words: dict[str, tuple[int, ...]]

    def to_json(self) -> str:
        """What `read_extension` reads, a line for each word."""
        head = {"format": FORMAT, "version": VERSION, "base_size": self.base_size, "base_sha256": self.base_sha256}
        lines = ",\n".join(
            f"  {json.dumps(word, ensure_ascii=False)}: {list(pieces)}" for word, pieces in self.words.items()
        )
        return f'{json.dumps(head)[:-1]}, "words": {{\n{lines}\n}}}}\n'


def read_extension(name_or_path: str, tokenizer: "PreTrainedTokenizerFast") -> Extension | None:
    """The record that lies beside `tokenizer` in a local directory; None when there is none.

    Everything in it follows from the tokenizer and the size of the base, so all of it is checked.

    Raises:
        UserError: it is damaged or does not belong to the tokenizer.
    """
    path = Path(name_or_path).expanduser() / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is {content['format']!r:.80}, version {content['version']!r:.80}")
        words = {str(word): tuple(map(int, pieces)) for word, pieces in content["words"].items()}
        found = Extension(int(content["base_size"]), str(content["base_sha256"]), words)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.tokenizer: {path} cannot be read ({error!r}); run mlm-dist tokenizer extend again"
        ) from error
    tokens = _tokens(tokenizer)
    base = {token: index for index, token in enumerate(tokens[: max(0, found.base_size)])}
    if tokens != [*base, *words] or found != describe(tokenizer, base, list(words)):
        raise UserError(
            f"data.tokenizer: {path} does not belong to the tokenizer beside it; run mlm-dist tokenizer extend again, or "
            "delete that file if the tokenizer is to be taken as it is"
        )
    return found


def describe(tokenizer: "PreTrainedTokenizerFast", base: Mapping[str, int], words: Sequence[str]) -> Extension:
    """The extension of the vocabulary `base` by `words`; `tokenizer` gives all but the vocabulary."""
    model = _model(tokenizer, base)
    text = "".join(f"{token}\n" for token in base)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Extension(len(base), digest, {word: tuple(token.id for token in model.tokenize(word)) for word in words})


def check_base(base: "PreTrainedTokenizerFast", name: str) -> None:
    """Refuse a tokenizer whose words a stock BertTokenizerFast would not find the same.

    Raises:
        UserError: it is not BERT's WordPiece, or holds tokens beside its vocabulary.
    """
    definition = _definition(base)
    kind = definition["model"]["type"]
    if kind != "WordPiece":
        raise UserError(f"--base {name} is a {kind} tokenizer; only WordPiece, as BERT has it, can be extended")
    vocabulary = definition["model"]["vocab"]
    if sorted(vocabulary.values()) != list(range(len(base))):
        raise UserError(
            f"--base {name} has {len(base):,} tokens, but {len(vocabulary):,} in its vocabulary: tokens that were added "
            "beside it cannot be kept"
        )
    if (definition["normalizer"] or {}).get("type") != "BertNormalizer":
        raise UserError(f"--base {name}: its normalizer is not BERT's; only a BERT tokenizer can be extended")
    stock = _definition(with_words(base, []))
    for part in ("normalizer", "pre_tokenizer", "added_tokens"):
        if definition[part] != stock[part]:
            raise UserError(f"--base {name}: its {part} is not that of a stock BertTokenizerFast, which this makes")
    settings = [{k: v for k, v in d["model"].items() if k != "vocab"} for d in (definition, stock)]
    if settings[0] != settings[1]:
        raise UserError(f"--base {name}: its WordPiece settings {settings[0]} are not BERT's {settings[1]}")


def with_words(base: "PreTrainedTokenizerFast", words: Sequence[str]) -> "PreTrainedTokenizerFast":
    """A stock BertTokenizerFast with the vocabulary of `base`, then `words`, as ordinary WordPiece entries.

    Not as added tokens: those are cut out of the text before it is normalized, in the middle of words, too.
    """
    from transformers import BertTokenizerFast

    normalizer = _definition(base)["normalizer"]
    names = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    tokens = [*_tokens(base), *words]
    tokenizer = BertTokenizerFast(
        vocab={token: index for index, token in enumerate(tokens)},  # `vocab_file` is silently ignored
        do_lower_case=normalizer["lowercase"],
        strip_accents=normalizer["strip_accents"],
        tokenize_chinese_chars=normalizer["handle_chinese_chars"],
        model_max_length=base.model_max_length,
        **{name: getattr(base, name) for name in names},
    )
    assert len(tokenizer) == len(tokens), f"a vocabulary of {len(tokens)} became one of {len(tokenizer)}"
    return tokenizer


def count_words(tokenizer: TextTokenizer, documents: Iterable[str]) -> WordCounts:
    """Count words as the tokenizer's normalizer and pre-tokenizer cut them. [UNK] is a word of one piece.

    Holds each different word of two or more pieces in memory.
    """
    assert tokenizer.continues is not None
    counts = WordCounts()
    by_pieces: Counter[tuple[int, ...]] = Counter()
    for batch in _batches(documents):
        ids, _ = tokenizer.encode(batch)
        first = np.flatnonzero(~tokenizer.continues[ids])
        lengths = np.diff(first, append=len(ids))
        counts.words += len(first)
        counts.pieces += len(ids)
        for length in np.unique(lengths[lengths > 1]):
            rows, times = np.unique(
                ids[first[lengths == length][:, None] + np.arange(length)], axis=0, return_counts=True
            )
            for pieces, number in zip(rows.tolist(), times.tolist(), strict=True):
                by_pieces[tuple(pieces)] += number
    for pieces, number in by_pieces.items():
        # The pieces of a word, put together, are the word: no two words have the same.
        counts.split["".join(tokenizer.decode_token(piece).removeprefix(_PREFIX) for piece in pieces)] = number
    return counts


def choose_words(
    base: "PreTrainedTokenizerFast", counts: WordCounts, *, count: int, min_frequency: int
) -> tuple[list[str], int]:
    """The most frequent words that the base splits, the first by code points among equals.

    WordPiece takes the longest entry that a word begins with and never goes back. So words that begin with a new one are
    split anew, and one whose rest is then in no entry would become [UNK]. New words that do this to a word of the
    corpus are passed over.

    Args:
        base: the tokenizer that the counts are from.
        counts: words of the corpus.
        count: most words to take.
        min_frequency: how often a word must occur.

    Returns:
        The words, and the pieces that all words of the corpus make with them.
    """
    ranked = sorted(counts.split, key=lambda word: (-counts.split[word], word))
    ranked = [word for word in ranked if counts.split[word] >= min_frequency]
    vocabulary = {token: index for index, token in enumerate(_tokens(base))}
    before = _model(base, vocabulary)
    harmful: set[str] = set()
    while True:
        chosen = list(islice((word for word in ranked if word not in harmful), count))
        new = {word: len(vocabulary) + i for i, word in enumerate(chosen)}
        after = _model(base, vocabulary | new)
        pieces, before_harm = counts.pieces, len(harmful)
        for word, number in counts.split.items():
            tokens = after.tokenize(word)
            if tokens[0].value == base.unk_token:
                harmful.add(max((word[:end] for end in range(len(word)) if word[:end] in new), key=len))
            pieces += number * (len(tokens) - len(before.tokenize(word)))
        if len(harmful) == before_harm:
            return chosen, pieces


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _definition(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return definition


def _tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The vocabulary in the order of its ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _model(tokenizer: "PreTrainedTokenizerFast", vocabulary: Mapping[str, int]) -> "WordPiece":
    """WordPiece alone, for words that are normalized and cut already."""
    from tokenizers.models import WordPiece

    return WordPiece(dict(vocabulary), unk_token=str(tokenizer.unk_token))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "--base",
        required=True,
        metavar="NAME_OR_DIR",
        help="the tokenizer of the pre-trained model: a directory in transformers' format or a name on the hub",
    )
    add("--manifest", required=True, help="shards to count words in: a manifest.json, or its URL")
    add("--count", type=int, required=True, help="words to add")
    add(
        "--min-frequency",
        type=int,
        default=5,
        help="how often a word must occur in the corpus (default: %(default)s)",
    )
    add("--field", help="field of JSON records that is the text (default: the manifest's, else text)")
    add("--allow-pipe", action="store_true", help="run the commands that --manifest names as pipe:COMMAND")
    add("--output", type=Path, required=True, help="directory to save in")
    add("--overwrite", action="store_true", help="replace another tokenizer in the directory")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    for option, value in (("--count", args.count), ("--min-frequency", args.min_frequency)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1")
    if args.output.resolve() == Path(args.base).expanduser().resolve():
        raise UserError(f"--output {args.output} is --base itself, which its model still needs; give another directory")
    base = load_pretrained(args.base, key="--base")
    check_base(base, args.base)
    documents = manifest_documents(args.manifest, args.field, allow_pipe=args.allow_pipe)
    tokenizer, _ = choose_backend(from_pretrained(base), "auto", list(islice(documents(), _AGREE_DOCUMENTS)))
    counts = count_words(tokenizer, documents())
    words, pieces = choose_words(base, counts, count=args.count, min_frequency=args.min_frequency)
    if not words:
        raise UserError(
            f"--base {args.base} splits no word that occurs at least {args.min_frequency} times (--min-frequency) among "
            f"the {counts.words:,} of --manifest {args.manifest}; there is nothing to add"
        )
    extended = with_words(base, words)
    tokens = _tokens(extended)
    extension = describe(base, {token: index for index, token in enumerate(tokens[: len(base)])}, words)
    more = {RECORD: extension.to_json(), "vocab.txt": "".join(f"{token}\n" for token in tokens)}
    written = save(extended, args.output, more=more, overwrite=args.overwrite)
    print(
        f"{args.output}: {len(tokens):,} entries, {len(words):,} of them new words"
        + ("" if written else ", as they were there already")
    )
    if len(words) < args.count:
        print(f"the text has no more to offer: {args.count:,} were asked for")
    print(
        f"{counts.words:,} words of the corpus: {counts.pieces / counts.words:.3f} pieces a word before, "
        f"{pieces / counts.words:.3f} after"
    )
    for word in words[:_EXAMPLES]:
        split = " ".join(tokens[piece] for piece in extension.words[word])
        print(f"  {word}: {counts.split[word]:,} times, was {split}")
    return 0
