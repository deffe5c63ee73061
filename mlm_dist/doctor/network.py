"""What lies between the ranks: clocks, links, collectives; and how fast each rank is by itself. Facts only.

Every operation has a timeout. It is measured by stages, before each of which the ranks meet at a gate of the store: those that
have no part in a stage wait there, for as long as it may take, and not in a collective. What fails ends a rank's measuring, is a
fact, and opens the gates, so that those who wait learn of it at once. Group sizes and the number of repetitions are the same on
all ranks: they depend on times that were reduced over them.

Bus bandwidth of an all-reduce of S bytes in t seconds on n ranks is S/t * 2(n-1)/n, which a link of that bandwidth would
explain whatever n (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist.doctor.bounded import bounded

TIMEOUT_S = 20.0
# What a stage may take of a network that works: 22 all-reduces of LONGEST_S, and smaller ones.
STAGE_S = 90.0
# More for each rank where they all connect to each other: each reads the addresses of all from one store.
CONNECT_S = 0.1
SPEED_S = 60.0
TINY = 8  # bytes of what latencies are measured with
SIZES = (64 << 10, 1 << 20, 16 << 20, 128 << 20)
LINK_BYTES = 8 << 20
# An all-reduce that would take longer than this is left out, and larger ones.
LONGEST_S = 3.0
CLOCK_TRIPS = 8
TRIPS = 40  # the fastest counts: most wait for a core now and then
SPEED = "computing"
OTHERS = "another rank failed"

Groups = dict[tuple[str, str], dist.ProcessGroup]


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
    facts: dict[str, Any] = {"collectives": [], "links": []}
    world = sum(map(len, hosts))
    stages = list(_stages(facts, store, rank, hosts, device, quick))
    if world == 1:
        del stages[1:]
    stage = 0
    try:
        for stage, (_name, work) in enumerate(stages):
            if stage:
                _gate(store, stage, world)
            work()
    except Exception as error:  # gloo and NCCL raise several kinds
        facts["error"] = {"phase": stages[stage][0], "cause": (str(error).splitlines() or [repr(error)])[0][:300]}
        with contextlib.suppress(RuntimeError):  # rank 0 has gone, and the store with it
            for later in range(1, len(stages)):
                store.set(f"gate/{later}", OTHERS)
    return facts


def _gate(store: dist.Store, stage: int, world: int) -> None:
    """Return when every rank is here. Raises RuntimeError when one has failed, or took longer than a stage may."""
    key = f"gate/{stage}"
    if store.add(f"here/{stage}", 1) == world:
        store.set(key, "")
    store.wait([key], timedelta(seconds=STAGE_S + CONNECT_S * world))
    if cause := store.get(key).decode():
        raise RuntimeError(cause)


def _stages(
    facts: dict[str, Any],
    store: dist.Store,
    rank: int,
    hosts: Sequence[Sequence[int]],
    device: torch.device,
    quick: bool,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what this rank does in it, which fills the facts): the same names on every rank."""
    leaders = [ranks[0] for ranks in hosts]
    backends = ("gloo", "nccl") if device.type == "cuda" else ("gloo",)
    groups: Groups = {}

    def compute() -> None:
        facts["speed"] = bounded(lambda: speed(device), SPEED_S)
        if "error" in facts["speed"]:
            raise RuntimeError(facts.pop("speed")["error"])

    def join() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # Else torch's watchdog ends the process at a timeout, and with it what was found.
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        world = sum(map(len, hosts))
        longer = timedelta(seconds=TIMEOUT_S + CONNECT_S * world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=longer)
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S))

    def tell_time() -> None:
        facts["clock"] = clocks(rank, leaders)

    def link(backend: str) -> None:
        if rank in leaders and len(hosts) > 1:
            # With one rank on each host these are all ranks.
            group = groups.get((backend, "across hosts")) or groups[backend, "all ranks"]
            facts["links"] += [
                {"backend": backend, **one} for one in links(rank, leaders, _on(backend, device), group, quick)
            ]

    def reduce(backend: str, name: str) -> None:
        group = groups.get((backend, name))
        if group is not None and (ranks := dist.get_world_size(group)) > 1:
            rows = all_reduces(group, _on(backend, device), SIZES[: 2 if quick else None])
            if dist.get_rank(group) == 0:
                facts["collectives"].append({"group": name, "backend": backend, "ranks": ranks, "rows": rows})

    yield SPEED, compute
    yield "joining over gloo", join
    yield "clocks", tell_time
    yield "making groups", lambda: groups.update(_groups(rank, hosts, backends))
    for backend in backends:
        yield f"links over {backend}", lambda backend=backend: link(backend)  # type: ignore[misc]
    for name in ("within host", "all ranks", "across hosts"):
        for backend in backends:
            yield f"all-reduce {name} over {backend}", lambda backend=backend, name=name: reduce(backend, name)  # type: ignore[misc]
    yield "leaving", lambda: None


def _on(backend: str, device: torch.device) -> torch.device:
    return device if backend == "nccl" else torch.device("cpu")


def _groups(rank: int, hosts: Sequence[Sequence[int]], backends: Sequence[str]) -> Groups:
    """(backend, name) -> the groups that this rank is in: its host's ranks, all, and the hosts' first ranks where these are fewer.

    Of gloo the group of all ranks is the one that they joined: another would be as many connections again, which grow with
    their square. Only members make a group. torch then names it by its members and by how many groups the rank has, which must
    be the same for all of them: so those that every rank has one of come first, also where a host's has one member.
    """
    leaders = [ranks[0] for ranks in hosts]
    mine = next(ranks for ranks in hosts if rank in ranks)
    every = sorted(rank for ranks in hosts for rank in ranks)
    limit = timedelta(seconds=TIMEOUT_S)

    def new(ranks: Sequence[int], backend: str) -> dist.ProcessGroup:
        return dist.new_group(list(ranks), timeout=limit, backend=backend, use_local_synchronization=True)

    made = {(backend, "within host"): new(mine, backend) for backend in backends}
    if len(hosts) > 1:
        for backend in backends:
            whole = dist.group.WORLD if backend == "gloo" else new(every, backend)
            assert whole is not None
            made[backend, "all ranks"] = whole
        if len(hosts) < len(every) and rank in leaders:
            made |= {(backend, "across hosts"): new(leaders, backend) for backend in backends}
    return made


def finish(work: dist.Work | None, device: torch.device) -> None:
    """Wait for an operation. Raises RuntimeError at its timeout.

    Of NCCL by looks first: its own wait that ends in time sleeps for milliseconds, which is more than what is measured.
    """
    assert work is not None
    deadline = time.monotonic() + TIMEOUT_S
    while device.type == "cuda" and not work.is_completed():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out after {TIMEOUT_S:.0f} s")
    work.wait()


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
        finish((dist.isend if sends else dist.irecv)(tensor, peer, group=group), tensor.device)


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
        finish(dist.all_reduce(values, group=group, async_op=True), device)
        start = time.perf_counter()
        for i in range(tries):
            work = dist.all_reduce(values, group=group, async_op=True)
            if device.type == "cpu" or i == tries - 1:  # NCCL's follow one another by themselves
                finish(work, device)
        mean = torch.tensor([(time.perf_counter() - start) / tries], dtype=torch.float64, device=device)
        finish(dist.all_reduce(mean, dist.ReduceOp.MAX, group=group, async_op=True), device)
        rows.append([size, float(mean[0])])
    return rows


def bus_bandwidth(size: float, seconds: float, ranks: int) -> float:
    """Bytes/s (see the module)."""
    return size / seconds * 2 * (ranks - 1) / ranks
