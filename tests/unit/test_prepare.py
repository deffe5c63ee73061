import argparse
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from mlm_dist.data import prepare as command
from mlm_dist.data.job import Share, open_job
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.members import read_documents
from mlm_dist.data.prepare import MANIFESTS, prepare
from mlm_dist.data.shuffle import PrepareOptions
from mlm_dist.data.tar import iter_members
from mlm_dist.errors import UserError

OPTIONS = ("split_by", "shard_size", "val_fraction", "documents_per_member")
SMALL = PrepareOptions(split_by="line", shard_size=100_000, val_fraction=0.1, documents_per_member=8)


def text(i: int) -> str:
    return f"document {i} " + " ".join(str(i * j * j % 97) for j in range(1 + i % 50))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 documents in 5 files of three kinds, of which the first 50 are there four times."""
    root = tmp_path_factory.mktemp("corpus")
    lines = [text(i) for i in range(4000)]
    for k in range(3):
        (root / f"{k}.txt").write_text("\n".join(lines[k * 1000 : (k + 1) * 1000] + lines[:50]))
    (root / "sub").mkdir()
    for k in (3, 4):
        some = lines[3000 + (k - 3) * 500 : 3500 + (k - 3) * 500]
        (root / "sub" / f"{k}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in some))
    return root


EXPECTED = Counter(text(i) for i in range(4000)) + Counter({text(i): 3 for i in range(50)})


def documents(manifest: Manifest) -> list[str]:
    found = []
    for i, shard in enumerate(manifest.shards):
        content = manifest.shard_path(i).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard.sha256
        for offset, length, count in zip(shard.offsets, shard.lengths, shard.documents, strict=True):
            texts = [
                document
                for member in iter_members(content[offset : offset + length])
                for document in read_documents(member.name, member.data)
                if isinstance(document, str)
            ]
            assert len(texts) == count
            found += texts
    return found


def files(output: Path) -> dict[str, str]:
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference")
    prepare([str(corpus)], output, SMALL)
    return output


@pytest.mark.parametrize("compress", ["none", "zst"])
def test_every_document_once_and_equal_ones_on_one_side(corpus: Path, tmp_path: Path, compress: Any) -> None:
    options = PrepareOptions(**{**vars(SMALL), "compress": compress})
    manifests, written = prepare([str(corpus)], tmp_path, options)
    assert written and sorted(files(tmp_path)) == sorted(
        [*MANIFESTS.values(), *(shard.path for manifest in manifests.values() for shard in manifest.shards)]
    )
    train, val = documents(manifests["train"]), documents(manifests["val"])
    assert Counter(train) + Counter(val) == EXPECTED
    assert not set(train) & set(val)
    assert 0.07 < len(val) / 4150 < 0.13
    for side, manifest in manifests.items():
        assert Manifest.read(tmp_path / MANIFESTS[side]).fingerprint == manifest.fingerprint
        assert [shard.path for shard in manifest.shards] == [f"{side}-{i:05d}.tar" for i in range(len(manifest.shards))]


def test_shuffled(reference: Path) -> None:
    manifest = Manifest.read(reference / "manifest.json")
    order = documents(manifest)
    numbers = [int(line.split()[1]) for line in order]
    assert numbers != sorted(numbers)
    # A shuffled sequence steps up about half of the time, and equal documents lie apart.
    ups = sum(a < b for a, b in itertools.pairwise(numbers)) / len(numbers)
    assert 0.45 < ups < 0.55
    assert sum(a == b for a, b in itertools.pairwise(order)) <= 3
    assert len(manifest.shards) >= 3
    sizes = [shard.size for shard in manifest.shards]
    assert max(sizes) < 2 * min(sizes)


def test_same_bytes_whatever_workers_input_order_and_place(corpus: Path, reference: Path, tmp_path: Path) -> None:
    expected = files(reference)
    one_by_one = sorted(str(path) for path in corpus.rglob("*.*"))[::-1]
    prepare([*one_by_one, str(corpus / "*.txt")], tmp_path / "order", SMALL)
    assert files(tmp_path / "order") == expected
    prepare([str(corpus)], tmp_path / "workers", SMALL, workers=3)
    assert files(tmp_path / "workers") == expected
    shutil.copytree(corpus, tmp_path / "copy")
    prepare([str(tmp_path / "copy")], tmp_path / "place", SMALL)
    assert files(tmp_path / "place") == expected
    prepare([str(corpus)], tmp_path / "seed", PrepareOptions(**{**vars(SMALL), "seed": 1}))
    other = Manifest.read(tmp_path / "seed" / "manifest.json")
    assert documents(other) != documents(Manifest.read(reference / "manifest.json"))


def test_many_tasks_and_parts_change_nothing(
    corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlm_dist.data import reading, sources, spill

    monkeypatch.setattr(sources, "_PART_BYTES", 5000)
    monkeypatch.setattr(reading, "_MIN_UNIT_BYTES", 40_000)
    monkeypatch.setattr(reading, "_MAX_UNIT_BYTES", 40_000)
    monkeypatch.setattr(spill, "_BUFFER_BYTES", 1000)
    for workers in (1, 3):
        prepare([str(corpus)], tmp_path / str(workers), SMALL, workers=workers)
        assert files(tmp_path / str(workers)) == files(reference)


def test_webdataset_reads_the_shards(reference: Path) -> None:
    manifest = Manifest.read(reference / "manifest.json")
    urls = [str(manifest.shard_path(i)) for i in range(len(manifest.shards))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    lines = [line for sample in samples for line in sample["jsonl"].splitlines()]
    assert [json.loads(line)["text"] for line in lines] == documents(manifest)


def test_blocks_are_as_many_as_the_corpus_allows(tmp_path: Path) -> None:
    manifests, _ = prepare([], tmp_path / "docs", PrepareOptions(), builtins=["python-docs"])
    lengths = manifests["train"].shards[0].lengths
    # Nearly every one of these long documents is a block.
    assert manifests["train"].num_blocks > 0.7 * manifests["train"].num_documents
    assert all(length <= 4096 for length in lengths if length < lengths.mean() / 2)
    options = PrepareOptions(**{**vars(SMALL), "block_size": 1024, "val_fraction": 0})
    (tmp_path / "x.txt").write_text("\n".join("word " * 40 for _ in range(1000)))
    manifests, _ = prepare([str(tmp_path / "x.txt")], tmp_path / "x", options)
    assert set(manifests) == {"train"} and not (tmp_path / "x" / "val.json").exists()
    assert manifests["train"].num_blocks == 1000


def start(corpus: Path, output: Path, workers: int) -> "subprocess.Popen[bytes]":
    program = (
        "import argparse, sys; from mlm_dist.data import prepare, shuffle\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser(); prepare.add_arguments(parser)\n"
        "    sys.exit(prepare.run(parser.parse_args()))"
    )
    script = output.with_suffix(".py")
    script.write_text(program)
    options = [f"--{name.replace('_', '-')}={getattr(SMALL, name)}" for name in OPTIONS]
    return subprocess.Popen(
        [sys.executable, str(script), str(corpus), "--output", str(output), *options, f"--workers={workers}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
    )


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("workers", "moment"),
    [(1, ".prepare-tmp/*"), (1, ".prepare-tmp/*/unit-*.spill"), (3, ".prepare-tmp/*/train-0000*.tar")],
)
def test_killed_and_run_again(corpus: Path, reference: Path, tmp_path: Path, workers: int, moment: str) -> None:
    output = tmp_path / "out"
    for _ in range(5):  # now and then it is too quick to be killed
        process = start(corpus, output, workers)
        deadline = time.monotonic() + 60
        while not any(output.glob(moment)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait(timeout=30)
        if not (output / "manifest.json").exists():
            break
        shutil.rmtree(output)
    assert len(children) >= workers > 1 or workers == 1
    deadline = time.monotonic() + 30
    while any(running(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.01)
    assert not (output / "manifest.json").exists()
    process = start(corpus, output, workers)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and b"train-" not in out
    assert files(output) == files(reference)


class Crash(BaseException):
    pass


def at_call(call: int, function: Callable[..., Any], action: Callable[[], None]) -> Callable[..., Any]:
    """The function, which does `action` before one of its calls."""
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*arguments, **options)

    return wrapped


def crash() -> None:
    raise Crash


def crash_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    return at_call(call, function, crash)


def test_crash_at_every_rename(tmp_path: Path) -> None:
    inputs = [str(tmp_path / "few.txt")]
    Path(inputs[0]).write_text("\n".join(text(i) for i in range(100)))
    options = PrepareOptions(**{**vars(SMALL), "shard_size": 5000})
    prepare(inputs, tmp_path / "whole", options)
    expected = files(tmp_path / "whole")
    assert len(expected) >= 4
    prepare(inputs, tmp_path / "old", PrepareOptions(**{**vars(options), "seed": 5}))
    old = Manifest.read(tmp_path / "old" / "manifest.json").fingerprint
    for overwrite in (False, True):
        crashed = 0
        for call in itertools.count(1):
            output = tmp_path / f"{overwrite}-{call}"
            if overwrite:
                shutil.copytree(tmp_path / "old", output)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "replace", crash_at(call, os.replace))
                try:
                    prepare(inputs, output, options, overwrite=overwrite)
                    break
                except Crash:
                    crashed += 1
            if (output / "manifest.json").exists():  # then what was there before is whole
                before = Manifest.read(output / "manifest.json")
                before.check_files()
                assert overwrite and before.fingerprint == old
            prepare(inputs, output, options, overwrite=overwrite)
            assert files(output) == expected
            shutil.rmtree(output)
        assert crashed >= 2 * len(expected)  # markers, shards, moves, manifests


def test_run_again_when_finished(corpus: Path, tmp_path: Path) -> None:
    inputs = [str(shutil.copytree(corpus, tmp_path / "in"))]
    output = tmp_path / "out"
    _, written = prepare(inputs, output, SMALL)
    before = files(output)
    same, again = prepare(inputs, output, SMALL, workers=2)
    assert written and not again and set(same) == {"train", "val"} and files(output) == before
    other = PrepareOptions(**{**vars(SMALL), "seed": 5, "compress": "zst"})
    with pytest.raises(
        UserError, match=r"other options: seed was 0, is 5, compress was 'none', is 'zst'; .*--overwrite"
    ):
        prepare(inputs, output, other)
    (tmp_path / "in" / "new.txt").write_text("new text")
    with pytest.raises(UserError, match="other sources: files was 5, is 6"):
        prepare(inputs, output, SMALL)
    (tmp_path / "in" / "new.txt").unlink()
    os.utime(tmp_path / "in" / "0.txt", (time.time() + 100, time.time() + 100))
    with pytest.raises(UserError, match=r"is older than the input .*0\.txt"):
        prepare(inputs, output, SMALL)
    os.utime(tmp_path / "in" / "0.txt", (0, 0))
    (output / "train-00001.tar").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"(?s)not whole .*train-00001\.tar.* has 3 bytes"):
        prepare(inputs, output, SMALL)
    prepare(inputs, output, SMALL, overwrite=True)
    assert files(output) == before
    prepare(inputs, output, PrepareOptions(split_by="line", val_fraction=0), overwrite=True)
    assert sorted(files(output)) == ["manifest.json", "train-00000.tar"]


def test_what_is_not_ours_stays(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00007.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"holds train-00007\.tar without a manifest"):
        prepare([str(corpus)], tmp_path, SMALL)
    (tmp_path / "train-00007.tar").rename(tmp_path / "mine.tar")
    prepare([str(corpus)], tmp_path, SMALL)
    assert (tmp_path / "mine.tar").read_bytes() == b"somebody's"


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    for fraction, side in ((1e-9, "val"), (1 - 1e-12, "train")):
        with pytest.raises(UserError, match=f"puts none of 2 documents on the {side} side"):
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", PrepareOptions(split_by="line", val_fraction=fraction))
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"no document that can be read\n.*b\.txt at 0: not UTF-8: byte 0xff at 0"):
        prepare([str(tmp_path / "b.txt")], tmp_path / "out", PrepareOptions())
    for options in ({"val_fraction": 1.0}, {"seed": -1}, {"documents_per_member": 0}):
        with pytest.raises(UserError, match="it must be"):
            PrepareOptions(**options)  # type: ignore[arg-type]


def test_two_at_once(corpus: Path, tmp_path: Path) -> None:
    with (
        open_job(tmp_path / ".prepare-tmp", {}, Share(), overwrite=False, needless=lambda _: False),
        pytest.raises(UserError, match="another `mlm-dist prepare` is at work there"),
    ):
        prepare([str(corpus)], tmp_path, SMALL, overwrite=True)
    prepare([str(corpus)], tmp_path, SMALL)


def test_a_finished_directory_may_be_read_only(corpus: Path, tmp_path: Path) -> None:
    prepare([str(corpus)], tmp_path / "out", SMALL)
    with pytest.MonkeyPatch.context() as patch:  # root writes to read-only directories, too
        patch.setattr(Path, "mkdir", crash_at(1, Path.mkdir))
        _, written = prepare([str(corpus)], tmp_path / "out", SMALL)
    assert not written


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"txt": 1}\n')
    arguments = [str(corpus), str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "out"), "--split-by", "paragraph"]
    assert command.run(parser.parse_args([*arguments, "--workers", "1", "--val-fraction", "0.3"])) == 0
    out = capsys.readouterr().out
    assert "manifest.json: " in out and "1 documents could not be read" in out and "bad.jsonl at 17" in out
    assert command.run(parser.parse_args([*arguments, "--workers", "1", "--val-fraction", "0.3"])) == 0
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args([*arguments, "--shard-size", "big"])
