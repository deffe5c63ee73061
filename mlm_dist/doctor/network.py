"""What lies between the ranks: clocks, links, collectives; and how fast each rank is by itself. Facts only.

Every operation has a timeout. What fails ends a rank's measuring and is a fact; those who wait for that rank fail by the same
timeout. Group sizes and the number of repetitions are the same on all ranks: they depend on times that were reduced over them.

Bus bandwidth of an all-reduce of S bytes in t seconds on n ranks is S/t * 2(n-1)/n, which a link of that bandwidth would
explain whatever n (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 20.0
TINY = 8  # bytes of what latencies are measured with
SIZES = (64 << 10, 1 << 20, 16 << 20, 128 << 20)
LINK_BYTES = 8 << 20
# An all-reduce that would take longer than this is left out, and larger ones.
LONGEST_S = 3.0
CLOCK_TRIPS = 8
TRIPS = 40  # the fastest counts: most wait for a core now and then


def measure(
    store: dist.Store,
    rank: int,
    hosts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    quick: bool,
) -> dict[str, Any]:
    """Everything, as this rank sees it. Collective.

    Args:
        store: of the rendezvous.
        hosts: the ranks of each host, ascending.
        device: that the rank trains on. All ranks have GPUs, or none takes part in NCCL's measurements.

    Returns:
        {speed, clock, links, collectives}, and ``error`` {phase, cause} where something failed; then what came after it is absent.
    """
    facts: dict[str, Any] = {"speed": speed(device), "collectives": [], "links": []}
    world = sum(map(len, hosts))
    if world == 1:
        return facts
    leaders = [ranks[0] for ranks in hosts]
    limit = timedelta(seconds=TIMEOUT_S)
    phase = "joining over gloo"
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        dist.barrier()
        phase = "clocks"
        facts["clock"] = clocks(rank, leaders)
        phase = "making groups"
        backends = ("gloo", "nccl") if device.type == "cuda" else ("gloo",)
        made = _groups(rank, hosts, backends, limit)
        for backend in backends:
            on = device if backend == "nccl" else torch.device("cpu")
            across = made.get((backend, "across hosts"))
            if across is not None:
                phase = f"links over {backend}"
                facts["links"] += [{"backend": backend, **link} for link in links(rank, leaders, on, across, quick)]
        for (backend, name), group in made.items():
            phase = f"all-reduce {name} over {backend}"
            ranks = dist.get_world_size(group)
            if ranks > 1:
                on = device if backend == "nccl" else torch.device("cpu")
                rows = all_reduces(group, on, SIZES[: 2 if quick else None])
                if dist.get_rank(group) == 0:
                    facts["collectives"].append({"group": name, "backend": backend, "ranks": ranks, "rows": rows})
        phase = "leaving"
        dist.barrier()
    except Exception as error:  # gloo and NCCL raise several kinds
        facts["error"] = {"phase": phase, "cause": (str(error).splitlines() or [repr(error)])[0][:300]}
    return facts


def _groups(
    rank: int, hosts: Sequence[Sequence[int]], backends: Sequence[str], limit: timedelta
) -> dict[tuple[str, str], dist.ProcessGroup | None]:
    """(backend, name) -> the groups that this rank is in: its host's ranks, the hosts' first ranks, and all.

    Only members make a group: with all ranks in the making of every one, that would grow with their square. torch then names it
    by its members and by how many groups the rank has, which must be the same for all of them: so those that every rank has one
    of come first, also where a host's has one member.
    """
    leaders = [ranks[0] for ranks in hosts]
    mine = next(ranks for ranks in hosts if rank in ranks)
    every = sorted(rank for ranks in hosts for rank in ranks)

    def new(ranks: Sequence[int], backend: str) -> dist.ProcessGroup | None:
        return dist.new_group(list(ranks), timeout=limit, backend=backend, use_local_synchronization=True)

    made = {(backend, "within host"): new(mine, backend) for backend in backends}
    if len(hosts) > 1:
        made |= {(backend, "all ranks"): new(every, backend) for backend in backends}
        if rank in leaders:
            made |= {(backend, "across hosts"): new(leaders, backend) for backend in backends}
    return made


# ---- each rank by itself ----


def speed(device: torch.device) -> dict[str, float]:
    """Rates that tell a slow or busy host from the others: products of matrices in TFLOP/s, copies of memory in GB/s.

    All ranks do it at the same time, as in training.
    """
    cuda = device.type == "cuda"
    n, dtype = (4096, torch.bfloat16) if cuda else (512, torch.float32)
    a = torch.ones(n, n, device=device, dtype=dtype)
    source = torch.ones((256 if cuda else 32) << 20, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "tflops": 2 * n**3 / best_time(lambda: a @ a, device, 10) / 1e12,
        "copy_gb_s": 2 * source.numel() / best_time(lambda: target.copy_(source), device, 10) / 1e9,
    }


def best_time(work: Callable[[], Any], device: torch.device, tries: int) -> float:
    """Seconds of the fastest of so many, after one that does not count."""
    best = float("inf")
    for i in range(tries + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best


# ---- clocks ----


def now() -> float:
    """This host's clock, Unix seconds."""
    return time.time()


