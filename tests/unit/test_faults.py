"""Every fault of the table in docs/data.md: what is lost is counted, exactly, and said."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.faults import DOCUMENTS, FAULTS, Fault, Outcome, bomb, gz, pack, run_fault, table, zst
from mlm_dist.data.tokenizer import TextTokenizer, load
from tests.corpora import save_tokenizer

# Of 100, when the fault was there before the manifest was made and --skip-damaged made it.
KEPT = {
    "cut in a member": 80,
    "cut at a header": 80,
    "4 KiB of garbage over headers": 80,
    "an empty file": 60,
    "not a tar": 60,
    "a `.zst` member that is cut": 96,
    "a `.zst` member of more than 1 GiB (a bomb)": 96,
    "a `.npy` member with a damaged header": 96,
    "a `.tar.gz` with a byte changed": 80,
    "a `.tar.gz` of more than 1 GiB (a bomb)": 80,
}
REFUSALS = {
    "cut in a member": r"plain\.tar is damaged at byte \d+: the archive is cut in a member's data",
    "cut at a header": r"plain\.tar is damaged at byte \d+: the archive has no end mark",
    "4 KiB of garbage over headers": r"plain\.tar is damaged at byte \d+: not a tar header",
    "an empty file": r"plain\.tar is damaged at byte 0: the file is empty",
    "not a tar": r"plain\.tar is damaged at byte 0: not a tar header",
    "a `.zst` member that is cut": r"zst\.tar is damaged at byte \d+: member '12\.jsonl\.zst': .*cut before its end",
    "a `.zst` member of more than 1 GiB (a bomb)": r"zst\.tar .*: member '12\.jsonl\.zst': more than 1073741824 bytes",
    "a `.npy` member with a damaged header": r"ids\.tar .*: member '17\.npy': a damaged \.npy header",
    "a `.tar.gz` with a byte changed": r"packed\.tar\.gz is damaged .*damaged \.gz data",
    "a `.tar.gz` of more than 1 GiB (a bomb)": r"packed\.tar\.gz is damaged .*more than 1073741824 bytes",
}
LISTED = {
    "a record that is not JSON": "03.jsonl: bad JSON",
    "a record without the field": "03.jsonl: no field 'text' (there are: 'body')",
    "a record that is not UTF-8": "03.jsonl: not UTF-8: byte 0xff",
    "a token id outside the vocabulary": "17.npy: token id 65535",
}
UNREADABLE = {
    "a `.zst` member of more than 1 GiB (a bomb)": "member '12.jsonl.zst': more than 1073741824 bytes",
    "a `.npy` member with a damaged header": "member '17.npy': a damaged .npy header",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def title(fault: Fault) -> str:
    return f"{fault.when}{'-skip' if fault.skip else ''}-{fault.name}"


@pytest.mark.parametrize("fault", FAULTS, ids=title)
def test_what_is_lost_is_counted_and_said(fault: Fault, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    outcome = run_fault(fault, tmp_path / "corpus", tokenizer)
    assert not outcome.strangers
    if fault.when == "before" and fault.name in REFUSALS and not fault.skip:
        assert_matches(REFUSALS[fault.name], outcome.refused)
        return
    assert not outcome.refused
    if fault.skip:
        assert (outcome.delivered, outcome.ledger, outcome.listed) == (KEPT[fault.name], 0, 0)
        assert outcome.damaged is not None and len(outcome.causes) == 1
        assert_matches(REFUSALS[fault.name].rpartition(": ")[2].rpartition("damaged .*")[2], outcome.causes[0])
        assert outcome.problems == []
        return
    assert outcome.damaged is None
    assert outcome.delivered + outcome.ledger + outcome.listed == DOCUMENTS
    assert sum(problem.documents for problem in outcome.problems) == outcome.ledger
    if fault.when == "before":
        assert (outcome.listed, outcome.ledger, outcome.problems) == (1, 0, [])
        assert LISTED[fault.name] in outcome.causes[0]
        return
    assert outcome.listed == 0 and outcome.problems
    assert (outcome.ledger > 0) == (fault.name != "bytes added at the end") == bool(outcome.causes)
    known = [UNREADABLE[fault.name]] if fault.when == "vouched" else ["differ", "too early", "No such file"]
    assert all(any(words in cause for words in known) for cause in outcome.causes)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), f"{text!r} does not match {pattern!r}"


def test_the_table_has_a_line_for_each(tokenizer: TextTokenizer) -> None:
    outcome = Outcome(delivered=76, ledger=24, causes=["cut | short"])
    lines = list(table([(fault, outcome) for fault in FAULTS[:3]]))
    assert lines[3:] == [f"| {fault.name} | 100 | 76 | 24 | cut \\| short |" for fault in FAULTS[:3]]


def test_bombs_are_bounded_in_memory(tmp_path: Path) -> None:
    files = {
        "a.tar": pack([("a.txt.zst", bomb(zst, 64 << 30))]),
        "b.tar": pack([("a.jsonl.gz", bomb(gz, 16 << 30))]),
        "c.tar.zst": bomb(zst, 64 << 30),
        "d.tar.gz": bomb(gz, 16 << 30),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from mlm_dist.data.archive import block_documents
        from mlm_dist.data.members import MemberError
        from mlm_dist.data.scan import ScanOptions, scan_archive
        from mlm_dist.data.tar import map_archive
        from mlm_dist.errors import UserError
        from tests.fuzz import limit_memory

        limit_memory(3 << 29)
        for path in sorted(Path(sys.argv[1]).iterdir()):
            view = map_archive(path)
            try:
                if path.name in ("a.tar", "d.tar.gz"):
                    scan_archive(view, path.name, ScanOptions())
                else:
                    list(block_documents(view, path.name))
            except (UserError, MemberError) as error:
                print(path.name, error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(files)
    assert all("more than 1073741824 bytes when decompressed; split it" in line for line in lines)
