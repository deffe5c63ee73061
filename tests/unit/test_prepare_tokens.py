"""`mlm-dist prepare --tokenizer`: shards of token ids."""

import argparse
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mlm_dist.data import prepare as command
from mlm_dist.data.archive import block_documents
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.prepare import prepare
from mlm_dist.data.prepare_options import PrepareOptions
from mlm_dist.data.tokenizer import TextTokenizer, load
from mlm_dist.data.train_tokenizer import SPECIAL_TOKENS, make_tokenizer, save
from mlm_dist.data.verify import verify
from mlm_dist.errors import UserError
from mlm_dist.storage.store import Store
from tests.unit.test_prepare import documents, files

WORDS = [f"w{i}" for i in range(50)]
TEXTS = [" ".join(WORDS[i * j % 50] for j in range(1 + i % 40)) + f" w{i % 50}" for i in range(600)]
OPTIONS = {"split_by": "line", "shard_size": 8000, "val_fraction": 0.1, "documents_per_member": 8}


def make(directory: Path, entries: list[str]) -> str:
    characters = sorted({character for entry in entries for character in entry})
    names = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters), *entries]
    save(make_tokenizer({name: i for i, name in enumerate(dict.fromkeys(names))}), directory)
    return str(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("tokenizer"), WORDS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    # A soft hyphen is no token; a special token spelled out is text.
    path.write_text("\n".join([*TEXTS, "\u00ad", "w1 [SEP] w2 [CLS]"]))
    return path


def token_documents(manifest: Manifest) -> list[list[int]]:
    found = []
    for i, shard in enumerate(manifest.shards):
        content = manifest.shard_path(i).read_bytes()
        for offset, length, count in zip(shard.offsets, shard.lengths, shard.documents, strict=True):
            block = content[offset : offset + length]
            ids = list(block_documents(block, shard.path, ids=manifest.token_ids))
            assert len(ids) == count and all(isinstance(one, np.ndarray) for one in ids)
            found += [one.tolist() for one in ids if isinstance(one, np.ndarray)]
    return found


@pytest.mark.parametrize("compress", ["none", "zst"])
def test_the_ids_of_the_text_in_its_order(corpus: Path, tokenizer: str, tmp_path: Path, compress: str) -> None:
    made = load(tokenizer)
    text, _ = prepare([str(corpus)], tmp_path / "text", PrepareOptions(**OPTIONS))
    options = PrepareOptions(**OPTIONS, tokenizer=tokenizer, compress=compress)  # type: ignore[arg-type]
    ids, written = prepare([str(corpus)], tmp_path / "ids", options)
    assert written and len(ids["train"].shards) >= 2
    for side, manifest in ids.items():
        texts = [document for document in documents(text[side]) if document != "\u00ad"]
        flat, offsets = made.encode(texts)
        expected = [flat[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert token_documents(manifest) == expected and manifest.num_documents == len(texts)
        assert Manifest.read(tmp_path / "ids" / command.MANIFESTS[side]).tokenizer == made.fingerprint
    assert sum(manifest.num_documents for manifest in ids.values()) == 601
    assert verify(ids["train"], Store(tmp_path / "ids")) == []
    assert prepare([str(corpus)], tmp_path / "ids", options)[1] is False


def test_members_are_plain_arrays(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    options = PrepareOptions(**OPTIONS, tokenizer=tokenizer)  # type: ignore[arg-type]
    prepare([str(corpus)], tmp_path / "ids", options)
    made = load(tokenizer)
    with tarfile.open(tmp_path / "ids" / "train-00000.tar") as tar:
        names = tar.getnames()
        arrays = [np.load(io.BytesIO(tar.extractfile(name).read()), allow_pickle=False) for name in names]  # type: ignore[union-attr]
    assert all(name.endswith(".npy") for name in names)
    for array in arrays:
        assert array.dtype == np.uint16 and array.ndim == 1 and array[-1] == made.sep_id
        assert 1 <= (array == made.sep_id).sum() <= 8 and made.cls_id not in array
    zipped = PrepareOptions(**OPTIONS, tokenizer=tokenizer, compress="zst")  # type: ignore[arg-type]
    prepare([str(corpus)], tmp_path / "zst", zipped)
    with tarfile.open(tmp_path / "zst" / "train-00000.tar") as tar:
        first = tar.extractfile(tar.getnames()[0])
        assert first is not None and tar.getnames()[0].endswith(".npy.zst")
        array = np.load(io.BytesIO(zstandard.decompress(first.read())))
    assert array.dtype == np.uint16


def test_a_large_vocabulary_needs_wider_ids(tmp_path: Path) -> None:
    tokenizer = make(tmp_path / "tokenizer", [f"x{i}" for i in range(66_000)])
    (tmp_path / "a.txt").write_text("x65999 x1\nx2")
    options = PrepareOptions(split_by="line", val_fraction=0, tokenizer=tokenizer)
    manifests, _ = prepare([str(tmp_path / "a.txt")], tmp_path / "out", options)
    assert sorted(map(len, token_documents(manifests["train"]))) == [1, 2]
    assert max(token_documents(manifests["train"]), key=len)[0] > 1 << 16
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        member = tar.extractfile(tar.getnames()[0])
        assert member is not None and np.load(io.BytesIO(member.read())).dtype == np.uint32


def test_same_bytes_whatever_the_workers(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    options = PrepareOptions(**OPTIONS, tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            ("sources", "_PART_BYTES"),
            ("reading", "_MIN_UNIT_BYTES"),
            ("reading", "_MAX_UNIT_BYTES"),
        ):
            patch.setattr(f"mlm_dist.data.{module}.{name}", 9000)
        prepare([str(corpus)], tmp_path / "two", options, workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlm_dist.data.reading._ENCODE_CHARACTERS", 100)
        prepare([str(corpus)], tmp_path / "one", options)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_another_tokenizer_is_another_output(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    options = PrepareOptions(**OPTIONS, tokenizer=tokenizer)  # type: ignore[arg-type]
    prepare([str(corpus)], tmp_path / "out", options)
    other = PrepareOptions(**OPTIONS, tokenizer=make(tmp_path / "other", WORDS[:40]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"made with other options: tokenizer was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        prepare([str(corpus)], tmp_path / "out", other)
    with pytest.raises(UserError, match=r"made with other options: tokenizer was '[0-9a-f]{64}', is None"):
        prepare([str(corpus)], tmp_path / "out", PrepareOptions(**OPTIONS))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^--tokenizer: './nowhere' is not a directory"):
        prepare([str(corpus)], tmp_path / "out", PrepareOptions(tokenizer="./nowhere"))


def test_text_that_becomes_a_special_token_is_lost(
    corpus: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextTokenizer.encode

    def with_separator(self: TextTokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = encode(self, texts)
        ids[offsets[3]] = self.sep_id
        return ids, offsets

    monkeypatch.setattr(TextTokenizer, "encode", with_separator)
    options = PrepareOptions(**OPTIONS, tokenizer=tokenizer)  # type: ignore[arg-type]
    manifests, _ = prepare([str(corpus)], tmp_path / "out", options)
    info = manifests["train"].info
    place = sum(len(text) + 1 for text in TEXTS[:3])
    assert info["lost_documents"] == 1
    assert info["lost"] == [f"text.txt at {place}: the tokenizer makes a special token of its text"]


def test_the_command(corpus: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = [
        str(corpus),
        "--output",
        str(tmp_path / "out"),
        "--split-by",
        "line",
        "--tokenizer",
        tokenizer,
        "--workers",
        "1",
    ]
    assert command.run(parser.parse_args(flags)) == 0
    assert "manifest.json: " in capsys.readouterr().out
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["info"]["options"]
    assert options["tokenizer"] == load(tokenizer).fingerprint and "dedup" not in options