def clocks(rank: int, leaders: Sequence[int]) -> list[dict[str, float]] | None:
    """On rank 0, for each other host's first rank: how far its clock is ahead in seconds, and how wrong that may be.

    By midpoints (Cristian 1989): the other clock is read between two readings of ours, at the middle of them give or take half
    their distance; the nearest two of several count.
    """
    assert leaders[0] == 0
    if rank not in leaders:
        return None
    mine, theirs = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    if rank != 0:
        for _ in range(CLOCK_TRIPS):
            dist.recv(mine, 0)
            dist.send(torch.tensor([now()], dtype=torch.float64), 0)
        return None
    found = []
    for other in leaders[1:]:
        trips = []
        for _ in range(CLOCK_TRIPS):
            before = now()
            dist.send(mine, other)
            dist.recv(theirs, other)
            after = now()
            trips.append((after - before, float(theirs[0]) - (before + after) / 2))
        trip, offset = min(trips)
        found.append({"rank": other, "offset": offset, "uncertain": trip / 2})
    return found


# ---- links ----


def exchange(tensor: torch.Tensor, peer: int, first: bool, group: dist.ProcessGroup) -> None:
    """Send ``tensor`` to ``peer`` and have it back; the peer calls it with the other ``first``."""
    for sends in (first, not first):
        if sends:
            dist.send(tensor, peer, group=group)
        else:
            dist.recv(tensor, peer, group=group)


def links(
    rank: int, leaders: Sequence[int], device: torch.device, group: dist.ProcessGroup, quick: bool
) -> list[dict[str, Any]]:
    """Latency in seconds and bandwidth in bytes/s between each host and the next one of a ring, as measured by the former.

    Links that have no host in common are measured at the same time, so that it takes two or three phases whatever the number of
    hosts.
    """
    n, me = len(leaders), leaders.index(rank)
    found = []
    for phase in phases(n):
        dist.barrier(group=group)
        for a, b in phase:
            if me not in (a, b):
                continue
            peer = leaders[b if me == a else a]
            tiny = torch.zeros(TINY, dtype=torch.uint8, device=device)
            large = torch.zeros(LINK_BYTES >> 3 * quick, dtype=torch.uint8, device=device)
            trip = best_time(lambda: exchange(tiny, peer, me == a, group), device, TRIPS)  # noqa: B023
            whole = best_time(lambda: exchange(large, peer, me == a, group), device, 3)  # noqa: B023
            if me == a:
                found.append({"ranks": [rank, peer], "latency": trip / 2, "bandwidth": 2 * large.numel() / whole})
    return found


def phases(n: int) -> list[list[tuple[int, int]]]:
    """The links of a ring of n, in sets that have no end in common."""
    ring = [(i, (i + 1) % n) for i in range(n if n > 2 else n - 1)]
    last = [ring.pop()] if n > 2 and n % 2 else []
    return [part for part in (ring[::2], ring[1::2], last) if part]


# ---- collectives ----


def all_reduces(group: dist.ProcessGroup | None, device: torch.device, sizes: Sequence[int]) -> list[list[float]]:
    """[bytes, seconds] of an all-reduce of fp32 numbers, the slowest rank's mean of several; large ones only while they are quick."""
    rows: list[list[float]] = []
    for size in (TINY, *sizes):
        if rows and rows[-1][1] * size / rows[-1][0] > LONGEST_S and size > sizes[0]:
            break
        values = torch.zeros(size // 4, device=device)
        tries = 20 if size <= 1 << 20 else 4
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(tries):
            dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        mean = torch.tensor([(time.perf_counter() - start) / tries], dtype=torch.float64, device=device)
        dist.all_reduce(mean, dist.ReduceOp.MAX, group=group)
        rows.append([size, float(mean[0])])
    return rows


def bus_bandwidth(size: float, seconds: float, ranks: int) -> float:
    """Bytes/s (see the module)."""
    return size / seconds * 2 * (ranks - 1) / ranks
