"""Process groups: where this rank stands, the collectives of the model, and a second CPU group for decisions.

Only the environment that every launcher agrees on is read (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`,
`MASTER_PORT`); turning SLURM's or a host list's variables into these is the launcher's work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist.errors import UserError

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Topology:
    """Where this process stands in the job."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_env(cls) -> Topology:
        """Reads `RANK`, `WORLD_SIZE`, `LOCAL_RANK`; with none of them set this is a job of one process.

        Raises UserError when only some are set, or when they are no numbers or contradict each other: guessing would
        start a job whose ranks disagree about its size and hang.
        """
        given = {name: os.environ[name] for name in _LAUNCH_VARIABLES if os.environ.get(name)}
        if not given:
            return cls(rank=0, local_rank=0, world_size=1)
        absent = [name for name in _LAUNCH_VARIABLES if name not in given]
        if absent:
            raise UserError(
                f"environment: {', '.join(given)} is set but {', '.join(absent)} is not; "
                "start with mlm-launch, deepspeed or torchrun, which set them all, or unset them for one process"
            )
        try:
            rank, world_size, local_rank = (int(given[name]) for name in _LAUNCH_VARIABLES)
        except ValueError:
            raise UserError(f"environment: {', '.join(_LAUNCH_VARIABLES)} must be integers, got {given}") from None
        if not (0 <= rank < world_size and 0 <= local_rank <= rank):
            raise UserError(
                f"environment: RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size} contradict each other; "
                "right is 0 <= LOCAL_RANK <= RANK < WORLD_SIZE"
            )
        return cls(rank=rank, local_rank=local_rank, world_size=world_size)

    @property
    def device(self) -> torch.device:
        """The device that this rank trains on."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


def meeting_point(topology: Topology) -> tuple[str, int]:
    """Host and port of the job's store, by `MASTER_ADDR` and `MASTER_PORT`. Raises UserError where they name none."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise UserError(
            f"environment: MASTER_ADDR={host!r}, MASTER_PORT={port!r}; {topology.world_size} rank(s) need a host and a port to meet at; "
            "start with mlm-launch, deepspeed or torchrun, which set them"
        )
    return host, int(port)


def init(timeout_s: float = 1800.0, *, deterministic: bool = False, deepspeed: bool = True) -> Topology:
    """Joins the job: the default process group (NCCL for CUDA tensors and gloo for CPU ones, or gloo alone) and, with
    `deepspeed`, DeepSpeed's.

    Without a launcher it makes a group of one. `timeout_s` (seconds) bounds every collective. Call it once, before a
    model is built. `deterministic` makes CUDA give the same bits each time, at a price in speed (a CPU does so anyway);
    cuBLAS looks at that once, at its first product.
    """
    topology = Topology.from_env()
    if topology.world_size == 1 and "RANK" not in os.environ:
        # Port 0: the store listens where it likes, and nobody else has to find it.
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    meeting_point(topology)
    cuda = torch.cuda.is_available()
    if cuda:
        if topology.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"environment: LOCAL_RANK={topology.local_rank}, but this host has {torch.cuda.device_count()} GPU(s); "
                "start at most one rank for each GPU"
            )
        torch.cuda.set_device(topology.device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    allow_open_files()
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=timeout,
        **_loopback_store(topology, timeout),
        device_id=topology.device if cuda else None,
    )
    if deepspeed:
        _prepare_deepspeed(timeout_s)
    return topology


