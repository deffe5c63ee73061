"""``mlm-dist data``: anyone can check that ranks and workers change nothing, and look at the rows."""

import re
from pathlib import Path

import pytest

from mlm_dist.cli import main
from tests.e2e.program import save_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str]):
    def command(*words: str) -> list[str]:
        assert main(["data", words[0], "--config", str(config), *words[1:]]) == 0
        return capsys.readouterr().out.splitlines()

    return command


LINE = re.compile(r"step +(\d+)  rows +(\d+)  ids ([0-9a-f]{16})  labels ([0-9a-f]{16})")


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(
    "flags", [["--data.lanes", "7"], [], ["--mask.labels", "all", "--data.packing", "best_fit", "--data.lanes", "4"]]
)
def test_hash_is_the_same_for_any_ranks_and_workers(run, flags: list[str]) -> None:
    reference = run("hash", "--steps", "0:6", *flags)
    parsed = [LINE.fullmatch(line) for line in reference[:-1]]
    assert [int(m[1]) for m in parsed if m] == list(range(6)) and all(m and m[2] == "12" for m in parsed)
    assert len({m[3] for m in parsed if m}) == len({m[4] for m in parsed if m}) == 6
    assert re.fullmatch(r"all [0-9a-f]{64}", reference[-1])
    layouts = [(1, 4), (2, 3), (4, 2), (6, 1)] if len(flags) == 2 else [(2, 1)]
    for world, workers in layouts:
        words = ["--world-size", str(world), "--workers", str(workers), "--steps", "0:6", *flags]
        assert run("hash", *words) == reference, (world, workers)


def test_hash_of_later_steps_are_the_same_lines(run) -> None:
    assert run("hash", "--steps", "3:6")[:-1] == run("hash", "--steps", "0:6")[3:6]
    assert run("hash", "--steps", "4")[:-1] == run("hash", "--steps", "0:6")[4:5]


def columns(lines: list[str]) -> tuple[list[str], list[str]]:
    found = [m for m in map(LINE.fullmatch, lines) if m]
    return [m[3] for m in found], [m[4] for m in found]


def test_hash_changes_with_what_it_stands_for(run) -> None:
    ids, labels = columns(run("hash", "--steps", "0:3"))
    for flags in (["--run.seed", "1"], ["--mask.rate", "0.3"], ["--data.packing", "none"], ["--data.lanes", "2"]):
        other_ids, other_labels = columns(run("hash", "--steps", "0:3", *flags))
        assert not set(ids) & set(other_ids) and not set(labels) & set(other_labels), flags
    # Which tokens carry a label is no matter of what the model sees.
    same_ids, other_labels = columns(run("hash", "--steps", "0:3", "--mask.labels", "all"))
    assert same_ids == ids and not set(labels) & set(other_labels)


def test_hash_ends_with_the_data(run) -> None:
    epoch = ["--train.steps", "null", "--train.epochs", "1"]
    lines = run("hash", "--steps", "0:1000", *epoch)[:-1]
    assert 10 < len(lines) < 200
    assert run("hash", "--steps", "0:1000", "--world-size", "3", *epoch)[:-1] == lines


def test_show_marks_masks_and_segments(run) -> None:
    lines = run("show", "--step", "1", "--rows", "12", "--data.packing", "best_fit", "--mask.rate", "0.3")
    heads = [i for i, line in enumerate(lines) if line.startswith("step 1 row ")]
    assert len(heads) == 12
    masked = changed = kept = several = 0
    for head, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        facts = re.fullmatch(
            r"step 1 row (\d+): (\d+) tokens, (\d+) segments, (\d+) labels; epoch 0, \S+ at byte \d+, block \d+",
            lines[head],
        )
        assert facts is not None
        segments = [line.split() for line in lines[head + 1 : end]]
        assert len(segments) == int(facts[3])
        assert all(words[0] == "[CLS]" and words[-1] == "[SEP]" for words in segments)
        words = [word for segment in segments for word in segment]
        assert len(words) == int(facts[2]) <= 32
        labels = [m for m in (re.fullmatch(r"(.+)\{(.+)\}", word) for word in words) if m]
        assert len(labels) == int(facts[4])
        # A mask without its truth beside it would be a place that nobody asks the model for.
        assert "[MASK]" not in words
        masked += sum(m[1] == "[MASK]" for m in labels)
        changed += sum(m[1] not in ("[MASK]", m[2]) for m in labels)
        kept += sum(m[1] == m[2] for m in labels)
        several += len(segments) > 1
    assert masked > 4 * changed > 0 and kept > 0 and several > 0


def test_show_says_what_the_model_is_asked_for(run) -> None:
    """The tutorial's rule: all to [MASK], a label on every token."""
    flags = ["--mask.strategy", "mask_only", "--mask.labels", "all"]
    lines = run("show", "--rows", "2", *flags)
    words = [word for line in lines if line.startswith("  ") for word in line.split()]
    labels = [re.fullmatch(r"(.+)\{(.+)\}", word) for word in words]
    assert words and all(m and m[1] in ("[MASK]", m[2]) for m in labels)
    assert "[CLS]{[CLS]}" in words and any(m and m[1] == "[MASK]" for m in labels)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hash", "--steps", "5:2"], "--steps: '5:2'"),
        (["hash", "--steps", "x"], "--steps: 'x'"),
        (["hash", "--world-size", "0"], "--world-size: 0"),
        (["hash", "--workers", "-1"], "--workers: -1"),
        (["hash", "--mask.rat", "0.3"], "'--mask.rate'"),
        (["show", "--data.manifest", "absent.json"], "absent.json"),
    ],
)
def test_mistakes(config: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["data", words[0], "--config", str(config), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error
