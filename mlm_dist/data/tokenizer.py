"""The tokenizer as the data path sees it: text in, content ids out, and the few ids that have a role."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextTokenizer:
    """A transformers fast tokenizer reduced to what workers need; picklable.

    Attributes:
        backend: the ``tokenizers.Tokenizer``, without truncation, padding or special-token parsing: a text that contains ``[SEP]`` is text.
        special: sorted int64 ids of every special token, [UNK] included: never masked, never a random replacement.
        ordinary: int64 ids that a random replacement may be: all but the special tokens and BERT's ``[unusedN]`` slots.
        vocab_size: ``len(tokenizer)``.
        fingerprint: SHA-256 hex over the tokenizer's definition and special ids.
        dtype: the narrowest of uint16 and uint32 that holds an id.
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

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Content ids of the texts without special tokens: (flat ids [T] of ``dtype``, int64 offsets [len(texts) + 1])."""
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


def load_pretrained(name_or_path: str) -> "PreTrainedTokenizerFast":
    """The transformers fast tokenizer of a local directory or a hub name.

    Raises:
        UserError: it cannot be loaded, has no fast form, or lacks one of [CLS] [SEP] [PAD] [MASK] [UNK].
    """
    from transformers import AutoTokenizer

    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    path = Path(name_or_path).expanduser()
    if looks_local and not path.is_dir():
        raise UserError(
            f"data.tokenizer: {name_or_path!r} is not a directory. Give a directory in transformers' format (mlm-dist tokenizer makes one) or a hub name."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else name_or_path, use_fast=True)
    except Exception as error:
        raise UserError(
            f"data.tokenizer: {name_or_path!r} could not be loaded ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Give a directory in transformers' format (mlm-dist tokenizer makes one) or a hub name that this machine can reach or has cached."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer: {name_or_path!r} has no fast (tokenizers) form; give one with a tokenizer.json."
        )
    missing = [n for n in ("cls", "sep", "pad", "mask", "unk") if getattr(tokenizer, f"{n}_token_id") is None]
    if missing:
        raise UserError(
            f"data.tokenizer: {name_or_path!r} has no {', '.join(missing)} token; a BERT tokenizer has all of cls, sep, pad, mask, unk."
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
    special = np.unique(np.asarray(tokenizer.all_special_ids, np.int64))
    unused = [i for token, i in tokenizer.get_vocab().items() if token.startswith("[unused") and token.endswith("]")]
    ordinary = np.setdiff1d(
        np.asarray(sorted(tokenizer.get_vocab().values()), np.int64),
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
    )


def load(name_or_path: str) -> TextTokenizer:
    """``from_pretrained(load_pretrained(name_or_path))``."""
    return from_pretrained(load_pretrained(name_or_path))
