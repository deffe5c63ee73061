"""What this machine offers and how many ranks go on it, found without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlm_dist.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine: its index in PCI order and its UUID (`GPU-...`)."""

    index: int
    uuid: str


@dataclass(frozen=True)
class LocalTopology:
    """`ranks` processes on this machine; `gpus` holds the physical index of each rank's GPU, or nothing on CPU."""

    ranks: int
    gpus: tuple[int, ...]
    threads: int  # OMP_NUM_THREADS of each rank
    master_port: int


def cpu_count() -> int:
    """Cores this process may use: its affinity mask, less if a cgroup (v2) quota gives it less. At least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torch_is_cpu_build() -> bool:
    """Whether the installed torch can use no GPU."""
    try:
        return "+cpu" in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver shows to this process; none when torch is a CPU build or there is no driver."""
    if torch_is_cpu_build():
        return []
    if not shutil.which("nvidia-smi"):
        # Device nodes rather than /proc/driver/nvidia/gpus: a container may have been given only some of the latter.
        nodes = (re.fullmatch(r"nvidia(\d+)", p.name) for p in Path("/dev").glob("nvidia*"))
        return [Gpu(i, "") for i in sorted(int(m[1]) for m in nodes if m)]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(",") for line in listing.splitlines() if line.count(",") == 1)
    return [Gpu(int(index), uuid.strip()) for index, uuid in rows]


def visible_gpus(environ: Mapping[str, str], gpus: Callable[[], list[Gpu]] = list_gpus) -> tuple[int, ...]:
    """Physical indices of the GPUs to use, in the order of CUDA_VISIBLE_DEVICES where that is set.

    The deepspeed launcher ignores CUDA_VISIBLE_DEVICES when it is told a number of GPUs, and knows GPUs by index only,
    so both are settled here. As CUDA does, the list ends at the first entry that names no GPU.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES names a MIG slice.
    """
    if environ.get("DS_ACCELERATOR", "cuda") != "cuda":
        return ()
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and chosen.strip() in ("", "-1", "NoDevFiles"):
        return ()
    present = gpus()
    if chosen is None or not present:
        return tuple(g.index for g in present)
    indices: list[int] = []
    for entry in (e.strip() for e in chosen.split(",")):
        if entry.startswith("MIG-"):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={chosen}: the deepspeed launcher cannot place ranks on MIG slices; "
                "start one process with `python -m mlm_dist.train`, or name whole GPUs"
            )
        match = [g.index for g in present if entry and (str(g.index) == entry or g.uuid.startswith(entry))]
        if not match:
            break
        indices.append(match[0])
    return tuple(indices)


def threads_per_rank(ranks: int, environ: Mapping[str, str]) -> int:
    """OMP_NUM_THREADS where that is set, else an equal share of this host's cores for each of its `ranks`."""
    given = environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) > 0 else max(1, cpu_count() // ranks)


def local_topology(
    requested: int | None, environ: Mapping[str, str], *, master_port: int | None = None
) -> LocalTopology:
    """Places `requested` ranks here (default: one per GPU, or one on CPU), one GPU to each if there are any.

    Raises:
        UserError: `requested` is below 1 or above the number of GPUs.
    """
    gpus = visible_gpus(environ)
    ranks = requested if requested is not None else max(1, len(gpus))
    if ranks < 1:
        raise UserError(f"-n {ranks}: at least one rank is needed")
    if gpus and ranks > len(gpus):
        raise UserError(
            f"-n {ranks}: only {len(gpus)} GPU(s) here; ask for at most {len(gpus)}, "
            "or set DS_ACCELERATOR=cpu to train on the CPU"
        )
    port = master_port if master_port is not None else free_port()
    return LocalTopology(ranks, gpus[:ranks], threads_per_rank(ranks, environ), port)
