"""`mlm-launch slurm`: submits a run to SLURM."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from launcher import jobs
from launcher.run_dir import resolve
from launcher.slurm import Request, sbatch_command, sbatch_variables
from mlm_dist.errors import UserError

CLUSTER_ENV = Path("slurm/cluster.env")
SCRIPT = Path(__file__).resolve().parent / "scripts" / "train.sbatch"
# Options handed on to sbatch under the same name: (flags, help).
HANDED_ON = [
    (["-A", "--account"], "account to charge"),
    (["-p", "--partition"], "partition"),
    (["--qos"], "quality of service"),
    (["-C", "--constraint"], "features that the nodes must have"),
    (["-c", "--cpus-per-task"], "cores of each rank"),
    (["--mem"], "memory of each node"),
]
# Flags that become variables of the batch script: flag -> (variable, help).
SETTINGS = {
    "--via": ("MLM_VIA", "srun: one task a rank (default); deepspeed: one deepspeed launcher a node"),
    "--modules": ("MLM_MODULES", "environment modules to load, in one word: 'cuda/12.8 gcc/13'"),
    "--conda": ("MLM_CONDA", "conda environment to activate"),
    "--venv": ("MLM_VENV", "virtual environment to activate"),
    "--python": ("MLM_PYTHON", "interpreter (default: this one; python in another environment)"),
    "--container": ("MLM_CONTAINER", "container image that holds the software"),
    "--container-runtime": ("MLM_CONTAINER_RUNTIME", "pyxis (default) or apptainer"),
    "--container-mounts": ("MLM_CONTAINER_MOUNTS", "what the container sees: FROM:TO[,...]"),
    "--stage": ("MLM_STAGE_DIR", "directory on each node's own disk to copy the shards to first"),
    "--cpu-bind": ("MLM_CPU_BIND", "srun's --cpu-bind (default cores)"),
    "--program": ("MLM_PROGRAM", argparse.SUPPRESS),  # its end is judged as a training run's
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; whatever is not among them goes to the program."""
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (YAML)")
    parser.add_argument("-N", "--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--ntasks-per-node", type=int, metavar="N", help="ranks a node (default: its GPUs, else 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs a node")
    for flags, text in HANDED_ON:
        parser.add_argument(*flags, metavar="X", help=text)
    parser.add_argument("-t", "--time", metavar="X", help="time limit, such as 12:00:00")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of sbatch, as it is; may be repeated",
    )
    parser.add_argument(
        "--signal-time",
        type=int,
        default=300,
        metavar="S",
        help="seconds for the checkpoint before the time limit (default 300)",
    )
    parser.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="N jobs one after the other, for runs longer than a time limit",
    )
    parser.add_argument("--no-requeue", action="store_true", help="leave the run alone when it was stopped or crashed")
    for flag, (_, text) in SETTINGS.items():
        parser.add_argument(flag, metavar="X", help=text)
    parser.add_argument(
        "--cluster-env", type=Path, metavar="FILE", help=f"the site's settings (default {CLUSTER_ENV}, if it is there)"
    )
    parser.add_argument("--no-check", action="store_true", help="submit without a look at config, data and tokenizer")
    parser.add_argument("--test-only", action="store_true", help="ask SLURM when it would start, and submit nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the command instead of running it")


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Submits the run, and records the job in its directory."""
    run_dir = resolve(Path(args.config), overrides, os.environ)
    command, changed = plan(args, overrides, dict(os.environ))
    if args.dry_run:
        print(shlex.join(["env", *(f"{k}={v}" for k, v in sorted(changed.items())), *command]))
        return 0
    # The software of another environment is not here to ask.
    if changed.get("MLM_PYTHON") == sys.executable and not args.no_check and args.program is None:
        words = command[command.index(str(SCRIPT)) + 1 :]
        ranks = args.nodes * _tasks_per_node(args)
        code = subprocess.run([sys.executable, "-m", "mlm_dist.preflight", str(ranks), *words]).returncode
        if code:
            return code
    if not args.test_only:
        try:
            run_dir.logs.mkdir(parents=True, exist_ok=True)  # SLURM opens the log before anything of ours runs
        except OSError as error:
            raise UserError(f"run.dir: {str(run_dir.path)!r} cannot be written ({error.strerror})") from None
    try:
        done = subprocess.run(command, env={**os.environ, **changed}, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UserError("sbatch: not found here; submit from a login node of the cluster") from None
    if done.returncode or args.test_only:
        print(done.stdout, end="")
        return done.returncode
    job = done.stdout.strip().split(";")[0]  # JOB or JOB;CLUSTER
    print(f"{run_dir.path}: job {job} submitted", flush=True)
    try:
        jobs.record(run_dir.path, "submitted", job=job, lineage=job)
    except OSError as error:
        raise UserError(
            f"{run_dir.path / 'jobs.jsonl'}: cannot be written ({error.strerror}), so status and cancel will not know job {job}"
        ) from None
    print(f"  mlm-launch status {shlex.quote(str(run_dir.path))}    how it stands; likewise logs -f, cancel")
    return 0


def plan(args: argparse.Namespace, overrides: list[str], environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The sbatch command, and the variables that its environment has beyond `environ`. Raises UserError."""
    run_dir = resolve(Path(args.config), overrides, environ)
    changed = {"MLM_SLURM_DIR": str(SCRIPT.parent)}
    named = args.cluster_env or environ.get("MLM_CLUSTER_ENV")
    site = None if named == "" else Path(named or CLUSTER_ENV)
    settings = ""
    if site and site.is_file():
        settings = site.read_text()
        changed |= {k: v for k, v in sbatch_variables(settings, str(site)).items() if k not in environ}
        changed["MLM_CLUSTER_ENV"] = str(site.absolute())
    elif named:
        raise UserError(f"--cluster-env {named}: no such file")
    for flag, (variable, _) in SETTINGS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            changed[variable] = value
    for flag, variable, allowed in [
        ("--via", "MLM_VIA", ("srun", "deepspeed")),
        ("--container-runtime", "MLM_CONTAINER_RUNTIME", ("pyxis", "apptainer")),
    ]:
        value = changed.get(variable, environ.get(variable)) or allowed[0]
        if value not in allowed:
            raise UserError(f"{flag} {value}: must be {' or '.join(allowed)}")
    elsewhere = {"MLM_CONDA", "MLM_VENV", "MLM_CONTAINER", "MLM_PYTHON"} & {*changed, *environ}
    if not elsewhere and not re.search(r"^\s*(export )?MLM_(CONDA|VENV|CONTAINER|PYTHON)=", settings, re.M):
        changed["MLM_PYTHON"] = sys.executable
    options: dict[str, str | None] = {
        name: value
        for flags, _ in HANDED_ON
        if (value := getattr(args, (name := flags[-1].removeprefix("--")).replace("-", "_"))) is not None
    }
    options["no-requeue" if args.no_requeue else "requeue"] = None
    if args.test_only:
        options["test-only"] = None
    request = Request(
        nodes=args.nodes,
        tasks_per_node=_tasks_per_node(args),
        gpus_per_node=args.gpus_per_node,
        chain=args.chain,
        signal_s=args.signal_time,
        time=args.time or changed.get("SBATCH_TIMELIMIT") or environ.get("SBATCH_TIMELIMIT"),
        options=options,
        words=args.sbatch,
    )
    words = ["--config", args.config, *overrides]
    return sbatch_command(request, run_dir.path.absolute(), run_dir.path.name, SCRIPT, words), changed


def _tasks_per_node(args: argparse.Namespace) -> int:
    return next(n for n in (args.ntasks_per_node, args.gpus_per_node, 1) if n is not None)
