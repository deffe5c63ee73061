"""File systems that a test mounts, fills up and makes read-only, where it may."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(place: Path, *arguments: str) -> Iterator[Path]:
    """A mount at ``place``, for those who may."""
    place.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Fill a disk up but for ``leave`` bytes; removing the file makes room again."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    if leave:
        os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


def remount(place: Path, how: str) -> None:
    """Make a bind mount ``ro`` or ``rw``; it is not made read-only while a file is being written, so until it is."""
    deadline = time.monotonic() + 30
    while (
        done := subprocess.run(["mount", "-o", f"remount,{how},bind", str(place)], capture_output=True, text=True)
    ).returncode:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.01)
