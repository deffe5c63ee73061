"""The order at scale: what it costs each loader worker to plan what it reads, how even the load is, and whether each block comes once.

    python -m benchmarks.order                                        # 4,096 ranks x 8 workers, 10 million blocks
    python -m benchmarks.order --ranks 64 --blocks 100000             # another job

Each sampled worker plans in a fresh process, from the block sizes that its manifest gives. Load and coverage are counted over all lanes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mlm_dist.data.order import Order

SEED = 1


def block_sizes(blocks: int) -> np.ndarray:
    """uint32 [blocks], bytes as of a corpus cut at 1 MiB: most blocks nearly full, the last of each shard of 256 anything."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    sizes = rng.integers(900 << 10, 1 << 20, blocks)
    sizes[::256] = rng.integers(1 << 10, 1 << 20, len(sizes[::256]))
    return sizes.astype(np.uint32)


def lanes_of(worker: int, args: argparse.Namespace) -> list[int]:
    """The lanes that worker number ``worker`` of all owns: of rank r the lanes c with c mod ranks == r, of them every n-th."""
    rank, number = divmod(worker, args.workers)
    return list(range(rank, args.lanes, args.ranks))[number :: args.workers]


def plan(sizes_file: str, lanes: int, own: list[int], epochs: int) -> dict[str, float]:
    """What one worker does: seconds and MB for its lanes' blocks of the first epochs, over what the process and the sizes take."""
    sizes = np.load(sizes_file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    order = Order([sizes], lanes, SEED)
    blocks = 0
    for epoch in range(epochs):
        for lane in own:
            numbers = order.blocks(epoch, lane)
            order.place(epoch, int(numbers[0]))
            blocks += len(numbers)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mb": (after - before) / 1024, "sizes_mb": sizes.nbytes / 2**20, "blocks": blocks}


def sampled(args: argparse.Namespace, sizes_file: Path) -> list[dict[str, float]]:
    """``plan`` of some workers that have lanes, each in a process of its own."""
    busy = [own for worker in range(args.ranks * args.workers) if (own := lanes_of(worker, args))]
    found = []
    for i in np.linspace(0, len(busy) - 1, args.sample).astype(int).tolist():
        spec = json.dumps([str(sizes_file), args.lanes, busy[i], args.epochs])
        command = [sys.executable, "-m", "benchmarks.order", "--plan", spec]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def loads(sizes: np.ndarray, args: argparse.Namespace) -> tuple[np.ndarray, int, int]:
    """(bytes of each worker over the epochs, blocks that an epoch lacks, blocks that it has twice)."""
    order = Order([sizes], args.lanes, SEED)
    bytes_of = np.zeros(args.lanes, np.int64)
    missing = twice = 0
    for epoch in range(args.epochs):
        seen = np.zeros(len(sizes), np.uint8)
        for lane in range(args.lanes):
            blocks = order.blocks(epoch, lane)
            np.add.at(seen, blocks, 1)
            bytes_of[lane] += int(sizes[blocks].sum(dtype=np.int64))
        missing, twice = missing + int((seen == 0).sum()), twice + int((seen > 1).sum())
    workers = [int(bytes_of[lanes_of(w, args)].sum()) for w in range(args.ranks * args.workers)]
    return np.asarray(workers), missing, twice


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=8, help="of each rank")
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--lanes", type=int, help="data.lanes (default: one for each worker)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sample", type=int, default=5, help="workers whose planning is measured")
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        print(json.dumps(plan(*json.loads(args.plan))))
        return 0
    args.lanes = args.lanes or args.ranks * args.workers
    sizes = block_sizes(args.blocks)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "sizes.npy", sizes)
        workers = sampled(args, Path(folder) / "sizes.npy")
    load, missing, twice = loads(sizes, args)
    idle, busy = int((load == 0).sum()), load[load > 0]
    even = f"{busy.min() / busy.mean():.3f} to {busy.max() / busy.mean():.3f} of the mean over {args.epochs} epochs"
    rows = [
        ("ranks x workers", f"{args.ranks:,} x {args.workers}"),
        ("blocks, lanes", f"{args.blocks:,}, {args.lanes:,}"),
        ("workers without a lane", f"{idle:,}"),
        (
            f"planning of {args.epochs} epochs by one worker",
            f"{max(w['seconds'] for w in workers):.2f} s at most of {len(workers)}",
        ),
        (
            "its memory",
            f"{max(w['mb'] for w in workers):.0f} MB at most, and {workers[0]['sizes_mb']:.0f} MB for the block sizes",
        ),
        ("bytes of a worker", even),
        ("blocks missing / twice in an epoch", f"{missing} / {twice}"),
    ]
    print("| the order at scale | |\n| --- | --- |")
    print("\n".join(f"| {name} | {value} |" for name, value in rows))
    return int(missing > 0 or twice > 0)


if __name__ == "__main__":
    sys.exit(main())
