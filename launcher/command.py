"""Pure functions from a topology and a run to the command line and environment that start it."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from launcher.topology import LocalTopology

# What `launcher.exec` reads from the environment and keeps from the program.
PROGRAM_HELP = "another module to run as the ranks (default mlm_dist.train), such as mlm_dist.doctor"
REPORT_DIR = "LAUNCHER_REPORT_DIR"
LOG_DIR = "LAUNCHER_LOG_DIR"
LEASE = "LAUNCHER_LEASE"  # seconds; set where the watcher is on another host
GPUS = "LAUNCHER_GPUS"  # the GPU that each slot of this host stands for
PACKED = "--packed"
# Left over from another launcher these make DeepSpeed count devices or ranks wrongly.
STALE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Call:
    """What a rank on another host runs, `python -m words`, in `cwd` with `env` over the environment that it finds."""

    cwd: str
    env: Mapping[str, str]
    words: Sequence[str]

    def pack(self) -> str:
        """This call as one word of letters, digits, `-`, `_` and `=`, which neither pdsh nor a shell changes."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    def describe(self) -> str:
        """This call for people, on one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def unpack(cls, word: str) -> Call:
        """The call that `pack` made `word` of."""
        return cls(**json.loads(base64.urlsafe_b64decode(word)))


def runner_command(python: str, flags: Sequence[str], words: Sequence[str], *, verbose: bool) -> list[str]:
    """The argument vector of the deepspeed launcher, told `flags`, that runs `python -m launcher.exec words` per rank.

    `launcher.exec` passes on its arguments untouched.
    """
    return [
        python,
        "-m",
        "deepspeed.launcher.runner",
        *flags,
        "--no_local_rank",
        # Below critical it prints process ids, the environment and the whole command line of a rank that failed.
        f"--log_level={'info' if verbose else 'critical'}",
        "--module",
        "launcher.exec",
        *words,
    ]


def deepspeed_command(
    topology: LocalTopology, program: str, args: Sequence[str], *, python: str, verbose: bool = False
) -> list[str]:
    """The argument vector that runs `python -m program args` on every rank here under the deepspeed launcher.

    No shell reads the vector.
    """
    if topology.gpus:
        place = ["--include", "localhost:" + ",".join(map(str, topology.gpus))]
    else:
        place = ["--num_gpus", str(topology.ranks)]
    # Not a regular file, so taken for "no hostfile"; the default, /job/hostfile, may exist and name other machines.
    flags = ["--hostfile=/dev/null", *place, f"--master_port={topology.master_port}"]
    return runner_command(python, flags, [program, *args], verbose=verbose)


def environment(topology: LocalTopology, base: Mapping[str, str]) -> dict[str, str]:
    """The environment for `deepspeed_command`: `base` with accelerator and threads, without stale rank numbers."""
    env = {k: v for k, v in base.items() if k not in STALE and k != "CUDA_VISIBLE_DEVICES"}  # now in gpus
    env["OMP_NUM_THREADS"] = str(topology.threads)
    if topology.gpus:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # indices are nvidia-smi's
    else:
        env["DS_ACCELERATOR"] = "cpu"
    return env


def shell_line(command: Sequence[str], env: Mapping[str, str], base: Mapping[str, str], cwd: str | None = None) -> str:
    """A line for a shell with the environment `base` that runs `command` with exactly `env`, in `cwd` if given."""
    unset = [word for k in sorted(set(base) - set(env)) for word in ("-u", k)]
    changed = [f"{k}={v}" for k, v in sorted(env.items()) if base.get(k) != v]
    line = shlex.join(["env", *unset, *changed, *command])
    return line if cwd is None else f"cd {shlex.quote(cwd)} && {line}"
