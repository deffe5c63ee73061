"""Pure functions from a topology and a run to the command line and environment that start it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.topology import LocalTopology

REPORT_DIR = "LAUNCHER_REPORT_DIR"
LOG_DIR = "LAUNCHER_LOG_DIR"


def deepspeed_command(
    topology: LocalTopology, program: str, args: Sequence[str], *, python: str, verbose: bool = False
) -> list[str]:
    """The argument vector that runs `python -m program args` on every rank here under the deepspeed launcher.

    Each rank goes through `launcher.exec`, which passes on its arguments untouched. No shell reads the vector.
    """
    if topology.gpus:
        place = ["--include", "localhost:" + ",".join(map(str, topology.gpus))]
    else:
        place = ["--num_gpus", str(topology.ranks)]
    return [
        python,
        "-m",
        "deepspeed.launcher.runner",
        # Not a regular file, so taken for "no hostfile"; the default, /job/hostfile, may exist and name other machines.
        "--hostfile=/dev/null",
        *place,
        f"--master_port={topology.master_port}",
        "--no_local_rank",
        # Below critical it prints process ids, the environment and the whole command line of a rank that failed.
        f"--log_level={'info' if verbose else 'critical'}",
        "--module",
        "launcher.exec",
        program,
        *args,
    ]


def environment(topology: LocalTopology, base: Mapping[str, str]) -> dict[str, str]:
    """The environment for `deepspeed_command`: `base` with accelerator and threads, without stale rank numbers."""
    # Left over from another launcher these make DeepSpeed count devices or ranks wrongly.
    stale = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {k: v for k, v in base.items() if k not in stale and k != "CUDA_VISIBLE_DEVICES"}  # now in gpus
    env["OMP_NUM_THREADS"] = str(topology.threads)
    if topology.gpus:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # indices are nvidia-smi's
    else:
        env["DS_ACCELERATOR"] = "cpu"
    return env
