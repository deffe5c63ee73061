"""``mlm-dist``: the commands. Each is a module that offers ``add_arguments(parser)`` and ``run(args)``."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mlm_dist import __version__
from mlm_dist.errors import UserError
from mlm_dist.files import to_null
from mlm_dist.redact import redact

# Command -> (module, help). Modules are imported only when their command is asked for: some take seconds.
COMMANDS = {
    "prepare": ("mlm_dist.data.prepare", "text files to shuffled shards, manifest and validation split"),
    "index": ("mlm_dist.data.index", "manifest for tars that were made elsewhere"),
    "tokenizer": ("mlm_dist.data.train_tokenizer", "train a WordPiece vocabulary"),
    "tokenizer extend": ("mlm_dist.data.extend_tokenizer", "add the frequent words of a corpus to a vocabulary"),
    "data": ("mlm_dist.data.inspect", "hash: digest of every global batch; show: rows decoded"),
    "train": ("mlm_dist.train", "train as one rank (mlm-launch starts several)"),
    "eval": ("mlm_dist.eval_command", "loss, accuracy and pseudo-perplexity of checkpoints and other models"),
    "probe": ("mlm_dist.probe", "train a small classifier on a model and report its task's metric"),
    "plan": (
        "mlm_dist.plan_command",
        "memory by ZeRO template and micro-batch, the choice that fits, and traffic on a cluster",
    ),
    "doctor": ("mlm_dist.doctor.command", "whether this host, or this allocation, has what a run needs"),
    "checkpoint": ("mlm_dist.checkpoint_command", "list, verify, and convert from and to DeepSpeed's format"),
    "export": ("mlm_dist.export", "stock BERT weights, tokenizer and model card"),
    "fill-mask": ("mlm_dist.fill_mask", "fill [MASK] in sentences"),
    "watch": ("mlm_dist.watch_command", "how a run elsewhere stands, by its directory"),
    "sync": ("mlm_dist.sync", "replay a run's metrics into W&B"),
    "report": ("mlm_dist.report.command", "page and pictures of a run, or of several side by side"),
}
# These take run-config flags (--train.steps 10) besides their own.
WITH_OVERRIDES = ("data", "plan", "doctor", "checkpoint")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlm-dist", description="Distributed masked-language-model training.")
    parser.add_argument("--version", action="version", version=f"mlm-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, add_help=name != "train")
        if name == wanted and name != "train":
            importlib.import_module(module).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A UserError is printed as one message and gives 2, output that nobody takes gives 1."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed from the beginning
            to_null(fd)
            setattr(sys, name, os.fdopen(fd, "w", closefd=False))
    words = list(sys.argv[1:] if argv is None else argv)
    if " ".join(words[:2]) in COMMANDS:
        words[:2] = [" ".join(words[:2])]
    try:
        code = _run(words)
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        to_null(1)  # or what is still to be written would be complained of at the end
        return 1
    except OSError:
        if _flush():
            raise
        return 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit:  # after --help
        if _flush():
            raise
        return 1
    return code if _flush() else 1


def _flush() -> bool:
    """Whether stdout takes what it still holds; says so if not, but for a reader that has left."""
    try:
        sys.stdout.flush()
    except OSError as error:
        to_null(1)
        if not isinstance(error, BrokenPipeError):
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        return False
    return True


def _run(words: list[str]) -> int:
    if words[:1] == ["train"]:
        return int(importlib.import_module("mlm_dist.train").main(words[1:]))
    parser = _parser(words)
    args, rest = parser.parse_known_args(words)
    module = importlib.import_module(COMMANDS[args.command][0])
    if args.command in WITH_OVERRIDES:
        return int(module.run(args, rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return int(module.run(args))


if __name__ == "__main__":
    sys.exit(main())
