"""Judges of what hosts are: pure functions from facts to findings."""

from __future__ import annotations

from mlm_dist.doctor.findings import Finding, Level, Report, differing, failed, names, spans

# Other versions of these change nothing in what a run computes.
HARMLESS = ("platform", "wandb")
SHM_BYTES = 1 << 30
BUSY_BYTES = 2 << 30
INSTALL = "install the same environment on all hosts, best on a file system that they share"


def host(report: Report) -> list[Finding]:
    """All of them."""
    return [*layout(report), *versions(report), *imports(report), *gpus(report), *devices(report), *limits(report)]


def layout(report: Report) -> list[Finding]:
    """How ranks lie on hosts."""
    found = []
    for name, ranks in report.hosts.items():
        numbers = [(report.local[rank] or {}).get("local_rank") for rank in ranks]
        if len(set(numbers)) < len(numbers):
            found.append(
                Finding(
                    "red",
                    "ranks",
                    f"{name}: several of the ranks {spans(ranks)} have the same LOCAL_RANK",
                    "give hosts different names, or mend the launcher: LOCAL_RANK counts from 0 on each host",
                )
            )
    if uneven := differing({name: f"{len(ranks)} ranks" for name, ranks in report.hosts.items()}):
        found.append(
            Finding(
                "yellow", "ranks", uneven, "start as many ranks on each host; the steps take as long as the fullest"
            )
        )
    if not found:
        each = len(next(iter(report.hosts.values())))
        found.append(
            Finding(
                "green",
                "ranks",
                f"{report.world} on {len(report.hosts)} host{'s' * (len(report.hosts) > 1)}, {each} on each",
            )
        )
    return found


def versions(report: Report) -> list[Finding]:
    """Software that is not the same everywhere."""
    found = failed(report, "versions", "versions", "mend the installation on that host")
    by_host = report.by_host("versions")
    items = list(dict.fromkeys(item for facts in by_host.values() for item in facts))
    for item in items:
        told = differing({name: facts.get(item) or "none" for name, facts in by_host.items()})
        if told:
            level: Level = "yellow" if item in HARMLESS else "red"
            remedy = "check out the same commit on all hosts" if item == "commit" else INSTALL
            found.append(Finding(level, "versions", f"{item}: {told}", remedy))
    if not found and by_host:
        one = next(iter(by_host.values()))
        said = ", ".join(
            f"{item} {one[item]}" for item in ("python", "torch", "deepspeed", "transformers") if item in one
        )
        found.append(Finding("green", "versions", f"{said}{', the same on all hosts' if len(by_host) > 1 else ''}"))
    return found


def imports(report: Report) -> list[Finding]:
    """Packages that are installed and cannot be used."""
    return failed(report, "imports", "imports", "run `python -c 'import deepspeed'` on that host and mend what it says")


def gpus(report: Report) -> list[Finding]:
    """GPUs by the driver."""
    found = failed(report, "gpus", "GPUs", "run nvidia-smi on that host; a driver that does not answer needs a reboot")
    by_host = report.by_host("gpus")
    if not any(facts["installed"] for facts in by_host.values()):
        return found or [Finding("green", "GPUs", "none; ranks train on CPUs")]
    kinds = {name: sorted({gpu["name"] for gpu in facts["installed"]}) for name, facts in by_host.items()}
    compared: tuple[tuple[Level, dict[str, str], str], ...] = (
        (
            "red" if not all(facts["installed"] for facts in by_host.values()) else "yellow",
            {name: f"{len(facts['installed'])} GPUs" for name, facts in by_host.items()},
            "exclude the host that lacks some (srun --exclude), and report it",
        ),
        (
            "yellow",
            {name: " and ".join(kind) or "no GPU" for name, kind in kinds.items()},
            "ask for one kind of GPU (--constraint or --gres); the slowest one sets the pace",
        ),
        ("yellow", {name: f"driver {facts['driver']}" for name, facts in by_host.items()}, "report it"),
    )
    for level, values, remedy in compared:
        if told := differing(values):
            found.append(Finding(level, "GPUs", told, remedy))
    cpu_builds = [
        name
        for name, facts in report.by_host("versions").items()
        if facts.get("torch build") == "CPU" and by_host.get(name, {}).get("installed")
    ]
    if cpu_builds:
        found.append(
            Finding(
                "red",
                "GPUs",
                f"{names(cpu_builds)}: GPUs are there, and torch is a build for CPUs",
                "install torch with CUDA (https://pytorch.org/get-started)",
            )
        )
    idle = [name for name, facts in by_host.items() if len(facts["installed"]) > len(report.hosts[name])]
    if idle:
        counts = f"{len(report.hosts[idle[0]])} ranks, {len(by_host[idle[0]]['installed'])} GPUs"
        found.append(
            Finding(
                "yellow",
                "GPUs",
                f"{names(idle)}: {counts}; some stay idle",
                "start a rank for each GPU if they are yours",
            )
        )
    if not found:
        name, facts = next(iter(by_host.items()))
        found.append(
            Finding(
                "green", "GPUs", f"{len(facts['installed'])} x {kinds[name][0]} on each host, driver {facts['driver']}"
            )
        )
    return found


