"""`mlm-dist tokenizer`: train a BERT WordPiece vocabulary and save it in transformers' format."""

import argparse
import filecmp
import os
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, MemberError, read_documents
from mlm_dist.data.sources import BUILTINS, find_parts, find_sources, read_part
from mlm_dist.data.tar import TarError, iter_members
from mlm_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_ALPHABET = 1000  # as in BERT's and tokenizers' default


def train_vocabulary(
    documents: Callable[[], Iterator[str]], vocab_size: int, *, lowercase: bool = True, min_frequency: int = 2
) -> dict[str, int]:
    """Train a WordPiece vocabulary with `tokenizers`; the same text gives the same vocabulary.

    The trainer itself numbers characters inside words in the order of a randomly seeded hash table, breaks ties between
    merges by these numbers, and cuts its alphabet in that order, too: two runs differ. Here the characters are counted
    and numbered first, after which nothing is left to chance.

    Args:
        documents: Gives the text; called twice.
        vocab_size: Entries wanted; a small corpus may have fewer to offer.
        lowercase: Fold case and strip accents, as bert-base-uncased does.
        min_frequency: How often a pair must occur to become an entry.

    Returns:
        Entries and their ids: special tokens, characters, characters inside words, then merges.

    Raises:
        UserError: A vocabulary too small for the special tokens and a small alphabet, or no text.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    room = (
        vocab_size - len(SPECIAL_TOKENS)
    ) // 4  # characters take at most half, each once alone and once inside a word
    if room < 16:
        raise UserError(f"--vocab-size is {vocab_size}; it must be at least {len(SPECIAL_TOKENS) + 4 * 16}")
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: Counter[str] = Counter()
    for document in documents():
        counts.update(normalizer.normalize_str(document))
    characters = [character for character in counts if not character.isspace()]
    if not characters:
        raise UserError("the inputs hold no text to train a vocabulary on")
    characters.sort(key=lambda character: (-counts[character], character))
    alphabet = sorted(characters[: min(room, _MAX_ALPHABET)])

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # Called special only so that the trainer gives them their numbers in this order.
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)],
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents(), trainer)
    return tokenizer.get_vocab(with_added_tokens=False)


def make_tokenizer(vocabulary: dict[str, int], *, lowercase: bool = True) -> "PreTrainedTokenizerFast":
    """A fast BERT tokenizer of transformers with this vocabulary."""
    from transformers import BertTokenizerFast

    # Of the two names for a vocabulary, `vocab_file` is silently ignored by transformers 5.
    tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase)
    assert len(tokenizer) == len(vocabulary), f"a vocabulary of {len(vocabulary)} became one of {len(tokenizer)}"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    return tokenizer


def source_documents(
    inputs: list[str], builtins: list[str], field: str | None, manifest: Path | None
) -> Callable[[], Iterator[str]]:
    """What gives the documents of text inputs, or of a manifest's shards; documents that cannot be read are left out.

    Raises:
        UserError: Both or neither kind of input; from the function given: an input or a block that cannot be read.
    """
    if bool(inputs or builtins) == bool(manifest):
        raise UserError("give either text INPUTs (or --builtin) or --manifest")
    if manifest:
        corpus = Manifest.read(manifest)
        corpus.check_files()
        return lambda: _manifest_documents(corpus, field or corpus.text_field or "text")
    parts = find_parts(find_sources(inputs, builtins))
    return lambda: (
        document
        for part in parts
        for _, document in read_part(part, field or "text")
        if not isinstance(document, LostDocument)
    )


def _manifest_documents(manifest: Manifest, field: str) -> Iterator[str]:
    for i, shard in enumerate(manifest.shards):
        path = manifest.shard_path(i)
        with path.open("rb") as file:
            for offset, length, crc32 in zip(shard.offsets, shard.lengths, shard.crc32, strict=True):
                file.seek(int(offset))
                block = file.read(int(length))
                if zlib.crc32(block) != crc32:
                    raise UserError(f"shard {path}: the block at byte {offset} differs from the manifest's checksum")
                try:
                    for member in iter_members(block, base=int(offset)):
                        for document in read_documents(member.name, member.data, field):
                            if not isinstance(document, LostDocument):
                                yield document
                except (TarError, MemberError) as error:
                    raise UserError(f"shard {path}: the block at byte {offset} cannot be read: {error}") from error


def save(tokenizer: "PreTrainedTokenizerFast", output: Path, *, overwrite: bool = False) -> bool:
    """Save a tokenizer for `AutoTokenizer.from_pretrained` and check that it comes back the same.

    Returns:
        Whether files were written; False when the same ones were there.

    Raises:
        UserError: Another tokenizer is there and `overwrite` is false, or the directory cannot be written.
    """
    from transformers import AutoTokenizer

    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".tokenizer-") as temporary:
            tokenizer.save_pretrained(temporary)
            again = AutoTokenizer.from_pretrained(temporary, local_files_only=True)
            assert again.get_vocab() == tokenizer.get_vocab() and len(again) == len(tokenizer)
            names = sorted(os.listdir(temporary))
            equal, _, _ = filecmp.cmpfiles(temporary, output, names, shallow=False)
            if len(equal) == len(names):
                return False
            if (output / "tokenizer.json").exists() and not overwrite:
                raise UserError(f"--output {output} holds another tokenizer; give another directory, or --overwrite")
            for name in names:
                os.replace(Path(temporary, name), output / name)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text files (.txt .md .rst .jsonl, also .gz .zst), directories, globs",
    )
    add("--builtin", action="append", default=[], choices=BUILTINS, help="text that every Python carries; no download")
    add("--manifest", type=Path, help="train on these shards instead: a manifest.json of `mlm-dist prepare` or `index`")
    add("--output", type=Path, required=True, help="directory to save in")
    add("--vocab-size", type=int, required=True, help="entries; a multiple of 64 is quickest on a GPU")
    add("--cased", action="store_true", help="keep case and accents (default: as bert-base-uncased)")
    add("--min-frequency", type=int, default=2, help="how often a pair must occur (default: %(default)s)")
    add("--field", help="field of JSON records that is the text (default: the manifest's, else text)")
    add("--overwrite", action="store_true", help="replace another tokenizer in the directory")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    documents = source_documents(args.inputs, args.builtin, args.field, args.manifest)
    lowercase = not args.cased
    vocabulary = train_vocabulary(documents, args.vocab_size, lowercase=lowercase, min_frequency=args.min_frequency)
    written = save(make_tokenizer(vocabulary, lowercase=lowercase), args.output, overwrite=args.overwrite)
    print(f"{args.output}: {len(vocabulary)} entries" + ("" if written else ", as they were there already"))
    if len(vocabulary) < args.vocab_size:
        print(f"the text has no more to offer: {args.vocab_size} were asked for; the model needs {len(vocabulary)}")
    return 0
