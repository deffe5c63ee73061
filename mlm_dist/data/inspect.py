"""``mlm-dist data hash``, ``show`` and ``verify``: check the claim, look at the rows, check the shards."""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlm_dist.data import verify
from mlm_dist.data.lanes import Lost
from mlm_dist.data.rows import Rows
from mlm_dist.data.stream import Origin, Stream
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.errors import UserError
from mlm_dist.ledger import leaves_out

ESCAPES = {"label": "\033[1;33m", "dim": "\033[2m", "end": "\033[0m"}


def global_batches(
    streams: list[Stream],
    start: int,
    stop: int,
    *,
    begin: int = 0,
    cursors: np.ndarray | None = None,
    lost: Lost = frozenset(),
) -> Iterator[tuple[int, Rows, list[Origin]]]:
    """(step, its live rows in order, the block of each) of steps ``start`` to ``stop - 1``, put together from the streams of all ranks.

    Ends early at the data's end. A step's rows are known only to who has read what comes before in their lanes, so every stream reads on from step
    ``begin``, where the lanes are at ``cursors``.
    """
    iterators = [stream.batches(begin, cursors, lost) for stream in streams]
    for step in range(begin, stop):
        batches = [next(it) for it in iterators]
        for fault in (fault for batch in batches for fault in batch.faults):
            print(
                f"lost {fault.documents} document(s) of {fault.shard} at byte {fault.offset}: {fault.cause}",
                file=sys.stderr,
            )
        live = np.flatnonzero(np.concatenate([b.live for b in batches]))
        if not len(live):
            return
        if step >= start:
            order = np.argsort(np.concatenate([b.index for b in batches])[live])
            origins = [o for stream, batch in zip(streams, batches, strict=True) for o in stream.origins(batch)]
            yield step, Rows.concat([b.rows for b in batches]).take(live[order]), [origins[i] for i in order]


def digests(rows: Rows) -> tuple[str, str]:
    """SHA-256 hex of (the token ids and how they lie in rows and segments, the labels and their places). Widths of integers do not enter."""

    def digest(*parts: np.ndarray) -> str:
        h = hashlib.sha256()
        for part in parts:
            h.update(part.astype("<u4").tobytes())
            h.update(b"|")
        return h.hexdigest()

    return digest(rows.lengths, rows.segments, rows.segment_lengths, rows.ids), digest(
        rows.selected, rows.positions, rows.labels
    )


def render(rows: Rows, row: int, tokenizer: TextTokenizer, colour: bool) -> list[str]:
    """One row as lines of text, a line a segment. A labelled place reads ``seen{truth}``; on a terminal it stands out."""
    one = rows.slice(row, row + 1)
    truth = dict(zip(one.positions.tolist(), one.labels.tolist(), strict=True))
    lines, place = [], 0
    for length in one.segment_lengths.tolist():
        words = []
        for i in range(place, place + length):
            seen = tokenizer.decode_token(int(one.ids[i]))
            if i in truth:
                word = f"{seen}{{{tokenizer.decode_token(truth[i])}}}"
                words.append(f"{ESCAPES['label']}{word}{ESCAPES['end']}" if colour else word)
            else:
                words.append(
                    f"{ESCAPES['dim']}{seen}{ESCAPES['end']}" if colour and i in (place, place + length - 1) else seen
                )
        lines.append(" ".join(words))
        place += length
    return lines


