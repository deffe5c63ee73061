"""What this machine or SLURM job offers and how many ranks go on it, found without importing torch. Only this module reads `SLURM_*`."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlm_dist.errors import UserError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


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


# SLURM ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that this process belongs to.

    Attributes:
        job_id: number of the job; of an element of an array, the element's own.
        lineage: what stays the same over requeues and over the elements of one array.
        restarts: how often the job was requeued.
        is_first: neither a requeued job nor a later element of an array.
        is_last: no later element of its array follows.
        nodes: names of its nodes, in SLURM's order.
    """

    job_id: str
    lineage: str
    restarts: int
    is_first: bool
    is_last: bool
    nodes: tuple[str, ...]


def slurm_job(environ: Mapping[str, str]) -> SlurmJob | None:
    """The job described by the `SLURM_*` variables; None outside of one."""
    if "SLURM_JOB_ID" not in environ:
        return None
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    element, first, last = (environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX"))
    return SlurmJob(
        job_id=environ["SLURM_JOB_ID"],
        lineage=environ.get("SLURM_ARRAY_JOB_ID") or environ["SLURM_JOB_ID"],
        restarts=restarts,
        is_first=restarts == 0 and element == first,
        is_last=element == last,
        nodes=tuple(expand_nodes(environ.get("SLURM_JOB_NODELIST", ""))),
    )


def expand_nodes(nodelist: str) -> list[str]:
    """The names in a SLURM node list: `a[1-2,04]-ib,b` is a1-ib, a2-ib, a04-ib, b.

    Here and not by `scontrol show hostnames`, which containers have not.

    Raises:
        UserError: brackets that do not match, or a range that is none.
    """
    word = r"(?:[^][,]|\[[^][]*\])+"  # commas within brackets do not separate
    if not re.fullmatch(rf"(?:{word}(?:,{word})*)?", nodelist):
        raise UserError(f"node list {nodelist!r}: brackets or commas are not as SLURM writes them")
    names: list[str] = []
    for found in re.findall(word, nodelist):
        parts = re.split(r"\[([^]]*)\]", found)
        choices = [_expand_ranges(part, nodelist) if i % 2 else [part] for i, part in enumerate(parts)]
        names += map("".join, itertools.product(*choices))
    return names


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"node list {nodelist!r}: {part!r} is not a range of numbers")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def _tasks_by_node(counts: str) -> list[int]:
    """`2(x3),1` is [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def slurm_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """The launch variables of one task of `srun`: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, and OMP_NUM_THREADS.

    Rank 0 runs on the first node of the step's list; ranks of one node meet on its loopback interface.
    The port follows from the job and the step, so that jobs that share a node
    do not meet; what is set already (MASTER_PORT, OMP_NUM_THREADS) stays. Threads are the task's CPUs, or an even share of the
    node's. Empty outside of `srun`, and where another launcher has set RANK.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return {}
    nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    node = int(environ.get("SLURM_NODEID") or 0)
    tasks = _tasks_by_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1")
    here = tasks[min(node, len(tasks) - 1)]
    # With a GPU bound to each task that GPU is the only one, number 0, that the task sees.
    bound = here > 1 and re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")) is not None
    share = int(environ.get("SLURM_CPUS_ON_NODE") or cpu_count()) // here
    threads = int(environ.get("SLURM_CPUS_PER_TASK") or share)
    number = int(environ.get("SLURM_JOB_ID") or 0) + 37 * int(environ.get("SLURM_STEP_ID") or 0)
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"],
        "LOCAL_RANK": "0" if bound else environ["SLURM_LOCALID"],
        "MASTER_ADDR": nodes[0] if len(nodes) > 1 else "127.0.0.1",  # by which a run of one host stays off the network
        "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + number % 10000),
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, min(threads, cpu_count()))),
    }
    # The first node towards another one: its own name may stand for the loopback.
    if len(nodes) > 1 and "GLOO_SOCKET_IFNAME" not in environ and (name := interface_towards(nodes[node == 0])):
        found["GLOO_SOCKET_IFNAME"] = name
    return found


def slurm_node_rank(environ: Mapping[str, str]) -> int:
    """The place of a task's node in its SLURM step, from 0. Raises UserError outside of one."""
    if "SLURM_NODEID" not in environ:
        raise UserError("no SLURM step here (SLURM_NODEID is not set); start it with srun")
    return int(environ["SLURM_NODEID"])


def interface_towards(host: str) -> str | None:
    """The network interface of this host that packets to `host` leave by; None when that is the loopback or cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
            if address.startswith("127."):
                return None
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):  # an interface without an address
                    if socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24]) == address:
                        return name
    except OSError:
        return None
    return None
