"""What a step, a checkpoint, a start and a resume cost on a cluster, by arithmetic alone: bytes, files, connections, and how each grows.

Which collectives DeepSpeed 0.19.8 makes at each ZeRO stage was counted, not looked up (tests/dist/test_plan_cluster.py counts them again): its stages 1 and 2
all-reduce whole gradients, where the paper (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 7) reduces and
scatters them. A ring that passes the nodes one after the other crosses each node's boundary once in and once out, however many GPUs a node has, and each edge
of a ring of n ranks carries S(n-1)/n bytes for a gathering or scattering of S bytes and twice that for an all-reduce
(https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Times are bytes over the stated speed, with no latency and nothing overlapped.

Speeds are bytes/s in one direction; W is the number of ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mlm_dist.plan_job import Model

Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]
# DeepSpeed's where a template is silent, in elements.
_PERSISTENCE, _MAX_LIVE = 100_000, 1_000_000_000
# Tensors that a checkpoint holds of each parameter: the weight and two moments.
TENSORS = 3
# Files beside the parts: optimizer.json, trainer.json, index.json, COMMIT.
_OTHER_FILES = 4
# gloo meshes of a run: the default group's, the control group's, DeepSpeed's copy of the default one.
GLOO_GROUPS = 3
# Of the doctor (tests hold them equal to its own, whose modules import torch): bytes of shards that it reads on a node at most,
# and round trips for each clock.
DOCTOR_BYTES, CLOCK_TRIPS = 256 << 20, 8
# Bytes/s that one core hashes (measured: 1.4 GB/s).
SHA256 = 1.4e9
# Assumed: one small message between two nodes over TCP, in seconds.
HOP_S = 20e-6
MESSAGE_S = 5e-6  # assumed: a small message of many that one process takes in

# What usual links carry each way, in bytes/s. A node of 8 H100 usually has 8 ports of 400 Gb/s.
LINKS = {
    "3200Gb": 400e9,
    "400Gb": 50e9,
    "200Gb": 25e9,
    "100Gb": 12.5e9,
    "25Gb": 3.125e9,
    "10Gb": 1.25e9,
}
# PCIe 4.0 with 16 lanes.
PCIE = 32e9
# GPU (the first that is found counts): bytes/s each way of one GPU, by NVLink half of what data sheets sum over both.
_INTRA = (
    (r"\b(GB200|B200|B100)\b", 900e9),
    (r"\b(PCIe|NVL|A40|A30|A10|A10G|L40S|L40|L4|T4|RTX)\b", PCIE),
    (r"\b(H100|H200|GH200|H20)\b", 450e9),
    (r"\bH800\b", 200e9),
    (r"\bA100\b", 300e9),
    (r"\bA800\b", 200e9),
    (r"\bV100\b", 150e9),
)


def parse_speed(text: str) -> float:
    """`400Gb` (bits) or `50GB` (bytes), a second: bytes/s, units of 1000. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(b|bit|B)(?:/s|ps)?", text.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a speed: write 400Gb (bits a second) or 50GB (bytes a second)")
    return float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]] / (1 if match[3] == "B" else 8)


def intra_of(gpu: str) -> float | None:
    """Bytes/s each way between GPUs of a node: NVLink's where the GPU has it, else PCIe 4.0's; None where that is not known."""
    return next((speed for pattern, speed in _INTRA if re.search(pattern, gpu, re.IGNORECASE)), None)


@dataclass(frozen=True)
class Cluster:
    """Equal nodes.

    Attributes:
        interconnect: bytes/s of a node's links to the others together; None only of one node.
        intra: bytes/s of a GPU's links within its node; None only of one GPU.
        storage: bytes/s of the shared file system, for all nodes together.
    """

    nodes: int
    gpus: int
    interconnect: float | None
    intra: float | None
    storage: float

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.gpus


