"""The part of ``mlm-dist plan`` that is about a cluster: ``--nodes 64 --gpus-per-node 8 --interconnect 400Gb``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mlm_dist import choice
from mlm_dist.data.order import MAX_LANES
from mlm_dist.ds_config import for_world, load_template
from mlm_dist.errors import UserError
from mlm_dist.hardware import dense_peak
from mlm_dist.plan_cluster import LINKS, Cluster, Cost, collectives, costs, intra_of, parse_speed, traffic
from mlm_dist.plan_job import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mlm_dist.config import Config

ROWS = 32  # of a micro-batch where the run says `auto`
DEFAULTS: dict[str, Any] = {"gpus_per_node": 8, "gpu": "H100", "mfu": 0.4, "storage": "5GB"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the cluster's part."""
    group = parser.add_argument_group("a cluster", "what a step sends, and what start, checkpoints and resume cost")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes; the ranks are then N x G")
    group.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each node (default 8)")
    group.add_argument(
        "--interconnect", metavar="SPEED", help="of a node's links to others together: 400Gb, 25Gb, 50GB"
    )
    group.add_argument(
        "--intra", metavar="SPEED", help="of a GPU's links within its node (default --gpu's NVLink or PCIe, if known)"
    )
    group.add_argument("--gpu", metavar="NAME", help="GPU whose peak is computed with (default H100)")
    group.add_argument("--mfu", type=float, help="share of that peak that a step reaches (default 0.4)")
    group.add_argument("--storage", metavar="SPEED", help="of the shared file system (default 5GB)")


def cluster_of(args: argparse.Namespace) -> Cluster | None:
    """The cluster that the flags describe, None without --nodes; fills in the defaults of those that were not given.

    Raises:
        UserError: flags are wrong or contradict each other.
    """
    if args.nodes is None:
        alone = [f for f in (*DEFAULTS, "interconnect", "intra") if getattr(args, f) is not None]
        if alone:
            raise UserError(f"--{alone[0].replace('_', '-')}: is of a cluster; give --nodes, too")
        return None
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    gpus = args.gpus_per_node
    for flag, value in (("--nodes", args.nodes), ("--gpus-per-node", gpus)):
        if value < 1:
            raise UserError(f"{flag}: {value} must be at least 1.")
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu: {args.mfu} must be a share above 0, at most 1.")
    if args.world_size not in (None, args.nodes * gpus):
        raise UserError(
            f"--world-size: {args.world_size} contradicts --nodes {args.nodes} x --gpus-per-node {gpus} = {args.nodes * gpus} ranks; leave it out."
        )
    if args.interconnect is None and args.nodes > 1:
        raise UserError("--interconnect is missing: give the speed of a node's links to the others, such as 400Gb")
    intra = intra_of(args.gpu) if args.intra is None else _speed("--intra", args.intra)
    if intra is None and gpus > 1:
        raise UserError(
            f"--intra is missing: the links of {args.gpu!r} are not known; give their speed each way, such as 300GB"
        )
    return Cluster(
        args.nodes,
        gpus,
        interconnect=None if args.interconnect is None else _speed("--interconnect", args.interconnect),
        intra=intra,
        storage=_speed("--storage", args.storage),
    )


