"""The tokenizer as the data path sees it: text in, content ids out, and the few ids that have a role."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlm_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Backend = Literal["auto", "hf", "nano"]

# ruff: noqa: RUF001
# What tokenizers disagree on first, where one is not the other: accents, case, width, white space and control characters, scripts without spaces, very long
# words, special tokens spelled out.
PROBES = (
    "",
    " \t\n\u00a0\u2003 \u200b",
    "Café CAFÉ cafe\u0301 naïve Ångström ﬁ ﬄ ½ ²",
    "İstanbul ı ẞ ß ς Σ ǅ Ω Ω",
    "中文字符 mixed 漢字とかな한국어 ไทย हिन्दी العربية עברית",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [mask] [unused5] ##ing <s>",
    "a\x00b\x07c\ufffdd\ufeffe\u00adf\u2028g\u202eh",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ∑∫√ ﷽ \U0001d49c \U000e0041",
    "don't rock-n-roll e.g. 3.14159 1,000,000 $5.00 user@example.com https://example.com/a?b=c&d=e#f",
    "x" * 99 + " " + "y" * 100 + " " + "z" * 101 + " " + "é" * 100 + "w" * 5000,
    "¡¿«»„“”‘’—–…·•†‡§¶©®™°±×÷|~`^_\\{}<>",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A transformers fast tokenizer reduced to what workers need; picklable.

    Two libraries can do the work, with the same result: `tokenizers`, the reference, and nanotoken, many times faster, which ``choose_backend`` takes
    after it has seen that they agree.

    Attributes:
        backend: the ``tokenizers.Tokenizer``, without truncation, padding or special-token parsing: a text that contains ``[SEP]`` is text.
        special: sorted int64 ids of every special token, [UNK] included: never masked, never a random replacement.
        ordinary: int64 ids that a random replacement may be: all but the special tokens and BERT's ``[unusedN]`` slots.
        vocab_size: ``len(tokenizer)``.
        fingerprint: SHA-256 hex over the tokenizer's definition and special ids.
        dtype: the narrowest of uint16 and uint32 that holds an id.
        continues: bool [vocab_size], True for tokens that go on with a word (see ``_continues``); None where the vocabulary has no such marks.
        nano: nanotoken's ``WordPieceTokenizer``, or None for `tokenizers`.
    """

    backend: Any
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special: np.ndarray
    ordinary: np.ndarray
    vocab_size: int
    fingerprint: str
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.uint16))
    continues: np.ndarray | None = None
    nano: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "nano": self.nano is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__["nano"] = _nano(self) if state["nano"] else None

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Content ids of the texts without special tokens: (flat ids [T] of ``dtype``, int64 offsets [len(texts) + 1])."""
        if self.nano is not None:
            # In this thread: a pool of threads would not live through the fork of a loader worker.
            ids, offsets = self.nano.encode_batch(texts, add_special_tokens=False, parallel=False)
            return ids.astype(self.dtype), offsets
        self.backend.encode_special_tokens = True  # pickling, on the way to a loader worker, forgets it
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(e) for e in encodings], out=offsets[1:])
        ids = np.empty(int(offsets[-1]), self.dtype)
        for i, encoding in enumerate(encodings):
            ids[offsets[i] : offsets[i + 1]] = encoding.ids
        return ids, offsets

    def decode_token(self, token_id: int) -> str:
        """The vocabulary's string for one id."""
        return self.backend.id_to_token(int(token_id)) or f"<{token_id}>"


def load_pretrained(name_or_path: str, *, key: str = "data.tokenizer") -> "PreTrainedTokenizerFast":
    """The transformers fast tokenizer of a local directory or a hub name, which the key or flag `key` gave.

    Raises:
        UserError: it cannot be loaded, has no fast form, or lacks one of [CLS] [SEP] [PAD] [MASK] [UNK].
    """
    from transformers import AutoTokenizer

    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    path = Path(name_or_path).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(
            f"{key}: {name_or_path!r} is not a directory. Give a directory in transformers' format (mlm-dist tokenizer makes one) or a hub name."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name_or_path,
            use_fast=True,
            trust_remote_code=False,  # else transformers asks, at a terminal, whether to run what comes with it
        )
    except Exception as error:
        raise UserError(
            f"{key}: {name_or_path!r} could not be loaded ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Give a directory in transformers' format (mlm-dist tokenizer makes one) or a hub name that this machine can reach or has cached."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}: {name_or_path!r} has no fast (tokenizers) form; give one with a tokenizer.json.")
    missing = [n for n in ("cls", "sep", "pad", "mask", "unk") if getattr(tokenizer, f"{n}_token_id") is None]
    if missing:
        raise UserError(
            f"{key}: {name_or_path!r} has no {', '.join(missing)} token; a masked-language model's has all of cls, sep, pad, mask, unk."
        )
    return tokenizer


