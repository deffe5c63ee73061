"""``mlm-dist checkpoint``: list, verify and convert checkpoints."""

import argparse
import os
from pathlib import Path

from mlm_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist checkpoint``; what ``convert --from`` does not know goes to the run config."""
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="list|verify|convert")
    listing = commands.add_parser("list", help="the checkpoints of a run; sizes of files are checked, not their bytes")
    listing.add_argument("source", metavar="RUN", type=Path, help="run directory")
    listing.add_argument("--json", action="store_true", help="a JSON document instead of a table")
    verify = commands.add_parser("verify", help="read every byte; exits 1 and names each damaged file")
    verify.add_argument("source", metavar="RUN|CHECKPOINT", type=Path, help="run directory, or one of its checkpoints")
    convert = commands.add_parser(
        "convert", help="from DeepSpeed's save_checkpoint to a run, or to DeepSpeed's universal format"
    )
    convert.add_argument(
        "source", metavar="SOURCE", type=Path, help="--from: what save_checkpoint was given; --to: run or checkpoint"
    )
    convert.add_argument(
        "dest",
        metavar="DEST",
        type=Path,
        nargs="?",
        help="--to: a new directory (--from makes the config's run directory)",
    )
    way = convert.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", choices=["deepspeed"], help="take over a training from elsewhere")
    way.add_argument("--to", choices=["deepspeed"], help="carry a training off")
    convert.add_argument(
        "--config", metavar="FILE", help="--from: the run config that goes on; any of its keys can follow as a flag"
    )
    convert.add_argument("--tag", help="--from: which checkpoint (default: the one that the file latest names)")
    convert.add_argument(
        "--step", type=int, metavar="K", help="--from: the step that the run stands at (default: the checkpoint's)"
    )
    convert.add_argument(
        "--trust-pickle",
        action="store_true",
        help="--from: execute what the files say where they hold more than tensors and DeepSpeed's own objects",
    )
    convert.add_argument(
        "--prefix",
        default="",
        help="--to: put before each parameter's name, for a script that wraps the model (model.)",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Run ``mlm-dist checkpoint``; ``overrides`` are the run-config flags."""
    if overrides and (args.checkpoint_command != "convert" or args.to):
        raise UserError(f"mlm-dist checkpoint {args.checkpoint_command}: unknown argument {overrides[0]!r}.")
    if args.checkpoint_command == "convert":
        return _convert(args, overrides)
    from mlm_dist import checkpoint_list

    if args.checkpoint_command == "list":
        return checkpoint_list.run_list(args.source, args.json)
    return checkpoint_list.run_verify(args.source)


def _convert(args: argparse.Namespace, overrides: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():  # DeepSpeed warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if args.to:
        from mlm_dist.convert import to_deepspeed

        if args.dest is None:
            raise UserError("DEST: missing; give the new directory to write DeepSpeed's checkpoint into")
        written, notes = to_deepspeed.write(args.source, args.dest, args.prefix)
    else:
        from mlm_dist.config import load
        from mlm_dist.convert.take_over import take_over

        if args.config is None:
            raise UserError("--config: missing; give the run config that goes on from the checkpoint")
        if args.dest is not None:
            raise UserError(
                f"DEST: {args.dest} is not for --from, which makes the config's run directory; set --run.dir and --run.name"
            )
        if args.step is not None and args.step < 0:
            raise UserError(f"--step: {args.step} must be at least 0")
        config = load(["--config", args.config, *overrides], prog="mlm-dist checkpoint convert").config
        written, notes = take_over(args.source, config, tag=args.tag, step=args.step, trust_pickle=args.trust_pickle)
    print(written)
    for note in notes:
        print(f"  {note}")
    return 0
