"""The commands that the pages show, and a shell that runs those of ours in milliseconds."""

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from launcher.run_dir import RunDir
from tests.ranks import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Beside what is installed here.
PROGRAMS = frozenset(
    {"mlm-dist", "mlm-launch", "make", "sbatch", "srun", "pip", "python", "deepspeed", "torchrun", "export", "source"}
)
ASSIGNED = re.compile(r"[A-Z_]+=")
MAINS = {"mlm-dist": "mlm_dist.cli", "mlm-launch": "launcher.cli"}


def commands(page: Path) -> list[str]:
    """The shell commands of a page: lines after ``$`` of a block that has such, else all lines of one that begins with a program's name."""
    found = []
    for block in _blocks(page.read_text()):
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        prompted = [m[1] for line in lines if (m := re.match(r"(?:\w+)?\$ (.+)", line))]
        if prompted:
            found += prompted
        elif _is_program(lines[0]):
            found += [line for line in lines if line.strip() and not line.startswith("#")]
    return [re.sub(r"\s+# .*$", "", line).strip() for line in found]


def _blocks(text: str) -> Iterator[str]:
    """Indented blocks, and fenced ones that are no other language's, without their indentation."""
    parts = re.split(r"^```(.*)\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)
    for outside, language, inside in zip(parts[::3], [*parts[1::3], "none"], [*parts[2::3], ""], strict=True):
        for block in re.findall(r"(?:^    .*\n?|^[ \t]*\n(?=    ))+", outside, re.MULTILINE):
            if block.strip():
                yield re.sub("^    ", "", block, flags=re.MULTILINE).strip("\n")
        if language in ("", "sh", "bash", "console") and inside.strip():
            yield inside.strip("\n")


def _is_program(line: str) -> bool:
    word = next((word for word in line.split() if not ASSIGNED.match(word)), "")
    return (
        word in PROGRAMS or "/bin/" in word or bool(re.fullmatch(r"[\w.-]+", word) and shutil.which(word))
    ) and not word.endswith(":")


def words(command: str, folder: Path) -> list[str]:
    """What the shell makes of a command: its words, with globs, quotes and variables done."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


@dataclass
class Done:
    """How a command ended, and what it printed."""

    code: int | None
    output: str


@dataclass
class Shell:
    """Runs `mlm-dist` and `mlm-launch` in processes that are forked from one which has imported everything.

    Attributes:
        folder: where commands run.
        environ: is added to the environment.
    """

    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.docs.preload"])
        with mock.patch.dict(os.environ, self.environ):  # what torch and DeepSpeed read when they are imported
            forkserver.ensure_running()

    def run(self, argv: list[str], *, stop: tuple[Path, int] | None = None, timeout: float = 90.0) -> Done:
        """Run one of MAINS with its arguments.

        Args:
            stop: a run directory and a number: the run is asked to stop, as `mlm-launch cancel` asks, when it has logged so many steps more.
        """
        output = self.folder / "output"
        process = self._context.Process(target=_main, args=(argv, str(self.folder), dict(self.environ), str(output)))
        process.start()
        deadline = time.monotonic() + timeout
        before = _logged(stop[0]) if stop else 0
        try:
            while process.is_alive() and time.monotonic() < deadline:
                process.join(0.05)
                if stop and process.is_alive() and _logged(stop[0]) >= before + stop[1]:
                    RunDir(stop[0]).stop_request.write_text('{"reason": "the test has seen enough", "requeue": false}')
                    stop = None
            assert not process.is_alive(), f"{argv} is not done after {timeout:.0f} s:\n{output.read_text()}"
        finally:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
        return Done(process.exitcode, output.read_text())


def _logged(run: Path) -> int:
    with contextlib.suppress(OSError):
        return max(map(int, re.findall(r'"step": (\d+)', (run / "metrics.jsonl").read_text())), default=0)
    return 0


def _main(argv: list[str], folder: str, environ: dict[str, str], output: str) -> None:
    os.setsid()
    os.sched_setaffinity(
        0, list(os.sched_getaffinity(0))[:1]
    )  # commands take all cores otherwise, each with a process that imports anew
    os.chdir(folder)
    os.environ.update(environ)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = argv
    try:
        code = importlib.import_module(MAINS[argv[0]]).main(argv[1:])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
