"""The training step, side by side with what people use: the same text, model, optimizer, precision and masking rate.

    python -m benchmarks.step                  # on two cores about a quarter of an hour; on CUDA BERT-base and BERT-large, too
    python -m benchmarks.step --quick          # does everything work? Figures mean nothing

Every contestant is a process of its own that stays from its set-up, which is not timed, to the end; they take turns, round after round, so that a slow spell
of the machine meets all of them, and only one works at a time. All train on equally many useful tokens (those that are no padding) and then predict the same
held-out text. Writes JSON lines (machine and versions first, then one measurement a line) and prints Markdown tables.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import corpus, step_report
from benchmarks.data import ROOT, default_tokenizer
from benchmarks.report import machine
from benchmarks.step_cases import BIG, CASES, MODELS, SMALL, Case, Setting
from mlm_dist.errors import UserError

TIMEOUT_S = 900  # of one answer: set-up, a turn or the validation
WARM_UP_STEPS = 2
VAL_FRACTION = 0.03
CHARACTERS = 8_000_000
BLOCK_SIZE = "32KiB"  # what `prepare` takes by itself for 30 MB of text and more
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "deepspeed", "nanotoken", "numpy")
Result = dict[str, Any]


class Contestant:
    """A process of ``step_contestants.py``."""

    def __init__(self, case: Case, spec: dict[str, Any], environment: dict[str, str], log: Path):
        self.case, self._log = case, log
        command = [sys.executable, "-m", "benchmarks.step_contestants", json.dumps(spec)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def order(self, order: Result | None) -> Result:
        """Give the order, if any, and wait for the answer; ``{"error": why}`` if none comes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self.kill)
        timer.start()
        with contextlib.suppress(BrokenPipeError):
            if order is not None:
                print(json.dumps(order), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        timer.cancel()
        if line:
            return json.loads(line)
        said = self._log.read_text(errors="replace").strip().splitlines()
        return {"error": said[-1] if said else f"exit code {self._process.wait()}"}

    def kill(self) -> None:
        """End it and its loader workers, whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def compete(contestants: list[Contestant], tokens: int, rounds: int, write: Callable[[Case, Result], None]) -> None:
    """Let them take turns until each has trained on ``tokens`` useful tokens; ``write`` takes every answer."""
    orders: list[tuple[str, Result | None]] = [("set_up", None), ("warm_up", {"steps": WARM_UP_STEPS})]
    orders += [("turn", {"tokens": tokens * (number + 1) // rounds}) for number in range(rounds)]
    orders += [("end", {"end": True})]
    gone: set[str] = set()
    try:
        for number, (kind, order) in enumerate(orders):
            for contestant in contestants:
                if contestant.case.key not in gone:
                    result = contestant.order(order)
                    write(contestant.case, {"kind": kind, "round": number - 2, **result})
                    if "error" in result:
                        gone.add(contestant.case.key)
    finally:
        for contestant in contestants:
            contestant.kill()


def run(args: argparse.Namespace) -> None:
    """All measurements, written to ``args.output`` as they come."""
    work = args.work.resolve()
    scratch = work / "step"
    scratch.mkdir(parents=True, exist_ok=True)
    text = corpus.make(args.text, work, CHARACTERS, block_size=BLOCK_SIZE, val_fraction=VAL_FRACTION)
    tokenizer = args.tokenizer or default_tokenizer()
    on_cuda = _device_name() is not None
    wanted = [*(BIG if on_cuda else ()), *SMALL] if args.setting is None else [PLANNED[key] for key in args.setting]
    environment = {
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "CUDA_VISIBLE_DEVICES": "0",  # with more than one the Trainer would split the batch over them
        **os.environ,
        "HF_HUB_OFFLINE": "1",
    }
    begun = time.monotonic()
    with args.output.open("w") as out:
        print(json.dumps(_header(text, args, environment)), file=out, flush=True)
        for setting in wanted:
            spec = _spec(setting, text, tokenizer, scratch)

            def write(case: Case, result: Result, setting: Setting = setting) -> None:
                print(json.dumps({"setting": list(setting), "case": case.key, **result}), file=out, flush=True)
                said = {k: round(v, 1) if isinstance(v, float) else v for k, v in result.items() if k != "parts"}
                print(f"{time.monotonic() - begun:5.0f} s  {setting.title}  {case.key}: {said}", file=sys.stderr)

            cases = [case for case in CASES if not args.only or case.key in args.only]
            at_once = MODELS[setting.model].at_once
            for i in range(0, len(cases), at_once):
                contestants = [
                    Contestant(case, {**spec, **case.spec}, environment, scratch / f"{case.key}.log")
                    for case in cases[i : i + at_once]
                ]
                compete(contestants, args.tokens or _tokens(setting, on_cuda), args.rounds, write)


PLANNED = {f"{s.model}-{s.seq_len}-{s.precision}": s for s in (*BIG, *SMALL)}


def _tokens(setting: Setting, on_cuda: bool) -> int:
    """Useful tokens of a contestant: two or three steps a turn at S = 512 on two cores, about a hundred steps in all on CUDA."""
    return 100 * setting.rows * setting.seq_len if on_cuda else 65_536


def _spec(setting: Setting, text: corpus.Corpus, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    return {
        "manifest": str(text.manifest),
        "val_manifest": str(text.val_manifest),
        "jsonl": text.jsonl,
        "tokenizer": str(tokenizer),
        "scratch": str(scratch),
        "model": MODELS[setting.model].sizes,
        "lr": MODELS[setting.model].lr,
        "seq_len": setting.seq_len,
        "precision": setting.precision,
        "rows": setting.rows,
    }


def _device_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _header(text: corpus.Corpus, args: argparse.Namespace, environment: dict[str, str]) -> Result:
    """Machine, versions, text and settings."""
    return {
        **machine(),
        "cuda": _device_name(),
        "threads": int(environment["OMP_NUM_THREADS"]),
        "versions": {name: _version(name) for name in PACKAGES},
        "source": text.source,
        "documents": text.documents,
        "bytes": text.bytes,
        "rounds": args.rounds,
        "peaks": _peaks(),
    }


def _peaks() -> dict[str, float | None]:
    """Dense peak of the CUDA device in FLOP/s by precision; empty without one."""
    if _device_name() is None:
        return {}
    import torch

    from mlm_dist.hardware import dense_peak

    return {precision: dense_peak(torch.device("cuda", 0), precision) for precision in ("bf16", "fp32")}


def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "absent"


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", type=Path, help="directory of text files (default: Debian's linux-doc and anarchism, downloaded)")
    add("--tokenizer", type=Path, help="directory in transformers' format (default: bert-base-uncased's vocabulary)")
    add("--work", type=Path, default=ROOT / "data/benchmark", help="where all that is made is kept")
    add("--output", type=Path, help="JSON lines (default: step.jsonl in --work)")
    add("--rounds", type=int, default=3)
    add("--tokens", type=int, help="useful tokens that each contestant trains on")
    add("--setting", nargs="+", choices=list(PLANNED), metavar="SETTING", help=", ".join(PLANNED))
    add("--only", nargs="+", choices=[c.key for c in CASES], metavar="CASE", help=", ".join(c.key for c in CASES))
    add("--quick", action="store_true", help="one round of a few steps, S = 128, bf16")
    add("--table", type=Path, help="print the tables of an earlier run's JSON lines and measure nothing")
    args = parser.parse_args()
    args.output = args.output or args.work / "step.jsonl"
    if args.quick:
        args.rounds, args.tokens, args.setting = 1, 10_000, ["small-128-bf16"]
    try:
        if args.table is None:
            run(args)
        print(step_report.render((args.table or args.output).read_text()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