def _speed(flag: str, text: str) -> float:
    try:
        return parse_speed(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def plan_cluster(
    config: Config, bert: PreTrainedConfig, cluster: Cluster, *, gpu: str, mfu: float, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything of the cluster's part, for JSON: sizes, templates with their traffic, costs, notes, beginning with those given."""
    from mlm_dist.model.bert import flops_per_token

    train, seq_len, ranks = config.train, config.data.seq_len, cluster.ranks
    peak = dense_peak(gpu, train.precision)
    if peak is None:
        raise UserError(
            f"--gpu: the peak of {gpu!r} in {train.precision} is not known; give a name such as H100 or A100"
        )
    notes = list(notes)
    rows = train.micro_batch if isinstance(train.micro_batch, int) else ROWS
    batch = train.global_batch
    if batch < ranks:
        batch = ranks * rows
        notes.append(
            f"train.global_batch {train.global_batch} has no row for each of {ranks} ranks, so a run would refuse to start; "
            f"planned with {batch}, a micro-batch for each"
        )
    share = -(-batch // ranks)
    rows = min(rows, share)
    micro_batches = -(-share // rows)
    lanes = config.data.lanes or min(batch, MAX_LANES)
    if lanes % ranks:
        most = -(-lanes // ranks) * -(-batch // lanes)
        notes.append(
            f"{lanes} lanes do not go evenly into {ranks} ranks: some get up to {most} rows a step, the mean is {batch / ranks:.0f}; data.lanes {ranks} is even"
            if lanes > ranks
            else f"{lanes} lanes leave {ranks - lanes} ranks without rows; data.lanes {ranks} feeds them all"
        )
    model = Model.of(bert)
    flops = share * seq_len * flops_per_token(bert, attended=seq_len, selected=config.mask.rate)
    compute = flops / (peak * mfu)
    return {
        "cluster": asdict(cluster) | {"ranks": ranks},
        "parameters": model.parameters,
        "vocabulary": model.vocab,
        "precision": train.precision,
        "step": {
            "global_batch": batch,
            "rows_of_rank": share,
            "micro_batches": micro_batches,
            "flops_of_rank": flops,
            "peak": peak,
            "mfu": mfu,
            "compute_s": compute,
        },
        "templates": [
            _template(config, model, name, cluster, micro_batches, compute)
            for name in _names(config)
            if not (train.precision == "bf16_pure" and load_template(name)["zero_optimization"]["stage"] == 0)
        ],
        "costs": [cost._asdict() for cost in costs(model, cluster, lanes)],
        "notes": notes,
    }


def _names(config: Config) -> list[str]:
    """Our templates, from stage 0 on, and the run's own."""
    return list(dict.fromkeys([*(way.template for way in choice.ORDER), config.deepspeed.config]))


def _template(
    config: Config, model: Model, name: str, cluster: Cluster, micro_batches: int, compute: float
) -> dict[str, Any]:
    template = for_world(load_template(name), world_size=cluster.ranks, precision=config.train.precision)
    moved = collectives(
        model,
        template["zero_optimization"],
        ranks=cluster.ranks,
        micro_batches=micro_batches,
        precision=config.train.precision,
        checkpoint_activations=config.model.checkpoint_activations,
    )
    found = traffic(moved, cluster)
    return {
        "template": name,
        "collectives": [c._asdict() | {"sent": c.sent(cluster.ranks)} for c in moved],
        "sent_bytes": found.sent,
        "between_s": found.between,
        "within_s": found.within,
        "share_of_compute": found.seconds / compute,
        "at_links_s": {link: found.sent / speed for link, speed in LINKS.items()} if cluster.nodes > 1 else {},
    }


def show(found: dict[str, Any]) -> None:
    """Print it in plain lines, which do not depend on the terminal."""
    cluster, step = found["cluster"], found["step"]
    several = cluster["nodes"] > 1
    ways = [f"{_size(cluster['interconnect'])}/s between nodes"] if several else []
    ways += [f"{_size(cluster['intra'])}/s a GPU within one"] if cluster["gpus"] > 1 else []
    print(
        f"{cluster['nodes']} node{'s' * several} x {cluster['gpus']} GPU{'s' * (cluster['gpus'] > 1)} = {cluster['ranks']} rank{'s' * (cluster['ranks'] > 1)}; "
        f"{'each way ' * bool(ways)}{', '.join(ways)}{'; ' * bool(ways)}storage {_size(cluster['storage'])}/s"
    )
    print(
        f"{found['parameters'] / 1e6:.0f} M parameters with {found['vocabulary']} words, {found['precision']}; {step['rows_of_rank']} rows of a rank "
        f"in {step['micro_batches']} micro-batch{'es' * (step['micro_batches'] > 1)}: {step['compute_s'] * 1e3:.1f} ms at {step['mfu']:.0%} of "
        f"{step['peak'] / 1e12:.0f} TFLOP/s"
    )
    print()
    print(
        "a step: bytes that each rank sends and receives, and that leave and enter each node; ms on each link; share of the computing"
    )
    print(f"{'':14}{'bytes':>9}{'between':>9}{'within':>8}{'share':>7}  {'collectives':100}".rstrip())
    for t in found["templates"]:
        moved = "; ".join(
            f"{c['kind']} of {c['what']} {'' if c['exact'] else 'at most '}{_size(c['sent'])}" for c in t["collectives"]
        )
        print(
            f"{t['template']:14}{_size(t['sent_bytes']):>9}{t['between_s'] * 1e3:9.1f}{t['within_s'] * 1e3:8.1f}{t['share_of_compute']:7.0%}  {moved}"
        )
    if several:
        print()
        print("ms between nodes at other speeds of a node")
        print(f"{'':14}" + "".join(f"{link:>9}" for link in LINKS))
        for t in found["templates"]:
            print(f"{t['template']:14}" + "".join(f"{seconds * 1e3:9.1f}" for seconds in t["at_links_s"].values()))
    print()
    print("beside the step's traffic, and how it grows with the nodes")
    for cost in found["costs"]:
        print(f"  {_value(Cost(**cost)):>12}  {cost['grows']:12} {cost['what']}")
    for note in found["notes"]:
        print(f"note: {note}")


def _value(cost: Cost) -> str:
    if cost.unit == "B":
        return _size(cost.value)
    if cost.unit == "s":
        return f"{cost.value * 1e3:.1f} ms" if cost.value < 1 else f"{cost.value:.1f} s"
    return f"{cost.value:,.0f}"


def _size(nbytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"
