"""What a checkpoint costs the training, side by side with DeepSpeed's own and torch.distributed.checkpoint.

    python -m benchmarks.checkpoint                # two ranks on the CPU, ZeRO 0 to 3: a quarter of an hour on two cores
    python -m benchmarks.checkpoint --quick        # does everything work? Figures mean nothing

At each stage all contestants save the state of the same engine in turns, round after round, with training steps before and after each save. The page cache
holds what is written, so loads are those of a warm one. Prints Markdown tables.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.data import ROOT
from benchmarks.memory_cases import Setting
from benchmarks.report import machine, spread
from tests.ranks import run_ranks

TIMEOUT_S = 1800.0
OURS = "mlm_dist"
Result = dict[str, Any]
COLUMNS: dict[str, tuple[Callable[[Result], float], int]] = {
    "stall, ms": (lambda r: 1e3 * r["stall"], 0),
    "steps after, against before": (lambda r: r["after"] / r["base"], 2),
    "cost to the training, ms": (lambda r: 1e3 * (r["stall"] + r["after"] - r["base"]), 0),
    "load, ms": (lambda r: 1e3 * r["load"], 0),
}


def run(args: argparse.Namespace) -> list[Result]:
    """All measurements: of each stage, contestant and round the slowest rank's times, as all wait for it."""
    setting = Setting(
        world=2, hidden=args.hidden, layers=args.layers, vocab=30522, seq_len=64, micro_batch=4, micro_batches=1
    )
    results = []
    for stage in args.stages:
        folder = args.work.resolve() / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        asked = {"stage": stage, "setting": setting, "rounds": args.rounds, "steps": args.steps, "folder": str(folder)}
        target = "benchmarks.checkpoint_cases:measure"
        try:
            ranks = run_ranks(target, setting.world, asked, timeout=TIMEOUT_S, env={"DS_ACCELERATOR": "cpu"})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for of_ranks in zip(*ranks, strict=True):
            slowest = {k: max(r[k] for r in of_ranks) for k in ("stall", "base", "after", "written", "load")}
            results.append({"stage": stage, **of_ranks[0], **slowest})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def table(results: list[Result], stage: int) -> str:
    """A stage's table: median (least-most) of the rounds, and the median of the stall against ours in the same round."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        if result["stage"] == stage:
            by_name.setdefault(result["contestant"], []).append(result)
    ours = [r["stall"] for r in by_name[OURS]]
    lines = [f"| ZeRO-{stage} | " + " | ".join([*COLUMNS, "stall against ours", "MB", "files"]) + " |"]
    lines.append("|" + " --- |" * (len(COLUMNS) + 4))
    for name, rounds in by_name.items():
        cells = [spread([value(r) for r in rounds], digits) for value, digits in COLUMNS.values()]
        ratio = statistics.median(r["stall"] / mine for r, mine in zip(rounds, ours, strict=True))
        cells += [f"{ratio:.2f}", f"{rounds[-1]['bytes'] / 1e6:.1f}", str(rounds[-1]["files"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lost(results: list[Result]) -> list[str]:
    """Where ours is behind: a line for each figure in which another contestant's median is lower."""
    lines = []
    for stage in sorted({r["stage"] for r in results}):
        here = [r for r in results if r["stage"] == stage]
        names = list(dict.fromkeys(r["contestant"] for r in here))
        for column, (value, _) in COLUMNS.items():
            median = {n: statistics.median(value(r) for r in here if r["contestant"] == n) for n in names}
            ahead = [f"{n} ({median[n]:.3g})" for n in names if not n.startswith(OURS) and median[n] < median[OURS]]
            if ahead:
                lines.append(f"- ZeRO-{stage}, {column}: {median[OURS]:.3g} loses to {', '.join(ahead)}")
    return lines


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=ROOT / "data/benchmark", help="where checkpoints are written, and removed again")
    add("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3])
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=6, help="training steps before and after each save")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=6)
    add("--quick", action="store_true", help="one round of a tiny model")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.hidden, args.layers = 1, 2, 64, 1
    results = run(args)
    print(json.dumps(machine()))
    for stage in args.stages:
        print(f"\n{table(results, stage)}")
    print("\nWhat lost:", *(lost(results) or ["- nothing"]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