def devices(report: Report) -> list[Finding]:
    """The GPU of each rank as torch sees it."""
    found = []
    facts = {rank: one["device"] for rank, one in enumerate(report.local) if one and "device" in one}
    broken = {rank: device["error"] for rank, device in facts.items() if "error" in device}
    for rank, cause in broken.items():
        found.append(
            Finding("red", "GPUs", f"rank {rank} on {report.host_of(rank)}: {cause}", "exclude the host, and report it")
        )
    seen = {rank: device for rank, device in facts.items() if "error" not in device}
    with_gpu = {rank: device for rank, device in seen.items() if "name" in device}
    without = {rank: device for rank, device in seen.items() if "name" not in device}
    installed = report.by_host("gpus")
    hidden = [rank for rank in without if installed.get(report.host_of(rank), {}).get("installed")]
    if without and (with_gpu or any(device["visible"] for device in without.values()) or hidden):
        rank, device = next(iter(without.items()))
        local = (report.local[rank] or {}).get("local_rank")
        hosts = list(dict.fromkeys(map(report.host_of, without)))
        found.append(
            Finding(
                # A host whose GPUs are hidden on purpose trains on CPUs, if all do.
                "red" if with_gpu or device["visible"] else "yellow",
                "GPUs",
                f"rank {spans(sorted(without))} on {names(hosts)}: no GPU of its own (LOCAL_RANK {local}, {device['visible']} visible)",
                "start at most one rank for each GPU, and let each task see all GPUs of its host (--gpus-per-node, not --gpus-per-task); "
                "see CUDA_VISIBLE_DEVICES",
            )
        )
    for rank, device in with_gpu.items():
        if device["total"] - device["free"] > BUSY_BYTES:
            used = (device["total"] - device["free"]) / 2**30
            found.append(
                Finding(
                    "yellow",
                    "GPUs",
                    f"rank {rank} on {report.host_of(rank)}: {used:.1f} GiB of its GPU are taken already",
                    "see nvidia-smi there for what an earlier job left behind",
                )
            )
    nccl = {f"rank {rank} ({report.host_of(rank)})": f"NCCL {device['nccl']}" for rank, device in with_gpu.items()}
    if told := differing(nccl):
        found.append(Finding("red", "GPUs", told, INSTALL))
    return found


def limits(report: Report) -> list[Finding]:
    """Resource limits."""
    found = failed(report, "limits", "limits", "")
    by_host = report.by_host("limits")
    need = 256 + 4 * report.world  # connections of each process group and of the rendezvous, and files
    few = [name for name, facts in by_host.items() if facts["open_files"] < need]
    locked = [name for name, facts in by_host.items() if facts["infiniband"] and facts["memlock"] >= 0]
    several = {name for name, ranks in report.hosts.items() if len(ranks) > 1}
    cuda = {report.host_of(rank) for rank, one in enumerate(report.local) if one and "name" in one.get("device", {})}
    small = [name for name in by_host if name in several & cuda and (by_host[name]["shm"] or 0) < SHM_BYTES]
    if few:
        found.append(
            Finding(
                "red" if min(by_host[name]["open_files"] for name in few) < report.world + 64 else "yellow",
                "limits",
                f"{names(few)}: at most {by_host[few[0]]['open_files']} open files; {report.world} ranks may need {need}",
                "have the hard limit raised (ulimit -Hn; LimitNOFILE of slurmd); the soft one is raised by the program",
            )
        )
    if locked:
        found.append(
            Finding(
                "yellow",
                "limits",
                f"{names(locked)}: locked memory is limited to {by_host[locked[0]]['memlock']} bytes, and InfiniBand needs it",
                "ulimit -l unlimited, or ask the administrator",
            )
        )
    if small:
        found.append(
            Finding(
                "yellow",
                "limits",
                f"{names(small)}: {(by_host[small[0]]['shm'] or 0) / 2**20:.0f} MiB free in /dev/shm, through which NCCL moves data within a host",
                "start the container with --shm-size=1g or --ipc=host",
            )
        )
    return found or [Finding("green", "limits", "open files, locked memory and /dev/shm suffice")]
