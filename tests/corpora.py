"""Small corpora for the tests: shards, manifest and a tokenizer, made in milliseconds and the same every time."""

import io
import json
import random
import tarfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlm_dist.data.manifest import Manifest, Shard
from mlm_dist.data.tar import iter_members

WORDS = [
    "the", "of", "and", "a", "to", "in", "is", "was", "it", "for", "with", "as", "his", "on", "be", "at", "by", "had", "not", "are",
    "but", "from", "or", "have", "an", "they", "which", "one", "you", "were", "her", "all", "she", "there", "would", "their", "we",
    "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said", "what", "up", "its", "about", "into",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(path: Path) -> Path:
    """A fast BERT tokenizer over WORDS and the digits; ids 0 to 4 are special, 5 is an unused slot."""
    vocab = {
        token: i
        for i, token in enumerate([*SPECIAL, "[unused0]", *WORDS, *"0123456789", *[f"##{d}" for d in "0123456789"]])
    }
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.save_pretrained(path)
    return path


def documents(n: int, seed: int = 0, longest: int = 120) -> list[str]:
    """n different documents of 1 to ``longest`` words; each begins with its number."""
    rng = random.Random(seed)
    return [
        " ".join([str(i), *rng.choices(WORDS, weights=range(len(WORDS), 0, -1), k=rng.randint(1, longest))])
        for i in range(n)
    ]


def save_corpus(
    root: Path,
    texts: Sequence[str],
    shards: int = 3,
    per_member: int = 4,
    members_per_block: int = 1,
    name: str = "manifest.json",
    field: str = "text",
) -> Path:
    """Write the texts as .jsonl members over ``shards`` tars of unequal size; returns the manifest's path."""
    root.mkdir(parents=True, exist_ok=True)
    weights = np.arange(1, shards + 1)
    cuts = np.concatenate([[0], np.cumsum(weights) * len(texts) // weights.sum()])
    made = []
    for s in range(shards):
        part = texts[cuts[s] : cuts[s + 1]]
        path = root / f"{Path(name).stem}-{s:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for m in range(0, len(part), per_member):
                payload = "".join(json.dumps({field: text}) + "\n" for text in part[m : m + per_member]).encode()
                info = tarfile.TarInfo(f"{m:06d}.jsonl")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        content = path.read_bytes()
        spans = [(m.start, m.end, bytes(m.data).count(b"\n")) for m in iter_members(content, whole=True)]
        groups = [spans[i : i + members_per_block] for i in range(0, len(spans), members_per_block)]
        blocks = [(g[0][0], g[-1][1] - g[0][0], sum(x[2] for x in g)) for g in groups]
        made.append(
            Shard(
                path=path.name,
                size=len(content),
                sha256=sha256(content).hexdigest(),
                offsets=np.asarray([b[0] for b in blocks], np.int64),
                lengths=np.asarray([b[1] for b in blocks], np.int64),
                documents=np.asarray([b[2] for b in blocks], np.int64),
                crc32=np.asarray([zlib.crc32(content[o : o + n]) for o, n, _ in blocks], np.uint32),
            )
        )
    Manifest(root, made, {}).write(root / name)
    return root / name