class Collective(NamedTuple):
    """Collectives of one kind over all ranks in a step.

    Attributes:
        elements: of the whole tensors, summed over the step.
        width: bytes of an element.
        what: what is moved, and how often.
        exact: the elements are these; else at most these.
    """

    kind: Kind
    elements: int
    width: int
    what: str
    exact: bool = True

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and receives, in a ring; also what enters and leaves each node."""
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.elements * self.width


def collectives(
    model: Model,
    zero: Mapping[str, Any],
    *,
    ranks: int,
    micro_batches: int,
    precision: str,
    checkpoint_activations: bool = False,
) -> list[Collective]:
    """What a step that is not among the first moves between ranks, but for a few numbers (norm, overflow).

    Gradients are reduced in fp32, with templates that are silent on `communication_data_type`.

    Args:
        zero: the template's `zero_optimization`.
        precision: `train.precision`.
    """
    stage, weight = zero["stage"], 2 if precision == "bf16_pure" else 4
    if ranks == 1:
        return []
    each = "each micro-batch" if micro_batches > 1 else "once"
    if stage == 0:
        return [Collective("all-reduce", model.parameters, 4, "gradients once")]
    if stage in (1, 2):
        # The flat buffer of each parameter group is padded to parts of an even number of elements.
        padded = sum(_up(sum(group), 2 * ranks) for group in (model.decayed, model.others))
        gather = Collective("all-gather", padded, weight, "weights once")
        if stage == 1:
            # Of weights in bf16 it is the flat buffer of the sums.
            whole = padded if precision == "bf16_pure" else model.parameters
            return [Collective("all-reduce", whole, 4, "gradients once"), gather]
        return [Collective("all-reduce", model.parameters * micro_batches, 4, f"gradients {each}"), gather]
    parameters = [*model.decayed, *model.others]
    padded = sum(_up(n, ranks) for n in parameters)
    gathered, exact = _gathered(model, zero, ranks, micro_batches, checkpoint_activations)
    return [
        Collective("reduce-scatter", padded * micro_batches, 4, f"gradients {each}"),
        Collective(
            "all-gather", gathered, weight, f"weights {each}" if exact else f"weights for each use, {each},", exact
        ),
    ]


def _gathered(
    model: Model, zero: Mapping[str, Any], ranks: int, micro_batches: int, checkpoint_activations: bool
) -> tuple[int, bool]:
    """Elements that stage 3 gathers in a step, and whether these are exact: small parameters after the step, the others for each micro-batch."""
    least = zero.get("stage3_param_persistence_threshold", _PERSISTENCE)
    parameters = [*model.decayed, *model.others]
    small, large = (sum(_up(n, ranks) for n in parameters if (n <= least) is few) for few in (True, False))
    # A forward pass leaves gathered what its backward pass uses within `max_reuse_distance`; what lies between is every parameter at most once for each use.
    uses = 3 if checkpoint_activations else 2
    near = zero.get("stage3_max_reuse_distance", _MAX_LIVE) >= uses * model.parameters
    if near and zero.get("stage3_max_live_parameters", _MAX_LIVE) >= model.parameters:
        return small + large * micro_batches, True
    # Else each use gathers anew; the word embedding has two more, as the decoder.
    return small + (uses * large + _up(model.words, ranks)) * micro_batches, False


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Traffic(NamedTuple):
    """A step's traffic and its time.

    Attributes:
        sent: bytes that each rank sends and receives, and that cross each node's boundary each way.
        between, within: seconds on the links between nodes (0 for one node) and between GPUs of a node, each by itself.
    """

    sent: float
    between: float
    within: float

    @property
    def seconds(self) -> float:
        """Both links are used at once: the slower decides."""
        return max(self.between, self.within)


def traffic(moved: Sequence[Collective], cluster: Cluster) -> Traffic:
    """What the collectives of a step take."""
    sent = sum(c.sent(cluster.ranks) for c in moved)
    return Traffic(
        sent,
        sent / cluster.interconnect if cluster.nodes > 1 and cluster.interconnect else 0.0,
        sent / cluster.intra if cluster.gpus > 1 and cluster.intra else 0.0,
    )


@dataclass(frozen=True)
class CheckpointCost:
    """Files and bytes of one checkpoint.

    Attributes:
        tensors, files: how many.
        nbytes: of all tensors.
        largest: bytes of the largest part, which one rank writes.
        holding: parts that hold tensors. To restore it each rank reads every tensor, so it opens all of these.
    """

    tensors: int
    files: int
    nbytes: int
    largest: int
    holding: int


def checkpoint_cost(model: Model, ranks: int) -> CheckpointCost:
    """What a checkpoint of W ranks is, by the program's own dealing of tensors to ranks."""
    from mlm_dist.checkpoint import assign  # imports torch

    sizes = [n for n in (*model.decayed, *model.others) for _ in range(TENSORS)]
    numels = {str(i): n for i, n in enumerate(sizes)}
    loads = [0] * ranks
    for key, rank in assign(numels, ranks).items():
        loads[rank] += 4 * numels[key]
    holding = sum(load > 0 for load in loads)
    return CheckpointCost(len(sizes), ranks + _OTHER_FILES, sum(loads), max(loads), holding)


