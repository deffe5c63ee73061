"""``mlm-dist plan``: what a run needs of a device's memory, for each ZeRO template and micro-batch, the choice that fits, and what a cluster costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist import choice, plan_cluster_command
from mlm_dist.choice import Option, Way
from mlm_dist.combinations import Combination, refusal
from mlm_dist.ds_config import for_world, load_template
from mlm_dist.errors import UserError
from mlm_dist.model import families
from mlm_dist.plan import TERMS, predict
from mlm_dist.sizes import gib, parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mlm_dist.config import Config

# Words of BERT's vocabulary, for a tokenizer that nobody trained yet where the exact number matters little.
VOCABULARY = 30522
OURS = {way.template for way in choice.ORDER}
# `model.config` of the checkpoints that everyone starts from, so that these need no hub.
KNOWN_SIZES: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {},
    "bert-base-cased": {"vocab_size": 28996},
    "bert-large-uncased": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "roberta-base": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
    },
    "distilbert-base-uncased": {"model_type": "distilbert"},
    "ModernBERT-base": {"model_type": "modernbert", "vocab_size": 50368},
}
_OWNERS = ("google-bert/", "FacebookAI/", "distilbert/", "answerdotai/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist plan``; what they do not know goes to the run config."""
    parser.add_argument("--config", required=True, help="run config; any of its keys can follow as a flag")
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="memory of one device, such as 16GiB (with --nodes it can be left out)"
    )
    parser.add_argument(
        "--world-size", type=int, help="ranks, one for each device (default 1, or those of the cluster)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="kind of device (default cuda)")
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        help=f"part of it that tensors cannot have (default {choice.CUDA_RESERVE >> 20}MiB on cuda, for the context and fragmentation; 0 on cpu)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    plan_cluster_command.add_arguments(parser)


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Print the table and the choice, and what a cluster costs; 1 when nothing fits."""
    from mlm_dist.config import load

    config = load(["--config", args.config, *overrides], prog="mlm-dist plan").config
    cluster = plan_cluster_command.cluster_of(args)
    if cluster is None:
        return run_memory(args, config, 1 if args.world_size is None else args.world_size)
    alone = args.device_memory is None
    assumed: list[str] = []
    bert = sizes(config, assumed if alone else None)
    found = plan_cluster_command.plan_cluster(config, bert, cluster, gpu=args.gpu, mfu=args.mfu, notes=assumed)
    if alone and args.json:
        print(json.dumps({"cluster": found}, indent=1))
    elif alone:
        plan_cluster_command.show(found)
    else:
        return run_memory(args, config, cluster.ranks, found)
    return 0


def run_memory(args: argparse.Namespace, config: Config, world_size: int, cluster: dict[str, Any] | None = None) -> int:
    """The memory's part, after what was found of a cluster, if one was asked for."""
    if world_size < 1:
        raise UserError(f"--world-size: {world_size} must be at least 1.")
    if args.device_memory is None:
        raise UserError(
            "--device-memory is missing: give the memory of one device, such as 16GiB, or a cluster (--nodes)"
        )
    config.train.check_world(world_size)
    memory = _size("--device-memory", args.device_memory)
    reserve = choice.CUDA_RESERVE if args.device == "cuda" else 0
    if args.reserve is not None:
        reserve = 0 if args.reserve == "0" else _size("--reserve", args.reserve)
    if memory <= reserve:
        raise UserError(
            f"--device-memory: {args.device_memory} leaves nothing beside --reserve, {gib(reserve)} GiB; give the memory of the whole device, or a "
            "smaller reserve."
        )
    bert = sizes(config)
    options = plan(config, bert, world_size=world_size, device=args.device)
    enough = choice.enough(config, world_size)
    chosen = choice.choose(options, memory - reserve, args.device, enough=enough)
    remarks = notes(config, world_size)
    if args.device == "cuda" and bert.model_type in ("distilbert", "electra", "modernbert"):
        remarks.append(f"what a {families.of(bert).label} takes has been measured on CPUs only")
    if args.json:
        both = {"cluster": cluster} if cluster else {}
        print(json.dumps(_as_json(options, chosen, memory, reserve) | {"notes": remarks} | both, indent=1))
    else:
        if cluster:
            plan_cluster_command.show(cluster)
            print()
        _show(options, chosen, memory, reserve, args.device, remarks)
    return 0 if chosen else 1


def sizes(config: Config, assumed: list[str] | None = None) -> PreTrainedConfig:
    """The model's configuration, without weights, and of tokenizers only what is at hand.

    Args:
        assumed: if given, no hub is asked for a tokenizer, and one that cannot be loaded is taken as VOCABULARY words, which the list is told.

    Raises:
        UserError: it cannot be known.
    """
    from mlm_dist.model import bert

    section = config.model
    if section.init == "run":
        try:
            return bert.load_config(section, vocab_size=None, pad_token_id=None)
        except UserError as error:
            raise UserError(
                f"{error}. The planner takes the model's sizes from that run; before it exists give them: --model.init config --model.name_or_path null "
                "--model.config.hidden_size 768 --model.config.vocab_size 30522."
            ) from error
    if section.init == "pretrained":
        known = _known(section.name_or_path or "")
        if known is not None:
            rows = {"vocab_size": 30522} | known
            section = replace(section, init="config", name_or_path=None, config=rows)
        stored = bert.load_config(section, vocab_size=None, pad_token_id=None)
        stored.vocab_size = _extended(config, stored.vocab_size)
        return stored
    words = None if "vocab_size" in (section.config or {}) else _words(config.data.tokenizer, assumed)
    return bert.load_config(section, vocab_size=words, pad_token_id=None)


def _known(name: str) -> dict[str, Any] | None:
    """What KNOWN_SIZES has of a name on the hub."""
    owner = next((owner for owner in _OWNERS if name.startswith(owner)), "")
    return KNOWN_SIZES.get(name.removeprefix(owner))


def _words(name: str, assumed: list[str] | None) -> int:
    """Words of a tokenizer (see `sizes`)."""
    from mlm_dist.data import tokenizer

    known = _known(name)
    here = Path(name).expanduser().is_dir()
    if known is not None and not here:
        return known.get("vocab_size", VOCABULARY)
    try:
        if here or assumed is None:
            return len(tokenizer.load_pretrained(name))
    except UserError as error:
        if assumed is None:
            raise UserError(
                f"{error} The planner needs no tokenizer if it is told the size: --model.config.vocab_size 30522."
            ) from error
    assumed.append(f"data.tokenizer {name!r} cannot be loaded; taken as {VOCABULARY} words")
    return VOCABULARY


def _extended(config: Config, stored: int) -> int:
    """Rows of the checkpoint's table, which has `stored`, with those that a tokenizer of `mlm-dist tokenizer extend` adds."""
    from mlm_dist.data.extend_tokenizer import RECORD, read_extension
    from mlm_dist.data.tokenizer import load_pretrained
    from mlm_dist.model.bert import find_new_tokens

    name = config.data.tokenizer
    if not (Path(name).expanduser() / RECORD).is_file():
        return stored
    extension = read_extension(name, load_pretrained(name))
    assert extension is not None
    new = find_new_tokens(config.model, stored, extension.base_size, list(extension.words.values()))
    return new.rows(stored) if new else stored


def notes(config: Config, world_size: int) -> list[str]:
    """What else is to be known of the table."""
    changed = [n for n in _templates(config) if _zero(config, n, world_size) != load_template(n)["zero_optimization"]]
    found = []
    if changed:
        found.append(f"on one rank there is nothing to partition: {', '.join(changed)} run as ZeRO stage 0, like zero0")
    if world_size > 1:
        found.append(
            "rows are taken to be dealt evenly; where the number of ranks does not divide the stream's lanes, a rank can get more, which train.micro_batch "
            "auto counts with"
        )
    if config.model.head == "liger":
        found.append("model.head liger is planned as if it were torch's")
    return found


def plan(config: Config, bert: PreTrainedConfig, *, world_size: int, device: str) -> list[Option]:
    """Every way that the run's precision and optimizer allow, with every micro-batch, in the order in which they are taken.

    The run's own template comes first when it is none of ours.

    Raises:
        UserError: there is no such way.
    """
    from mlm_dist.model.attention import choose_for

    attention, _ = choose_for(
        config.model.attention,
        bert,
        capability=(8, 0) if device == "cuda" else None,  # Ampere or later
        precision=config.train.precision,
        labels=config.mask.labels,
    )
    zero = {name: _zero(config, name, world_size) for name in _templates(config)}
    own = config.deepspeed.config
    ways = [*([] if own in OURS else [Way(own, False), Way(own, True)]), *choice.ORDER]
    # On one rank several run as the same: the first of them stands for all.
    names = [name for i, name in enumerate(zero) if zero[name] not in list(zero.values())[:i]]
    ways = [way for way in ways if way.template in names and _refusal(config, zero[way.template]) is None]
    if not ways:
        raise UserError(
            f"no deepspeed.config goes with train.precision {config.train.precision} and optim.name {config.optim.name}: {_refusal(config, zero[own])}"
        )
    return [
        Option(
            way,
            rows,
            predict(
                choice.job(
                    config,
                    bert,
                    zero[way.template],
                    world_size=world_size,
                    micro_batch=rows,
                    device=device,
                    attention=attention,
                    checkpoint=way.checkpoint,
                )
            ),
        )
        for way in ways
        for rows in choice.micro_batches(choice.share(config, world_size))
    ]


def _templates(config: Config) -> list[str]:
    return list(dict.fromkeys([*({config.deepspeed.config} - OURS), *(way.template for way in choice.ORDER)]))


def _zero(config: Config, template: str, world_size: int) -> dict[str, Any]:
    adapted = for_world(load_template(template), world_size=world_size, precision=config.train.precision)
    return dict(adapted["zero_optimization"])


def _refusal(config: Config, zero: Mapping[str, Any]) -> str | None:
    return refusal(Combination(zero["stage"], "offload_optimizer" in zero, config.train.precision, config.optim.name))


def _size(flag: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def _name(way: Way) -> str:
    return way.template + (" + checkpointing" if way.checkpoint else "")


def _as_json(options: list[Option], chosen: Option | None, memory: int, reserve: int) -> dict[str, Any]:
    def plain(option: Option) -> dict[str, Any]:
        found = option.prediction
        return {
            "template": option.way.template,
            "checkpoint_activations": option.way.checkpoint,
            "micro_batch": option.micro_batch,
            "device_bytes": found.total,
            "host_bytes": found.total_host,
            "moment": found.moment,
            "device": found.device,
            "host": found.host,
        }

    return {
        "device_memory": memory,
        "reserve": reserve,
        "choice": plain(chosen) if chosen else None,
        "options": [plain(option) for option in options],
    }


def _show(
    options: list[Option], chosen: Option | None, memory: int, reserve: int, device: str, remarks: list[str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    room = memory - reserve
    console.print(
        f"GiB of a {device} device by micro-batch; in brackets: too much for {gib(room)}, or too near", soft_wrap=True
    )
    table = Table()
    table.add_column("template")
    rows = list(dict.fromkeys(option.micro_batch for option in options))
    for micro_batch in rows:
        table.add_column(str(micro_batch), justify="right")
    by_way: dict[Way, list[Option]] = {}
    for option in options:
        by_way.setdefault(option.way, []).append(option)
    for way, of_way in by_way.items():
        cells = [(gib(choice.needed(o.prediction, device)), choice.fits(o.prediction, room, device)) for o in of_way]
        table.add_row(_name(way), *(text if good else f"({text})" for text, good in cells))
    console.print(table)
    console.print("what a peak is made of, at the largest micro-batch that fits, or the smallest:")
    for way, of_way in by_way.items():
        best = choice.choose(of_way, room, device) or of_way[0]
        found = best.prediction
        terms = " + ".join(f"{gib(found.device[term])} {term}" for term in TERMS if found.device[term] >= 0.005 * 2**30)
        host = f"; {gib(found.total_host)} on the host" if found.total_host else ""
        console.print(
            f"  {_name(way)}, {best.micro_batch} row{'s' * (best.micro_batch > 1)}: {gib(found.total)} = {terms} ({found.moment}){host}",
            soft_wrap=True,
        )
    console.print(
        f"{gib(memory)} GiB of device memory, of which {gib(reserve)} are kept for the context and fragmentation. "
        f"Predictions are held to be within {choice.MARGIN:.0%}: what fits leaves as much room.",
        soft_wrap=True,
    )
    for remark in remarks:
        console.print(f"note: {remark}", soft_wrap=True)
    if chosen is None:
        least = min(options, key=lambda option: choice.needed(option.prediction, device))
        over = int(choice.needed(least.prediction, device) * (1 + choice.MARGIN)) - room
        console.print(
            f"nothing fits: {_name(least.way)} with micro-batches of {least.micro_batch} needs {gib(over)} GiB more.",
            soft_wrap=True,
        )
        return
    console.print(
        f"choice: deepspeed.config {chosen.way.template}, model.checkpoint_activations {str(chosen.way.checkpoint).lower()}, "
        f"train.micro_batch {chosen.micro_batch}: {gib(choice.needed(chosen.prediction, device))} GiB at its peak ({chosen.prediction.moment})",
        soft_wrap=True,
    )
