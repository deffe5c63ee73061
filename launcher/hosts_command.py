"""`mlm-launch hosts`: a run on the hosts of a hostfile."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import launcher
from launcher import hosts
from launcher.command import GPUS, PROGRAM_HELP, Call, environment, runner_command, shell_line
from launcher.exec import STOPPED
from launcher.run_dir import RunDir, resolve
from launcher.supervise import Job, Supervisor, check_grace
from launcher.topology import LocalTopology, slurm_node_rank, threads_per_rank, torch_is_cpu_build, visible_gpus
from mlm_dist.errors import UserError

DESCRIPTION = (
    "Train on several hosts with the deepspeed launcher: one rank for each slot of the hostfile. By default this host "
    "starts them all by pdsh and ssh, which must ask for no password; with --no-ssh the same command is given on every "
    "host, each with its own --node-rank. The hosts see the working directory, Python and the run's directory at the "
    "same paths. Ctrl-C or TERM lets the run write a checkpoint and end; a second one kills it. When a rank fails, or a "
    "host is lost, the others are ended."
)
EPILOG = (
    "Whatever is not listed here goes to the program, such as --train.steps 10. GPUs: slot 2 is the third GPU of its "
    "host, and --include and --exclude choose among slots; CUDA_VISIBLE_DEVICES of this shell is not passed on by ssh. "
    "With --no-ssh the host's own CUDA_VISIBLE_DEVICES counts: slot 2 is the third entry. Where torch is a CPU build, or "
    "with DS_ACCELERATOR=cpu, ranks are on the CPU. Passed on by ssh: "
    + ", ".join((*hosts.PASSED, *(f"{p}*" for p in hosts.PASSED_PREFIXES)))
    + " and --export, but never a secret. "
    "Exit codes: 0 finished, 75 stopped with a checkpoint, 2 bad input, else that of the rank that failed first."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads."""
    add = parser.add_argument
    add("--hostfile", required=True, metavar="FILE", help="hosts, one a line: NAME slots=N")
    add("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    add("--include", metavar="SPEC", help="use these only, such as node1@node2:0,2 (all slots of node1, two of node2)")
    add("--exclude", metavar="SPEC", help="leave these out")
    add("--master-addr", metavar="ADDR", help="address of rank 0's host, for all hosts (default: the first one's name)")
    add("--master-port", type=int, metavar="PORT", help="port there (default: 20000-29999, by the run's path)")
    add("--no-ssh", action="store_true", help="start the ranks of this host only")
    add("--node-rank", type=int, metavar="K", help="with --no-ssh: which of the chosen hosts this is, from 0")
    add("--ssh-port", type=int, metavar="PORT", help="port of ssh (default: that of ~/.ssh/config)")
    add("--export", nargs="+", action="extend", default=[], metavar="NAME", help="more variables to pass on by ssh")
    add("--dry-run", action="store_true", help="print the command instead of running it")
    add(
        "--grace",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds to wait for the checkpoint when stopping (default 600)",
    )
    add(
        "--lease",
        type=float,
        default=120.0,
        metavar="S",
        help="by ssh: seconds without a sign of life, in the run's directory, after which this command gives up a host, "
        "and hosts whose launcher is gone end their ranks (default 120)",
    )
    add(
        "--verbose",
        action="store_true",
        help="show the deepspeed launcher's log and every rank's output, not only rank 0's",
    )
    add("--program", default="mlm_dist.train", metavar="MODULE", help=PROGRAM_HELP)
    # For slurm/train.sbatch, one task a node: the node's rank is SLURM's, TERM is how SLURM preempts, and a stop is no
    # failure for which srun should kill the other tasks.
    add("--under-slurm", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Starts the run, or this host's part of it, and returns the exit code."""
    if args.under_slurm:
        args.node_rank = slurm_node_rank(os.environ)
    _check(args)
    where = resolve(Path(args.config), overrides, os.environ)
    every = hosts.read_hostfile(Path(args.hostfile))
    chosen = hosts.select(every, include=args.include, exclude=args.exclude)
    words = [args.program, "--config", args.config, *overrides]
    if args.no_ssh:
        ranks, job = _here(args, where, chosen, words)
    else:
        ranks, job = range(sum(map(len, chosen.values()))), _by_ssh(args, where, chosen, words)
    command, env, cwd = job({})
    if args.dry_run:
        if not args.no_ssh:
            print("# --packed is what each rank runs, beside where to report:", Call.unpack(command[-1]).describe())
        print(shell_line(command, env, os.environ, cwd))
        return 0
    if not args.no_ssh:
        for program in ("pdsh", "ssh"):
            if shutil.which(program) is None:
                raise UserError(f"no {program} in PATH: install it, or start the ranks of each host with --no-ssh")
    supervisor = Supervisor(
        where,
        ranks,
        grace=args.grace,
        lease=None if args.no_ssh else args.lease,
        part=args.no_ssh,
        show_all_ranks=args.verbose,
        term_requeues=args.under_slurm,
    )
    code = supervisor.supervise(job)
    return 0 if args.under_slurm and code == STOPPED else code


def _check(args: argparse.Namespace) -> None:
    check_grace(args.grace)
    if not (args.lease >= 5 and math.isfinite(args.lease)):
        raise UserError(f"--lease {args.lease:g}: must be 5 or more seconds")
    if args.no_ssh and args.node_rank is None:
        raise UserError("--no-ssh: needs --node-rank K, this host's place among the chosen hosts, from 0")
    if args.node_rank is not None and not args.no_ssh:
        raise UserError(f"--node-rank {args.node_rank}: only with --no-ssh")
    for flag, port in (("--master-port", args.master_port), ("--ssh-port", args.ssh_port)):
        if port is not None and not 0 < port < 65536:
            raise UserError(f"{flag} {port}: must be 1 to 65535")
    if args.master_addr is not None and not hosts.is_plain(args.master_addr):
        raise UserError(f"--master-addr {args.master_addr!r}: is no host name or address")


def _rendezvous(args: argparse.Namespace, where: RunDir, chosen: hosts.Slots) -> hosts.Place:
    selection = [f"--{k}={v}" for k in ("include", "exclude") if (v := getattr(args, k)) is not None]
    # Ranks of one host meet on its loopback interface, and stay off the network.
    address = args.master_addr or (next(iter(chosen)) if len(chosen) > 1 else "127.0.0.1")
    port = args.master_port or hosts.default_port(where.path)
    return hosts.Place(os.path.abspath(args.hostfile), tuple(selection), address, port)


def _by_ssh(args: argparse.Namespace, where: RunDir, chosen: hosts.Slots, words: list[str]) -> Job:
    base = {**os.environ}
    if base.get("DS_ACCELERATOR") is None and torch_is_cpu_build():
        base["DS_ACCELERATOR"] = "cpu"
    cwd = os.getcwd()
    env = hosts.passed_on(base, args.export)
    env["PYTHONPATH"] = base.get("PYTHONPATH", "")
    if base.get("DS_ACCELERATOR") != "cpu":
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # indices are nvidia-smi's
    ours = str(Path(launcher.__file__).parents[1])
    outer = hosts.ssh_environment(base, hosts.python_path(base, cwd, ours), args.ssh_port)
    flags = hosts.ssh_flags(_rendezvous(args, where, chosen), env, verbose=args.verbose)

    def job(watch: Mapping[str, str]) -> tuple[list[str], dict[str, str], str]:
        call = Call(cwd, {**env, **watch}, words)
        return hosts.ssh_command(sys.executable, flags, call, verbose=args.verbose), outer, "/"

    return job


def _here(args: argparse.Namespace, where: RunDir, chosen: hosts.Slots, words: list[str]) -> tuple[range, Job]:
    """The ranks of this host and what starts them."""
    if not 0 <= args.node_rank < len(chosen):
        raise UserError(f"--node-rank {args.node_rank}: must be 0 to {len(chosen) - 1}, for {', '.join(chosen)}")
    hosts.passed_on(os.environ, args.export)  # the same mistakes as by ssh; here all is inherited
    host, slots = list(chosen.items())[args.node_rank]
    gpus = visible_gpus(os.environ)
    if gpus and slots[-1] >= len(gpus):
        raise UserError(f"--hostfile {args.hostfile}: {host} slot {slots[-1]}: only {len(gpus)} GPU(s) to be seen here")
    place = _rendezvous(args, where, chosen)
    topology = LocalTopology(len(slots), gpus, threads_per_rank(len(slots), os.environ), place.port)
    env = environment(topology, os.environ)
    if gpus:
        env[GPUS] = ",".join(map(str, gpus))
    command = runner_command(sys.executable, hosts.no_ssh_flags(place, args.node_rank), words, verbose=args.verbose)
    first = sum(len(s) for s in list(chosen.values())[: args.node_rank])
    return range(first, first + len(slots)), lambda watch: (command, {**env, **watch}, None)
