"""`mlm-launch`: starts, stops and looks at training runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launcher import hosts_command
from launcher.command import deepspeed_command, environment, shell_line
from launcher.run_dir import ENDED, find_run, resolve
from launcher.supervise import Supervisor, check_grace, say
from launcher.topology import local_topology
from mlm_dist.errors import UserError


def _local(args: argparse.Namespace, overrides: list[str]) -> int:
    check_grace(args.grace)
    run = resolve(Path(args.config), overrides, os.environ)
    topology = local_topology(args.ranks, os.environ, master_port=args.master_port)
    command = deepspeed_command(
        topology, args.program, ["--config", args.config, *overrides], python=sys.executable, verbose=args.verbose
    )
    env = environment(topology, os.environ)
    if args.dry_run:
        print(shell_line(command, env, os.environ))
        return 0
    supervisor = Supervisor(run, range(topology.ranks), grace=args.grace, show_all_ranks=args.verbose)
    return supervisor.supervise(lambda watch: (command, {**env, **watch}, None))


def _status(args: argparse.Namespace, _: list[str]) -> int:
    run = find_run(args.run)
    status = run.status()
    assert status is not None, "find_run gives directories with a status"
    if args.json:
        print(json.dumps(asdict(status)))
        return 0
    print(f"{run.path}: {status.state} at step {status.step}" + (f" ({status.reason})" if status.reason else ""))
    seen = run.last_sign_of_life()
    if status.state not in ENDED and seen is not None:
        print(f"last sign of life {max(0, round(time.time() - seen))} s ago")
    return 0


def _cancel(args: argparse.Namespace, _: list[str]) -> int:
    run = find_run(args.run)
    status = run.status()
    if status is not None and status.state in ENDED:
        print(f"{run.path}: already {status.state}; nothing to cancel")
        return 0
    try:
        run.request_stop("mlm-launch cancel")
    except OSError as e:
        raise UserError(f"{run.path}: cannot write the request to stop ({e})") from None
    print(f"{run.path}: asked to write a checkpoint and end")
    deadline = time.monotonic() + args.wait
    while args.wait > 0:
        status = run.status()
        if status is not None and status.state in ENDED:
            print(f"{run.path}: {status.state} at step {status.step}")
            break
        if time.monotonic() > deadline:
            say(f"{run.path}: still running after {args.wait:g} s")
            return 1
        time.sleep(0.2)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of `mlm-launch`."""
    parser = argparse.ArgumentParser(
        prog="mlm-launch", description="Start, stop and look at training runs.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    local = commands.add_parser(
        "local",
        help="train on this machine with the deepspeed launcher",
        description="Train on this machine: one rank per GPU, or on the CPU where there is none. Ctrl-C or TERM lets "
        "the run write a checkpoint and end; a second one kills it. Starting the same command again continues the run.",
        epilog="Whatever is not listed here goes to the program, such as --train.steps 10. "
        "Exit codes: 0 finished, 75 stopped with a checkpoint, 2 bad input, else that of the rank that failed first.",
        allow_abbrev=False,
    )
    local.add_argument("-n", "--ranks", type=int, metavar="N", help="processes (default: one per GPU, else 1)")
    local.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    local.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    local.add_argument(
        "--grace",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to wait for the checkpoint when stopping (default 600)",
    )
    local.add_argument("--master-port", type=int, metavar="PORT", help="rendezvous port (default: a free one)")
    local.add_argument(
        "--verbose",
        action="store_true",
        help="show the deepspeed launcher's log and every rank's output, not only rank 0's",
    )
    local.add_argument("--program", default="mlm_dist.train", help=argparse.SUPPRESS)
    local.set_defaults(run_command=_local)

    hosts = commands.add_parser(
        "hosts",
        help="train on the hosts of a hostfile, by ssh and pdsh or started on each",
        description=hosts_command.DESCRIPTION,
        epilog=hosts_command.EPILOG,
        allow_abbrev=False,
    )
    hosts_command.add_arguments(hosts)
    hosts.set_defaults(run_command=hosts_command.run)

    status = commands.add_parser("status", help="say how far a run is", allow_abbrev=False)
    status.add_argument("run", metavar="RUN", help="run directory, or a name under runs/")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run_command=_status)

    cancel = commands.add_parser("cancel", help="let a run write a checkpoint and end", allow_abbrev=False)
    cancel.add_argument("run", metavar="RUN", help="run directory, or a name under runs/")
    cancel.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait up to S seconds for its end")
    cancel.set_defaults(run_command=_cancel)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `mlm-launch`: returns the exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in ("local", "hosts"):
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    try:
        return int(args.run_command(args, rest))
    except UserError as e:
        print(f"mlm-launch: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