def _loopback_store(topology: Topology, timeout: timedelta) -> dict[str, Any]:
    """Arguments for `init_process_group` that keep a job of one host off the network; none where the ranks do not meet on the loopback interface.

    torch's store listens on every interface, wherever the ranks meet, unless it is given a socket; gloo and NCCL listen on the interface that the host's
    name stands for, unless they are told another.
    """
    if os.environ["MASTER_ADDR"] not in ("127.0.0.1", "localhost"):
        return {}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has the store
        return {}
    where, port = "127.0.0.1", meeting_point(topology)[1]
    listening = None
    if topology.rank == 0:
        try:
            listening = socket.create_server((where, port), backlog=topology.world_size + 16)
        except OSError as error:
            raise UserError(
                f"environment: MASTER_PORT={port} cannot be listened on ({error.strerror}); give a free port (--master-port)"
            ) from error
        port = listening.getsockname()[1]
    store = dist.TCPStore(
        where,
        port,
        topology.world_size,
        is_master=topology.rank == 0,
        timeout=timeout,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    return {"store": store, "rank": topology.rank, "world_size": topology.world_size}


def allow_open_files() -> None:
    """Raises the limit on open files as far as is allowed: gloo joins each rank to each other one in each of three groups, and 1024 files, a usual limit,
    are too few for 340 ranks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # where "unlimited" is not allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _prepare_deepspeed(timeout_s: float) -> None:
    """Sets DeepSpeed on top of the process group that exists, without its chatter and without needing a compiler."""
    import deepspeed
    from deepspeed import comm
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is giving up; nothing that a user could act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    # On CPU the first init_distributed() would build this shared-memory operator with a C++ compiler (75 s; fails
    # without one).
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), auto_mpi_discovery=False, verbose=False)
    assert comm.is_initialized()
    # ZeRO reduces over a copy of the world's group, which DeepSpeed would make with torch's default timeout.
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout_s))


class PendingSum:
    """A sum under way (see ControlGroup.start)."""

    def __init__(self, mine: torch.Tensor, parts: list[torch.Tensor] | None, work: dist.Work, group: Any) -> None:
        self._sum, self._parts, self._work, self._group = mine, parts, work, group

    def wait(self) -> list[int]:
        """The sums over all ranks; blocks until they are there. Every rank calls it once, before it goes on with the group."""
        self._work.wait()
        if self._parts is not None:
            self._sum = torch.stack(self._parts).sum(0)
        dist.broadcast(self._sum, src=0, group=self._group)
        return [int(v) for v in self._sum.tolist()]


class ControlGroup:
    """Decisions that all ranks must take alike: small collectives on host memory, in a gloo group of their own.

    Being apart from the model's group they neither wait for the GPU nor come between its collectives. Every rank has
    to make the same calls in the same order.
    """

    def __init__(
        self,
        timeout_s: float = 1800.0,
        waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`waiting` makes a context around each call that waits for other ranks."""
        self._waiting = waiting
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def start(self, values: list[int]) -> PendingSum:
        """Begins an exact int64 sum of `values`, element by element, over all ranks.

        Rank 0 gathers and broadcasts: gloo's all-reduce is a ring, whose 2 (W - 1) hops follow one another.
        """
        mine = torch.tensor(values, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)] if self.rank == 0 else None
        work = dist.gather(mine, parts, dst=0, group=self._group, async_op=True)
        return PendingSum(mine, parts, work, self._group)

    def sum(self, values: list[int]) -> list[int]:
        """The exact int64 sum of `values`, element by element, over all ranks."""
        with self._waiting():
            return self.start(values).wait()

    def gather(self, obj: Any) -> list[Any] | None:
        """Every rank's (picklable) `obj` in rank order on rank 0; None on the others."""
        parts: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        with self._waiting():
            dist.gather_object(obj, parts, dst=0, group=self._group)
        return parts

    def ask(self, values: Sequence[float]) -> tuple[list[list[float]], list[float]] | None:
        """Rank 0 sends each rank an empty question and gets its `values` (equally many on each) as the answer.

        Returns:
            On rank 0 every rank's values, and the seconds from the question to the answer by rank 0's clock (0 for itself); where
            all ranks wait for the question already, that is what their messages take. None on the others.
        """
        mine, question = torch.tensor([*values, 0.0], dtype=torch.float64), torch.zeros(1)
        with self._waiting():
            if self.rank:
                dist.recv(question, 0, group=self._group)
                dist.send(mine, 0, group=self._group)
                return None
            answers, seconds = [list(values)] * self.world_size, [0.0] * self.world_size
            asked: dict[int, float] = {}
            works: list[Any] = []
            for rank in range(1, self.world_size):
                asked[rank] = time.perf_counter()
                works.append(dist.isend(question, rank, group=self._group))
            for _ in range(1, self.world_size):
                answer = torch.empty_like(mine)
                rank = dist.recv(answer, group=self._group)  # whichever comes first
                answers[rank], seconds[rank] = answer[:-1].tolist(), time.perf_counter() - asked[rank]
            for work in works:
                work.wait()
        return answers, seconds

    def broadcast(self, obj: Any) -> Any:
        """Rank 0's (picklable) `obj` on every rank; what the others pass is not looked at."""
        box = [obj if self.rank == 0 else None]
        with self._waiting():
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        with self._waiting():
            dist.barrier(group=self._group)


def shutdown() -> None:
    """Leaves the job. Safe to call when init() never ran or failed halfway."""
    if dist.is_initialized():
        dist.destroy_process_group()