def parse_steps(text: str) -> tuple[int, int]:
    """``A:B`` or ``K`` as a half-open range of steps. Raises UserError."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    start, stop = (int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1) if match else (0, 0)
    if start >= stop:
        raise UserError(
            f"--steps: {text!r} is not a range of steps; write A:B with A < B (B is not included), or one step."
        )
    return start, stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist data``; what they do not know goes to the run config (``--data.seq_len 64``)."""
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="hash|show|verify")
    hash_parser = commands.add_parser("hash", help="digest of the token ids and of the labels of every global step")
    hash_parser.add_argument("--world-size", type=int, default=1, help="ranks to read as (default 1)")
    hash_parser.add_argument("--workers", type=int, default=0, help="loader workers of each rank (default 0)")
    hash_parser.add_argument("--steps", default="0:10", metavar="A:B", help="steps A to B-1 (default 0:10)")
    show = commands.add_parser("show", help="some rows decoded: masks marked, segments one a line")
    show.add_argument("--step", type=int, default=0, help="global step (default 0)")
    show.add_argument("--rows", type=int, default=4, help="how many rows of it (default 4)")
    for sub in (hash_parser, show):
        sub.add_argument("--run", metavar="DIR", help="instead, a run: its config, without what it has lost")
    verify.add_arguments(commands.add_parser("verify", help="read every shard of a manifest and say what is wrong"))
    for sub in (hash_parser, show):
        sub.add_argument("--config", help="run config; any of its keys can follow as a flag")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run ``mlm-dist data``; ``overrides`` are the run-config flags."""
    if args.data_command == "verify":
        if overrides:
            raise UserError(f"mlm-dist data verify: unknown argument {overrides[0]!r}.")
        return verify.run(args)
    return _hash(args, overrides) if args.data_command == "hash" else _show(args, overrides)


def _hash(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.world_size < 1 or args.workers < 0:
        raise UserError(f"--world-size: {args.world_size} must be at least 1 and --workers: {args.workers} at least 0.")
    start, stop = parse_steps(args.steps)
    opened = _Opened(args, overrides, start, world_size=args.world_size, workers=args.workers)
    total = hashlib.sha256()
    for step, rows, _ in opened.batches(start, stop):
        ids, labels = digests(rows)
        total.update(f"{step} {ids} {labels}\n".encode())
        print(f"step {step:>8}  rows {len(rows):>5}  ids {ids[:16]}  labels {labels[:16]}")
    print(f"all {total.hexdigest()}")
    return 0


def _show(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.step < 0 or args.rows < 0:
        raise UserError(f"--step: {args.step} and --rows: {args.rows} must be 0 or more.")
    opened = _Opened(args, overrides, args.step)
    found = list(opened.batches(args.step, args.step + 1))
    if not found:
        raise UserError(f"--step: {args.step} is past the end of the data ({opened.epochs} epochs).")
    ((step, rows, origins),) = found
    if opened.standing is not None and leaves_out(opened.standing.ledger.skips, step):
        print(f"step {step} is left out since a roll-back: it is read and not trained on")
    for row in range(min(args.rows, len(rows))):
        at = origins[row]
        corpus = f" of data.sources[{at.source}]" if len(opened.streams[0].makers) > 1 else ""
        print(
            f"step {step} row {row}: {rows.lengths[row]} tokens, {rows.segments[row]} segments, {rows.selected[row]} labels; "
            f"epoch {at.epoch}{corpus}, {at.shard} at byte {at.offset}, block {at.block}"
        )
        for line in render(rows, row, opened.tokenizer, colour=sys.stdout.isatty()):
            print(f"  {line}")
    return 0


class _Opened:
    """The data of a run config, or of a run as its directory tells it, for steps from ``step`` on."""

    def __init__(
        self, args: argparse.Namespace, overrides: list[str], step: int, *, world_size: int = 1, workers: int = 0
    ):
        from mlm_dist.config import load as load_config
        from mlm_dist.inputs import DataInputs
        from mlm_dist.standing import Standing

        if (args.config is None) == (args.run is None):
            raise UserError("--config: give it, or --run with the directory of a run; one of them.")
        path = args.config or str(Path(args.run) / "config.yaml")
        config = load_config(["--config", path, *overrides], prog=f"mlm-dist data {args.data_command}").config
        config.data.workers = workers
        self.epochs = config.train.epochs
        self.standing = Standing.before(Path(args.run), step) if args.run else None
        inputs = DataInputs(config)
        inputs.check_remote()
        for note in inputs.notes:
            print(f"note: {note}", file=sys.stderr)
        self.tokenizer = inputs.tokenizer
        self.streams = [inputs.stream(rank, world_size) for rank in range(world_size)]

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Rows, list[Origin]]]:
        at = self.standing
        if at is None:
            return global_batches(self.streams, start, stop)
        return global_batches(self.streams, start, stop, begin=at.step, cursors=at.cursors, lost=at.lost)
