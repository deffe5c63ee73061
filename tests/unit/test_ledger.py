"""The ledger: a loss is counted once however often it is met, and is read back from what a crash leaves of events.jsonl."""

from pathlib import Path
from typing import Any

import pytest

from mlm_dist.json_lines import JsonLines
from mlm_dist.ledger import Ledger


def fault(
    block: int = 0, epoch: int = 0, whole: bool = False, documents: int = 1, cause: str = "bad", source: int = 0
) -> dict[str, Any]:
    return {
        "source": source,
        "epoch": epoch,
        "block": block,
        "shard": f"shard-{block}.tar",
        "offset": 1024 * block,
        "whole": whole,
        "documents": documents,
        "cause": cause,
    }


def test_a_report_met_again_adds_nothing() -> None:
    ledger = Ledger()
    report = [fault(1), fault(2, whole=True, documents=9), fault(3, cause="other")]
    assert ledger.add(report) == report
    assert ledger.add(report) == []
    assert ledger.faults == report


def test_equal_faults_of_one_block_are_as_many_documents() -> None:
    ledger = Ledger()
    assert len(ledger.add([fault(1), fault(1)])) == 2
    assert ledger.add([fault(1), fault(1)]) == []  # the block is read again after a restart
    assert len(ledger.add([fault(1), fault(1), fault(1)])) == 1  # the crash came between two lines of the report


def test_another_epoch_or_kind_is_another_loss() -> None:
    ledger = Ledger([fault(1)])
    assert len(ledger.add([fault(1, epoch=1)])) == 1
    assert len(ledger.add([fault(1, whole=True)])) == 1
    assert len(ledger.add([fault(1, cause="else")])) == 1
    assert len(ledger.faults) == 4


def test_only_whole_blocks_are_not_read_again() -> None:
    ledger = Ledger([fault(1), fault(2, whole=True), fault(2, epoch=1, whole=True), fault(3, epoch=1)])
    assert ledger.lost_blocks() == {(0, 0, 2), (0, 1, 2)}


def write(path: Path, *faults: dict[str, Any]) -> None:
    events = JsonLines(path)
    for f in faults:
        events.append({"time": 1.0, "attempt": 1, "kind": "attempt"})
        events.append({"time": 1.0, "attempt": 1, "kind": "data_loss", "step": 3, **f}, sync=True)
    events.close()


def test_read_back_from_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert Ledger.read(path).faults == []
    faults = [fault(1), fault(1), fault(2, whole=True, documents=4)]
    write(path, *faults)
    ledger = Ledger.read(path)
    assert ledger.faults == faults
    assert ledger.add(faults) == []
    assert ledger.lost_blocks() == {(0, 0, 2)}


@pytest.mark.parametrize("cause", ["a\u2028b", "a\x85b", "a\x0b\x1cb", "caf\u00e9.jsonl: kaputt", 'quote " \\ \n'])
def test_any_text_may_stand_in_a_cause(tmp_path: Path, cause: str) -> None:
    path = tmp_path / "events.jsonl"
    faults = [fault(1, whole=True, cause=cause), fault(2, whole=True)]
    write(path, *faults)
    assert Ledger.read(path).faults == faults


def test_a_line_torn_anywhere_leaves_the_ones_before(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, fault(1, whole=True))
    whole = path.read_bytes()
    write(path, fault(2, whole=True, cause="kaputt: \u00e9\u00e8 \u4e2d"))
    data = path.read_bytes()
    for end in range(len(whole), len(data) - 1):
        path.write_bytes(data[:end])
        assert Ledger.read(path).lost_blocks() <= {(0, 0, 1), (0, 0, 2)}
        assert (0, 0, 1) in Ledger.read(path).lost_blocks()
    path.write_bytes(data)
    assert Ledger.read(path).lost_blocks() == {(0, 0, 1), (0, 0, 2)}


def test_verdict_counts_documents_by_epoch() -> None:
    ledger = Ledger([fault(1, whole=True, documents=6), fault(2, documents=4), fault(3, epoch=1, documents=10)])
    assert ledger.verdict([1000], 0.01) == ""  # ten of a thousand in each epoch: at the limit, not over it
    ledger.add([fault(4)])
    verdict = ledger.verdict([1000], 0.01)
    assert "11 of 1000 documents of epoch 0" in verdict and "max_bad_fraction 0.01" in verdict
    assert all(f"shard-{b}.tar at byte {1024 * b}" in verdict for b in (1, 2, 4))
    assert "shard-3.tar" not in verdict


def test_each_corpus_is_judged_by_its_own_size() -> None:
    ledger = Ledger([fault(1, whole=True, documents=6), fault(1, source=1, documents=6)])
    assert len(ledger.faults) == 2 and ledger.lost_blocks() == {(0, 0, 1)}
    assert ledger.verdict([1000, 1000], 0.01) == ""
    assert "6 of 100 documents of epoch 0 of data.sources[1] are lost" in ledger.verdict([1000, 100], 0.01)


def test_no_loss_at_all_may_be_asked_for() -> None:
    assert Ledger().verdict([1000], 0.0) == ""
    assert "1 of 1000" in Ledger([fault(1)]).verdict([1000], 0.0)


def test_a_long_list_is_cut() -> None:
    verdict = Ledger([fault(b) for b in range(70)]).verdict([100], 0.01)
    assert "and 20 more in events.jsonl" in verdict
    assert verdict.count("shard-") == 50
