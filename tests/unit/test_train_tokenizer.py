import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlm_dist.data import train_tokenizer as command
from mlm_dist.data.prepare import prepare
from mlm_dist.data.shuffle import PrepareOptions
from mlm_dist.data.sources import find_sources
from mlm_dist.data.train_tokenizer import (
    SPECIAL_TOKENS,
    make_tokenizer,
    manifest_documents,
    save,
    source_documents,
    train_vocabulary,
)
from mlm_dist.errors import UserError

SIZE = 700


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = [
        "Königin",
        "running",
        "runner",
        "café",
        "tokenization",
        "日本語",
        "unaffable",
        "Straße",
        "index",
        "indices",
    ]
    path.write_text("\n".join(" ".join(words[i % n :]) for i in range(200) for n in (3, 7, 10)), encoding="utf-8")
    return path


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_reloads_with_its_length_and_special_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    assert run("--builtin", "python-docs", "--vocab-size", SIZE, "--output", tmp_path / "t") == 0
    assert f"{SIZE} entries" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t", local_files_only=True)
    assert tokenizer.is_fast and len(tokenizer) == SIZE == tokenizer.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZE))
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [*ids, tokenizer.mask_token_id] == [0, 1, 2, 3, 4] and sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 4]
    encoded = tokenizer("The Statement [MASK] raises").input_ids
    assert encoded[0] == 2 and encoded[-1] == 3 and 4 in encoded and 1 not in encoded
    assert tokenizer("statement").input_ids == tokenizer("STATEMENT").input_ids
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


def test_case_and_accents(text: Path, tmp_path: Path) -> None:
    documents = source_documents(find_sources([str(text)]))
    for lowercase in (True, False):
        vocabulary = train_vocabulary(documents, 200, lowercase=lowercase)
        tokenizer = make_tokenizer(vocabulary, lowercase=lowercase)
        save(tokenizer, tmp_path / str(lowercase))
        tokens = tokenizer.tokenize("Königin café 日本")
        assert "[UNK]" not in tokens
        joined = tokenizer.convert_tokens_to_string(tokens).replace(" ", "")
        assert joined == ("konigincafe日本" if lowercase else "Königincafé日本")


def test_the_same_in_every_process_and_from_shards(tmp_path: Path) -> None:
    # tokenizers' own trainer gives another vocabulary in each process on this text.
    prepare([], tmp_path, PrepareOptions(val_fraction=0), builtins=["python-docs"])
    program = (
        "import sys; from pathlib import Path; from mlm_dist.data.train_tokenizer import *\n"
        "builtin, manifest = sys.argv[1:]\n"
        "documents = manifest_documents(manifest) if manifest else source_documents(find_sources([], [builtin]))\n"
        "print(sorted(train_vocabulary(documents, 2048).items()))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, *source], capture_output=True, text=True, timeout=120, check=True
        ).stdout
        for source in (["python-docs", ""], ["python-docs", ""], ["", str(tmp_path / "manifest.json")])
    ]
    assert outputs[0] == outputs[1] == outputs[2] and "'[MASK]', 4" in outputs[0]


def test_small_alphabets_leave_out_the_rarest() -> None:
    def documents():  # type: ignore[no-untyped-def]
        yield "".join(chr(0x4E00 + i) * (i + 1) for i in range(200))

    vocabulary = train_vocabulary(documents, 5 + 4 * 20)
    kept = {token for token in vocabulary if len(token) == 1}
    assert kept == {chr(0x4E00 + i) for i in range(180, 200)}


def test_what_is_refused(text: Path, tmp_path: Path) -> None:
    documents = source_documents(find_sources([str(text)]))
    with pytest.raises(UserError, match="--vocab-size is 20; it must be at least 69"):
        train_vocabulary(documents, 20)
    with pytest.raises(UserError, match="no text"):
        train_vocabulary(lambda: iter(["  \n"]), 1000)
    for arguments in ([], [text, "--manifest", tmp_path / "manifest.json"]):
        with pytest.raises(UserError, match="give either"):
            run(*arguments, "--vocab-size", 100, "--output", tmp_path)


def test_a_damaged_shard_is_named(text: Path, tmp_path: Path) -> None:
    prepare([str(text)], tmp_path, PrepareOptions(split_by="line", val_fraction=0))
    shard = tmp_path / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.tar: the block at byte 0 cannot be read"):
        list(manifest_documents(str(tmp_path / "manifest.json"))())


def test_running_again(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tmp_path.iterdir())}

    run(text, "--vocab-size", 80, "--output", tmp_path)
    before = state()
    run(text, "--vocab-size", 80, "--output", tmp_path)
    assert state() == before and "as they were" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another tokenizer"):
        run(text, "--vocab-size", 90, "--output", tmp_path)
    assert state() == before
    run(text, "--vocab-size", 90, "--output", tmp_path, "--overwrite")
    assert state().keys() == before.keys() and state() != before


def test_a_small_corpus_gives_what_it_has(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(text, "--vocab-size", 5000, "--output", tmp_path) == 0
    have = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    assert have < 5000 and f"the model needs {have}" in capsys.readouterr().out
