"""``mlm-dist checkpoint``: list, verify and convert checkpoints."""

import argparse
from pathlib import Path

from mlm_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist checkpoint``."""
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="list|verify")
    listing = commands.add_parser("list", help="the checkpoints of a run; sizes of files are checked, not their bytes")
    listing.add_argument("source", metavar="RUN", type=Path, help="run directory")
    listing.add_argument("--json", action="store_true", help="a JSON document instead of a table")
    verify = commands.add_parser("verify", help="read every byte; exits 1 and names each damaged file")
    verify.add_argument("source", metavar="RUN|CHECKPOINT", type=Path, help="run directory, or one of its checkpoints")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run ``mlm-dist checkpoint``; ``overrides`` are the run-config flags."""
    if overrides:
        raise UserError(f"mlm-dist checkpoint {args.checkpoint_command}: unknown argument {overrides[0]!r}.")
    from mlm_dist import checkpoint_list

    if args.checkpoint_command == "list":
        return checkpoint_list.run_list(args.source, args.json)
    return checkpoint_list.run_verify(args.source)
