"""Loader workers that go wrong: each is started again where it was, or the run ends and says why; none is waited for in vain."""

import errno
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.data import lanes, loader
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.stream import Stream
from mlm_dist.data.tokenizer import TextTokenizer, load
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.unit.test_stream import digests, global_batches, maker

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Manifest.read(save_corpus(tmp_path_factory.mktemp("corpus"), documents(300)))


@pytest.fixture(autouse=True)
def short_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MESSAGE_TOKENS", 64)


def forks(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """Let so many forks be the last."""
    fork, made = os.fork, 0

    def limited() -> int:
        nonlocal made
        made += 1
        if made > allowed:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", limited)


def test_a_message_that_cannot_be_sent_ends_its_worker_and_another_goes_on(
    corpus: Manifest, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = maker(corpus, tokenizer)
    whole = digests(global_batches(made, 1, 0, 0, 8, lanes=4))
    read, failed = loader.read_lanes, tmp_path / "failed"

    def fail_once(*args: Any) -> Iterator[Any]:
        for number, chunk in enumerate(read(*args)):
            if number == 2 and not failed.exists():
                failed.touch()
                yield lambda: "nothing that pickles"
            yield chunk

    monkeypatch.setattr(loader, "read_lanes", fail_once)
    assert digests(global_batches(made, 1, 1, 0, 8, lanes=4)) == whole
    assert failed.exists()


def test_no_worker_is_left_where_not_all_can_be_started(
    corpus: Manifest, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())
    forks(monkeypatch, 2)
    with pytest.raises(OSError, match="temporarily unavailable"):
        next(Stream([maker(corpus, tokenizer)], 12, 4, workers=3, lanes=6).batches(0, None))
    assert set(multiprocessing.active_children()) == before


def test_a_worker_that_cannot_be_started_again_is_named(
    corpus: Manifest, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(multiprocessing.active_children())
    forks(monkeypatch, 1)
    batches = Stream([maker(corpus, tokenizer)], 12, 4, workers=1, lanes=4).batches(0, None)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    with pytest.raises(loader.WorkerLost, match=r"SIGKILL .*no new one could be started: Resource temporarily unav"):
        for _ in range(100):
            next(batches)
    assert set(multiprocessing.active_children()) == before
