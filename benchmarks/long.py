"""A long run of the real program: does memory stay flat, does a step keep its time, is nothing left behind?

    python -m benchmarks.long                  # 1,000 steps of a small BERT on 2 ranks with 2 loader workers each, some minutes

Checkpoints, validation and offline W&B run on the way. Looks at every rank from outside, some time after given steps, and prints a Markdown table.
"""

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlm_dist.lifecycle import EXIT_STOPPED
from mlm_dist.records import read_metrics
from tests.e2e.program import Program, save_config

WORLD, WORKERS = 2, 2
# Files are open while a checkpoint is written, loader processes live while the validation set is read: the least of several looks is what stays.
LOOKS, PAUSE_S = 20, 0.1
GROWTH_MB, SLOWER = 16.0, 1.1


@dataclass(frozen=True)
class Look:
    """What there was of each rank after ``step`` steps.

    Attributes:
        rss_mb: resident set of the rank's process; that of its loader workers is in ``workers_mb``.
        handles: open file handles of the process and of its children.
        children: processes that descend from it.
    """

    step: int
    rss_mb: tuple[float, ...]
    workers_mb: tuple[float, ...]
    handles: tuple[int, ...]
    children: tuple[int, ...]


class Watch:
    """Looks at the ranks of a program while it runs."""

    def __init__(self, program: Program, run: Path):
        self._program, self._run = program, run
        self._ranks = [psutil.Process(rank.pid) for rank in program.ranks]
        self._seen: set[psutil.Process] = set()

    def at(self, step: int, timeout: float = 90.0) -> Look:
        """Wait for ``step``, then look several times: of each number the least."""
        self._program.wait_for_step(self._run, step, timeout)
        looks = []
        for _ in range(LOOKS):
            looks.append([self._rank(rank) for rank in self._ranks])
            time.sleep(PAUSE_S)
        least = [[min(values) for values in zip(*rank, strict=True)] for rank in zip(*looks, strict=True)]
        rss, workers, handles, children = zip(*least, strict=True)
        return Look(step, rss, workers, handles, children)

    def _rank(self, rank: psutil.Process) -> tuple[float, float, int, int]:
        family = rank.children(recursive=True)
        self._seen |= {rank, *family}
        rss, handles = 0, rank.num_fds()
        for child in family:
            try:
                rss, handles = rss + child.memory_info().rss, handles + child.num_fds()
            except psutil.Error:  # it has just ended
                continue
        return rank.memory_info().rss / 2**20, rss / 2**20, handles, len(family)

    def stop(self, timeout: float = 90.0) -> list[psutil.Process]:
        """Stop the program. Returns, of all processes that were ever seen, those that still live."""
        self._program.ranks[0].send_signal(signal.SIGTERM)
        codes = self._program.wait(timeout)
        assert codes == [EXIT_STOPPED] * len(codes), f"exit codes {codes}:\n{self._program.output()}"
        return [process for process in self._seen if process.is_running()]


def slowdown(seconds: Sequence[float]) -> float:
    """Median of the last quarter of the step times over that of the first."""
    quarter = len(seconds) // 4
    return statistics.median(seconds[-quarter:]) / statistics.median(seconds[:quarter])


def growth_mb(first: Look, last: Look) -> float:
    """Most that a rank, or its workers together, grew by."""
    return max(
        b - a
        for one, other in ((first.rss_mb, last.rss_mb), (first.workers_mb, last.workers_mb))
        for a, b in zip(one, other, strict=True)
    )


def table(looks: Sequence[Look]) -> str:
    """The looks as Markdown; each cell holds the numbers of all ranks."""

    def cell(values: Sequence[float]) -> str:
        return " / ".join(f"{value:.0f}" for value in values)

    lines = ["after step | rank, MB | its workers, MB | handles | children", "--- | --- | --- | --- | ---"]
    lines += [
        " | ".join([f"{x.step:,}", cell(x.rss_mb), cell(x.workers_mb), cell(x.handles), cell(x.children)])
        for x in looks
    ]
    return "\n".join(f"| {line} |" for line in lines)


def run(folder: Path, steps: int, say: Callable[[str], None] = print) -> bool:
    """The run, in ``folder``. Returns whether all is as it should be."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = save_config(
        folder,
        data={"seq_len": 64, "workers": WORKERS, "lanes": 2 * WORLD * WORKERS},
        model={"config": {**sizes, "max_position_embeddings": 64}},
        train={"steps": 100 * steps, "global_batch": 16, "micro_batch": 8},
        eval={"every": steps // 10},
        checkpoint={"every": steps // 20},
        track={"every": 1, "wandb": "offline"},
    )
    program = Program(config, WORLD).start()
    try:
        watch = Watch(program, folder / "runs/run")
        looks = [watch.at(steps * part // 100, 600.0) for part in (5, 20, 40, 60, 80, 100)]
        left = watch.stop()
    finally:
        program.kill()
    records = read_metrics(folder / "runs/run/metrics.jsonl")
    ratio = slowdown([r["step_time"] for r in records if r["kind"] == "train" and r["step"] <= steps])
    grown = growth_mb(looks[1], looks[-1])
    even = all((x.handles, x.children) == (looks[1].handles, looks[1].children) for x in looks[1:])
    say(table(looks))
    verdicts = {
        f"memory grew by {grown:.1f} MB from step {looks[1].step:,} to {looks[-1].step:,} (at most {GROWTH_MB:g})": grown
        <= GROWTH_MB,
        f"step time of the last quarter over that of the first: {ratio:.3f} (at most {SLOWER:g})": ratio <= SLOWER,
        "handles and children stay as many": even,
        f"processes left behind: {len(left)}": not left,
    }
    for text, good in verdicts.items():
        say(f"- {text}: {'yes' if good else '**no**'}")
    return all(verdicts.values())


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(Path(folder), args.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
