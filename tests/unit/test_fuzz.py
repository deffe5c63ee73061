import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the fuzzer limits its memory."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_two_thousand_mutated_inputs() -> None:
    done = run("-m", "tests.fuzz", "--count", "2000")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # Inputs that are all refused at the first byte, or all sound, would test little.
    shares = re.findall(r"(\d+) of (\d+)", done.stdout)
    assert len(shares) == 4 and all(int(n) == 500 and 20 <= int(taken) <= 400 for taken, n in shares)


@pytest.mark.parametrize(
    "bad",
    [
        "lambda rng: {}['a']",
        "lambda rng: bytearray(1 << 30)",
        "lambda rng: [None for _ in iter(int, 1)]",
        "lambda rng: fuzz.check_document('\\ud800')",
        "lambda rng: fuzz.check_archive('a.tar', b'') or fuzz.check_against_tarfile(fuzz.make_tar(rng)[:512])",
    ],
    ids=["crash", "memory", "time", "document", "tarfile"],
)
def test_a_reader_that_misbehaves_is_found(bad: str) -> None:
    program = f"from tests import fuzz; fuzz.SECONDS = 0.3; fuzz.fuzz_member = {bad}; raise SystemExit(fuzz.run(0, 8))"
    done = run("-c", program)
    assert done.returncode == 1
    assert "input 2 (member) failed; again: python -m tests.fuzz --first 2 --count 1" in done.stderr


def test_an_input_is_made_from_its_number_alone() -> None:
    first = [fuzz.mutate(fuzz.make_tar(rng), rng) for rng in map(random.Random, range(40))]
    again = [fuzz.mutate(fuzz.make_tar(rng), rng) for rng in map(random.Random, reversed(range(40)))]
    assert first == again[::-1] and len(set(first)) == 40