def from_pretrained(tokenizer: "PreTrainedTokenizerFast") -> TextTokenizer:
    """Reduce a transformers fast tokenizer to a ``TextTokenizer``."""
    # One thread: the parallelism is over loader workers, and the library warns of every fork after a parallel call.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    definition = backend.to_str()
    vocab_size = len(tokenizer)
    vocab = tokenizer.get_vocab()
    special = np.unique(np.asarray(tokenizer.all_special_ids, np.int64))
    unused = [i for token, i in vocab.items() if token.startswith("[unused") and token.endswith("]")]
    ordinary = np.setdiff1d(
        np.asarray(sorted(vocab.values()), np.int64),
        np.concatenate([special, np.asarray(unused, np.int64)]),
    )
    if not len(ordinary):
        raise UserError(
            f"data.tokenizer: {tokenizer.name_or_path!r} has no ordinary token, only {vocab_size} special ones."
        )
    return TextTokenizer(
        backend=backend,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        special=special,
        ordinary=ordinary,
        vocab_size=vocab_size,
        fingerprint=hashlib.sha256(f"{definition}|{special.tolist()}".encode()).hexdigest(),
        dtype=np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32),
        continues=_continues(json.loads(definition), vocab, vocab_size),
    )


def _continues(definition: dict[str, Any], vocab: dict[str, int], vocab_size: int) -> np.ndarray | None:
    """WordPiece marks what goes on with a word (``##``); byte-level BPE (RoBERTa, ModernBERT) and SentencePiece (XLM-RoBERTa) mark what begins one, by the
    white space before it, so that there a word is what white space separates, punctuation included (as fairseq masks whole words).
    """
    model = definition["model"]
    table = np.zeros(max(vocab_size, max(vocab.values()) + 1), bool)
    prefix = model.get("continuing_subword_prefix")
    if model.get("type") == "WordPiece" and prefix:
        table[[i for token, i in vocab.items() if token.startswith(prefix) and token != prefix]] = True
        return table
    begins = _white_space(definition.get("pre_tokenizer") or {})
    if model.get("type") not in ("BPE", "Unigram") or not begins:
        return None
    added = {token["id"] for token in definition["added_tokens"]}  # spelled as they are: words of their own
    table[[i for token, i in vocab.items() if not token.startswith(begins) and i not in added]] = True
    return table


def _white_space(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    """How tokens after this pre-tokenizer spell white space; empty where it does not tell."""
    if pre_tokenizer.get("type") == "Sequence":
        return tuple(mark for part in pre_tokenizer["pretokenizers"] for mark in _white_space(part))
    if pre_tokenizer.get("type") == "ByteLevel":
        return tuple("ĠĉĊċČč")  # bytes 32 and 9 to 13
    return (pre_tokenizer["replacement"],) if pre_tokenizer.get("type") == "Metaspace" else ()


def _nano(tokenizer: TextTokenizer) -> Any:
    """The same tokenizer in nanotoken. Raises ImportError, or ValueError for one that it cannot be."""
    from nanotoken import WordPieceTokenizer

    definition = json.loads(tokenizer.backend.to_str())
    # As with `encode_special_tokens`: text that spells a special token is text.
    definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["special"]]
    return WordPieceTokenizer.from_json(json.dumps(definition))


def choose_backend(tokenizer: TextTokenizer, backend: Backend, texts: Sequence[str]) -> tuple[TextTokenizer, str]:
    """The tokenizer with the back end that ``data.tokenizer_backend`` asks for, and why it is not the fast one ("" when it is, or was not wanted).

    Args:
        tokenizer: as ``from_pretrained`` gave it: the reference.
        backend: ``hf`` takes the reference; ``nano`` and ``auto`` take nanotoken if it gives the same ids on ``texts`` and on ``PROBES``.
        texts: from the run's own data; the same on all ranks, since the answer must be.

    Raises:
        UserError: ``nano`` was asked for and is not installed.
    """
    if backend == "hf":
        return tokenizer, ""
    try:
        fast = replace(tokenizer, nano=_nano(tokenizer))
    except ImportError as error:
        if backend == "nano":
            raise UserError(
                "data.tokenizer_backend: nano needs the package nanotoken (pip install 'mlm-dist[fast]'); or set it to auto or hf."
            ) from error
        return tokenizer, "nanotoken is not installed (pip install 'mlm-dist[fast]')"
    except ValueError as error:
        return tokenizer, f"nanotoken cannot do this tokenizer ({' '.join(str(error).split())})"
    for part in (list(PROBES), list(texts)):
        (ids, offsets), (wanted, wanted_offsets) = fast.encode(part), tokenizer.encode(part)
        if not (np.array_equal(offsets, wanted_offsets) and np.array_equal(ids, wanted)):
            return tokenizer, f"nanotoken and transformers differ on {_difference(fast, tokenizer, part)!r}"
    return fast, ""


def _difference(one: TextTokenizer, other: TextTokenizer, texts: Sequence[str]) -> str:
    """The first word on which they differ, or else the beginning of the first text."""
    text = next((t for t in texts if not np.array_equal(one.encode([t])[0], other.encode([t])[0])), texts[0])
    word = next((w for w in text.split() if not np.array_equal(one.encode([w])[0], other.encode([w])[0])), text)
    return word[:80]


def load(name_or_path: str) -> TextTokenizer:
    """``from_pretrained(load_pretrained(name_or_path))``."""
    return from_pretrained(load_pretrained(name_or_path))