class Cost(NamedTuple):
    """Something that depends on the number of ranks.

    Attributes:
        what: in words.
        value: what it is at this size.
        unit: of `value`: `B`, `s`, or none for a count.
        grows: `constant`, `logarithmic`, `linear`, `quadratic` or `cubic` in nodes, all nodes together.
    """

    what: str
    value: float
    unit: str
    grows: str


def costs(model: Model, cluster: Cluster, lanes: int) -> Iterator[Cost]:
    """What start, resume, checkpoints and decisions cost, beside a step's traffic."""
    ranks, saved, storage = cluster.ranks, checkpoint_cost(model, cluster.ranks), cluster.storage
    hops, messages = 1 + math.ceil(math.log2(ranks)), ranks - 1
    yield Cost("step: hops of the control reduction, one after the other", hops, "", "logarithmic")
    yield Cost("step: messages that rank 0 takes in for it", messages, "", "linear")
    yield Cost("step: those at 20 us a hop and 5 us a message", hops * HOP_S + messages * MESSAGE_S, "s", "linear")
    yield Cost("checkpoint: files", saved.files, "", "linear")
    yield Cost("checkpoint: bytes", saved.nbytes, "B", "constant")
    yield Cost("checkpoint: largest part, one rank's", saved.largest, "B", "constant")
    yield Cost(
        "checkpoint: sent by all ranks to those that write it, at most (none at ZeRO 0)", saved.nbytes, "B", "constant"
    )
    yield Cost("checkpoint: to write it, while steps go on", saved.nbytes / storage, "s", "constant")
    yield Cost("checkpoint: cursors that rank 0 gathers", ranks * 24 * lanes, "B", "linear")
    yield Cost(
        "doctor: clocks that rank 0 compares, one node after the other, at 20 us a hop",
        2 * CLOCK_TRIPS * (cluster.nodes - 1) * HOP_S,
        "s",
        "linear",
    )
    yield Cost(
        "doctor: shards read by all nodes, 256 MiB each, at most", cluster.nodes * DOCTOR_BYTES / storage, "s", "linear"
    )
    yield Cost("start: open sockets of a rank, in three groups of gloo", GLOO_GROUPS * (ranks - 1), "", "linear")
    yield Cost("start: connections of all ranks", GLOO_GROUPS * math.comb(ranks, 2), "", "quadratic")
    yield Cost(
        "start: addresses and handshakes of these groups, mostly from rank 0",
        GLOO_GROUPS * _rendezvous(ranks),
        "B",
        "cubic",
    )
    yield Cost("resume: to read it on rank 0, every byte checked", saved.nbytes / min(storage, SHA256), "s", "constant")
    yield Cost("resume: asked for by all ranks, as each reads all", ranks * saved.nbytes, "B", "linear")
    yield Cost(
        "resume: to read it once a node, the others from its page cache",
        cluster.nodes * saved.nbytes / storage,
        "s",
        "linear",
    )
    grows = "linear" if saved.holding < ranks else "quadratic"
    yield Cost("resume: part files opened by all ranks", ranks * saved.holding, "", grows)


def _rendezvous(ranks: int) -> float:
    """Bytes that the making of one gloo group moves, as measured for 4 to 96 ranks: each reads each other's address, which holds one for every rank."""
    return 762.0 * ranks**2 + 7.88 * ranks**3
