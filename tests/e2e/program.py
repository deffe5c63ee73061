"""Starts the real program, one process a rank, and kills it when told."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlm_dist.records import read_metrics
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.ranks import ROOT, free_port

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def save_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Corpus, tokenizer and a run config of a tiny BERT in ``folder``; the sections are merged over it."""
    save_tokenizer(folder / "tokenizer")
    train = save_corpus(folder / "corpus", documents(200))
    val = save_corpus(folder / "corpus", documents(40, seed=1), shards=1, name="val.json")
    config: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "runs"), "name": "run"},
        "data": {
            "manifest": str(train),
            "val_manifest": str(val),
            "tokenizer": str(folder / "tokenizer"),
            "seq_len": 32,
        },
        "model": {"init": "config", "config": SIZES},
        "train": {"steps": 12, "global_batch": 12, "micro_batch": 3, "precision": "fp32", "timeout": 60.0},
        "optim": {"lr": 1e-3, "warmup": 0.25},
        "checkpoint": {"every": 3},
        "track": {"every": 1, "wandb": "disabled"},
    }
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Program:
    """The ranks of one start.

    Attributes:
        before: Python that every rank runs before the program.
        module: a stand-in for the program.
    """

    config: Path
    world: int = 1
    flags: Sequence[str] = ()
    before: str = ""
    module: str = "mlm_dist.train"
    environ: dict[str, str] = field(default_factory=dict)
    ranks: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> "Program":
        """Start all ranks, each with its output in a file beside the config."""
        port = str(free_port())
        for rank in range(self.world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                **self.environ,
            }
            with self.log(rank).open("wb") as log:
                code = f"import sys\n{self.before}\nfrom mlm_dist.train import main\nsys.exit(main())"
                program = ["-c", code] if self.before else ["-m", self.module]
                command = [sys.executable, *program, "--config", str(self.config), *self.flags]
                # A group of its own: the loader workers die with their rank.
                self.ranks.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
                )
        return self

    def log(self, rank: int) -> Path:
        """The rank's output."""
        return self.config.parent / f"rank-{rank}.log"

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit code of every rank; kills all and fails when the time is up."""
        deadline = time.monotonic() + timeout
        try:
            return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not ended within {timeout} s:\n{self.output()}") from None

    def finish(self, timeout: float = 120.0) -> "Program":
        """Wait; every rank must exit 0."""
        codes = self.wait(timeout)
        assert codes == [0] * self.world, f"exit codes {codes}:\n{self.output()}"
        return self

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL these ranks (all by default) with their workers."""
        for rank in range(self.world) if ranks is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.ranks[rank].pid, signal.SIGKILL)
            self.ranks[rank].wait()

    def wait_for_step(self, run: Path, step: int, timeout: float = 90.0) -> None:
        """Return when ``metrics.jsonl`` holds ``step``."""
        deadline = time.monotonic() + timeout
        while max(losses(run), default=0) < step:
            assert time.monotonic() < deadline, f"step {step} not reached:\n{self.output()}"
            assert all(rank.poll() is None for rank in self.ranks), f"ended before step {step}:\n{self.output()}"
            time.sleep(0.01)

    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"--- rank {r}\n{self.log(r).read_text(errors='replace')[-4000:]}" for r in range(self.world))


def losses(run: Path, kind: str = "train") -> dict[int, float]:
    """Loss by step."""
    path = run / "metrics.jsonl"
    return {r["step"]: r["loss"] for r in read_metrics(path) if r["kind"] == kind} if path.exists() else {}
