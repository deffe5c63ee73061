"""`mlm-launch`: starts, stops and looks at training runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import hosts_command, runs_command, slurm_command
from launcher.command import PROGRAM_HELP, deepspeed_command, environment, shell_line
from launcher.run_dir import resolve
from launcher.supervise import Supervisor, check_grace
from launcher.topology import local_topology
from mlm_dist.errors import UserError

WITH_PROGRAM = ("local", "hosts", "slurm")  # what these do not know goes to the program


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
    local.add_argument("--program", default="mlm_dist.train", metavar="MODULE", help=PROGRAM_HELP)
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

    for name, run_command, add_arguments, text in [
        ("slurm", slurm_command.run, slurm_command.add_arguments, "submit to SLURM"),
        ("status", runs_command.status, runs_command.add_status_arguments, "say how far a run is"),
        ("logs", runs_command.logs, runs_command.add_logs_arguments, "print the end of a run's log"),
        ("cancel", runs_command.cancel, runs_command.add_cancel_arguments, "let a run write a checkpoint and end"),
    ]:
        command = commands.add_parser(name, help=text, description=run_command.__doc__, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run_command=run_command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `mlm-launch`: returns the exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in WITH_PROGRAM:
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    try:
        return int(args.run_command(args, rest))
    except UserError as e:
        print(f"mlm-launch: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
