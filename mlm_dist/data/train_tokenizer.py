"""`mlm-dist tokenizer`: train a BERT WordPiece vocabulary and save it in transformers' format."""

import argparse
import filecmp
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_dist.data.archive import block_documents
from mlm_dist.data.documents import read_part
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import LostDocument, MemberError
from mlm_dist.data.sources import (
    BUILTINS,
    INPUTS_HELP,
    Source,
    add_dataset_arguments,
    find_parts,
    find_sources,
    sources_of,
)
from mlm_dist.data.tar import TarError
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store, StoreError

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


def source_documents(sources: Sequence[Source], field: str = "text") -> Callable[[], Iterator[str]]:
    """What gives the documents of sources; those that cannot be read are left out.

    Raises:
        UserError: From the function given: a source that cannot be read.
    """
    parts = find_parts(sources)
    return lambda: (
        document for part in parts for _, document in read_part(part, field) if not isinstance(document, LostDocument)
    )


def manifest_documents(path: str, field: str | None = None, *, allow_pipe: bool = False) -> Callable[[], Iterator[str]]:
    """What gives the documents of a manifest's shards; those that cannot be read are left out.

    Args:
        path: The manifest, a file or at a URL.
        field: Field of JSON members that is the text; None takes what the manifest says, else `text`.
        allow_pipe: Let shards be `pipe:COMMAND`.

    Raises:
        UserError: Shards that are missing, or of token ids; from the function given: a block that cannot be read.
    """
    manifest = Manifest.read(path)
    if manifest.token_ids is not None:
        raise UserError(f"--manifest {path}: its shards hold token ids; give the text that they were made of")
    store = Store(manifest.root, allow_pipe=allow_pipe)
    manifest.check_files(store=store)
    return lambda: _manifest_documents(manifest, store, field or manifest.text_field or "text")


def _manifest_documents(manifest: Manifest, store: Store, field: str) -> Iterator[str]:
    for shard in manifest.shards:
        for offset, length, crc32 in zip(shard.offsets, shard.lengths, shard.crc32, strict=True):
            try:
                block = store.read(shard.path, int(offset), int(length), int(crc32))
                for document in block_documents(block, shard.path, field, base=int(offset)):
                    if isinstance(document, str):
                        yield document
            except (StoreError, TarError, MemberError) as error:
                where = manifest.where(shard)
                raise UserError(f"shard {where}: the block at byte {offset} cannot be read: {error}") from error


def save(
    tokenizer: "PreTrainedTokenizerFast",
    output: Path,
    *,
    more: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> bool:
    """Save a tokenizer for `AutoTokenizer.from_pretrained` and check that it comes back the same.

    Args:
        tokenizer: The tokenizer.
        output: The directory.
        more: Further files, name -> text, that belong to it.
        overwrite: Replace another tokenizer that is there.

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
            for name, content in (more or {}).items():
                Path(temporary, name).write_text(content, encoding="utf-8")
            again = AutoTokenizer.from_pretrained(temporary, local_files_only=True, trust_remote_code=False)
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
        help=INPUTS_HELP,
    )
    add("--builtin", action="append", default=[], choices=BUILTINS, help="text that every Python carries; no download")
    add_dataset_arguments(parser)
    add(
        "--manifest", help="train on these shards instead: a manifest.json of `mlm-dist prepare` or `index`, or its URL"
    )
    add("--allow-pipe", action="store_true", help="run the commands that --manifest names as pipe:COMMAND")
    add("--output", type=Path, required=True, help="directory to save in")
    add("--vocab-size", type=int, required=True, help="entries; a multiple of 64 is quickest on a GPU")
    add("--cased", action="store_true", help="keep case and accents (default: as bert-base-uncased)")
    add("--min-frequency", type=int, default=2, help="how often a pair must occur (default: %(default)s)")
    add(
        "--field",
        help="field of JSON records, or column of tables, that is the text (default: the manifest's, else text)",
    )
    add("--overwrite", action="store_true", help="replace another tokenizer in the directory")


def run(args: argparse.Namespace) -> int:
    """Run the command; give its exit code."""
    if bool(args.inputs or args.builtin or args.dataset) == bool(args.manifest):
        raise UserError("give either text INPUTs (or --builtin, --dataset) or --manifest")
    if args.manifest:
        documents = manifest_documents(args.manifest, args.field, allow_pipe=args.allow_pipe)
    else:
        field = args.field or "text"
        documents = source_documents(find_sources(**sources_of(args), field=field), field)
    lowercase = not args.cased
    vocabulary = train_vocabulary(documents, args.vocab_size, lowercase=lowercase, min_frequency=args.min_frequency)
    written = save(make_tokenizer(vocabulary, lowercase=lowercase), args.output, overwrite=args.overwrite)
    print(f"{args.output}: {len(vocabulary)} entries" + ("" if written else ", as they were there already"))
    if len(vocabulary) < args.vocab_size:
        print(f"the text has no more to offer: {args.vocab_size} were asked for; the model needs {len(vocabulary)}")
    return 0
