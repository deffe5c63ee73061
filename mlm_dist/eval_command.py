"""``mlm-dist eval``: checkpoints of runs and other masked LMs on one data set with the same masks, on one process or on several ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from mlm_dist.data.archive import PIPE
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.packing import LongDocuments, Packing
from mlm_dist.data.shard import is_url
from mlm_dist.errors import UserError
from mlm_dist.files import read_yaml
from mlm_dist.storage.store import Store

if TYPE_CHECKING:
    from mlm_dist.eval_models import Candidate, Scorer
    from mlm_dist.eval_rows import EvalData, Settings
    from mlm_dist.eval_scores import Census, Device, Group

T = TypeVar("T")
# Documents of `--pseudo-perplexity` without a number.
DOCUMENTS = 100
# A rank that is through with its parts waits for the slowest.
TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        flag: that names it, for messages.
        path: or URL, of the manifest.
        settings: how it is read; the text field is the data set's own.
    """

    flag: str
    path: str
    settings: Settings


@dataclass(frozen=True)
class Job:
    """What is to be done, the same on all ranks.

    Attributes:
        sources: the data set, and one whose words say how frequent a word is, if it is another.
        documents: how many the pseudo-perplexity is taken of; 0 for none.
        batch: most rows that a model takes at once.
        allow_pipe: whether manifests may name commands as shards.
    """

    models: list[Candidate]
    sources: list[Source]
    documents: int
    batch: int
    allow_pipe: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist eval``."""
    parser.description = "Score masked language models on a data set, with masks that are the same for all of them."
    parser.epilog = "On several ranks: torchrun --nproc_per_node 2 -m mlm_dist.eval_command MODEL ..."
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="run directory, checkpoint, exported model or hub name"
    )
    parser.add_argument("--data", metavar="MANIFEST", help="path or URL (default: the validation set of the first run)")
    parser.add_argument(
        "--frequencies",
        metavar="MANIFEST",
        help="tell words apart by their frequency there, in the training data say (default: in --data)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--steps", metavar="N,N", type=_steps, default=[], help="of each run the checkpoints of these")
    which.add_argument(
        "--checkpoints", choices=["newest", "all"], default="newest", help="of each run (default: newest)"
    )
    which.add_argument("--best", action="store_true", help="of each run the one with the lowest validation loss")
    parser.add_argument(
        "--pseudo-perplexity",
        nargs="?",
        type=int,
        const=DOCUMENTS,
        default=0,
        metavar="N",
        help=f"mask each token of N documents alone (default {DOCUMENTS}; one forward a token)",
    )
    run = "(default: the runs', else {})"
    parser.add_argument("--seed", type=int, help=f"keys the masks {run.format(1234)}")
    parser.add_argument("--rate", type=float, help="share of the tokens that is masked (default: 0.15)")
    parser.add_argument("--seq-len", type=int, metavar="N", help=f"longest row in tokens {run.format(128)}")
    parser.add_argument(
        "--packing", choices=get_args(Packing), help=f"which tokens are masked depends on it {run.format('split')}"
    )
    parser.add_argument(
        "--long-documents", choices=get_args(LongDocuments), help=f"see data.long_documents {run.format('chunk')}"
    )
    parser.add_argument(
        "--text-field", metavar="NAME", help=f"field of JSON members that is the text {run.format('text')}"
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows at a time on a rank (default: 64)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands that the manifest names as shards")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too (- for stdout alone)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def _steps(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be steps with commas between them, such as 100,200"
        ) from error


def run(args: argparse.Namespace) -> int:
    """``mlm-dist eval``."""
    group, device = join(args.device, args.precision)
    job = agreed(group, lambda: plan(args))
    results, mistake = evaluate(job, group, device)
    if group.rank == 0 and results:
        _show(args, job, results)
    if mistake is not None:
        raise mistake
    return 0


def join(device: str | None, precision: str) -> tuple[Group, Device]:
    """The ranks that the environment speaks of, and where this one computes.

    Raises:
        UserError: the environment contradicts itself, or there is no such device.
    """
    import torch

    from mlm_dist import distributed
    from mlm_dist.eval_scores import Alone, Device

    topology = distributed.Topology.from_env()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device; give cpu")
    place = torch.device("cpu") if device == "cpu" else topology.device
    if topology.world_size == 1:
        return Alone(), Device(place, precision)
    distributed.init(TIMEOUT_S, deepspeed=False)
    return distributed.ControlGroup(TIMEOUT_S), Device(place, precision)


def agreed(group: Group, make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank: a run that goes on may show each rank another newest checkpoint.

    Raises:
        UserError: as ``make`` does on rank 0.
    """
    made: Any = None
    if group.rank == 0:
        try:
            made = (make(), None)
        except UserError as error:
            made = (None, str(error))
    value, mistake = group.broadcast(made)
    if mistake is not None:
        raise UserError(mistake)
    result: T = value
    return result


def together(group: Group, make: Callable[[], T]) -> T:
    """What each rank makes for itself. Collective.

    Raises:
        UserError: on every rank, as ``make`` does on one of them.
    """
    made: Any = None
    mistake = None
    try:
        made = make()
    except UserError as error:
        mistake = str(error)
    mistakes = group.gather(mistake)
    first = group.broadcast(None if mistakes is None else next(filter(None, mistakes), None))
    if first is not None:
        raise UserError(first)
    result: T = made
    return result


def plan(args: argparse.Namespace) -> Job:
    """The job that the arguments ask for.

    Raises:
        UserError: a model, the data or a setting is missing, or the runs disagree about a setting.
    """
    from mlm_dist.eval_models import candidates, is_run
    from mlm_dist.eval_tables import check_json

    check_json(args.json)
    for flag, value, least in (("--batch", args.batch, 1), ("--pseudo-perplexity", args.pseudo_perplexity, 0)):
        if value < least:
            raise UserError(f"{flag} {value}: must be at least {least}")
    runs = [name for name in args.models if is_run(name)]
    if not runs and (args.steps or args.best or args.checkpoints != "newest"):
        raise UserError(f"--steps, --checkpoints, --best: {args.models[0]} is no run; these choose checkpoints of runs")
    every = args.checkpoints == "all"
    models = [
        candidate
        for name in args.models
        for candidate in candidates(name, steps=args.steps, every=every, best=args.best)
    ]
    for model in models:
        model.look()
    configs = {str(c.run): read_yaml(c.run / "config.yaml") for c in models if c.run is not None}
    data = args.data or _validation_set(configs)
    settings = settle(args, configs)
    named = (("--data", data), ("--frequencies", args.frequencies))
    sources = [_source(flag, path, settings, args) for flag, path in named if path]
    return Job(models, sources, args.pseudo_perplexity, args.batch, args.allow_pipe)


def _source(flag: str, path: str, settings: Settings, args: argparse.Namespace) -> Source:
    manifest, store = _open(path, args.allow_pipe)
    manifest.check_files(store=store)
    if manifest.text_field not in (None, settings.text_field):
        if args.text_field is not None and flag == "--data":
            raise UserError(f"--text-field {args.text_field}: {path} was indexed with --field {manifest.text_field}")
        settings = replace(settings, text_field=manifest.text_field)
    return Source(flag, path, settings)


def _validation_set(configs: dict[str, dict[str, Any]]) -> str:
    """That of the first run that has one."""
    for run, config in configs.items():
        if found := (config.get("data") or {}).get("val_manifest"):
            if not is_url(found) and not Path(found).is_file():
                where = "" if Path(found).is_absolute() else "start in the directory that the run was started in, or "
                raise UserError(
                    f"--data: missing, and there is no {found}, the data.val_manifest of {run}; {where}give --data"
                )
            return str(found)
    raise UserError("--data: missing, and no run among the models has a validation set (data.val_manifest)")


def settle(args: argparse.Namespace, configs: dict[str, dict[str, Any]]) -> Settings:
    """Each setting: the flag's, else the runs', else the default.

    Raises:
        UserError: one is out of range, or two of the runs differ in one that no flag gives.
    """
    from mlm_dist.eval_rows import Settings

    chosen: dict[str, Any] = {}
    for setting in (f.name for f in fields(Settings)):
        if (given := getattr(args, setting)) is not None:
            chosen[setting] = given
        elif setting != "rate":  # validation masks at BERT's rate, whatever the training's
            section = "eval" if setting == "seed" else "data"
            of_runs = {run: (config.get(section) or {}).get(setting) for run, config in configs.items()}
            known = {run: value for run, value in of_runs.items() if value is not None}
            if len(set(known.values())) > 1:
                each = ", ".join(f"{run} {value}" for run, value in known.items())
                raise UserError(
                    f"--{setting.replace('_', '-')}: the runs differ in {section}.{setting} ({each}), so their masks would; give one for all"
                )
            if known:
                chosen[setting] = next(iter(known.values()))
    settings = Settings(**chosen)
    settings.check()
    return settings


def _open(data: str, allow_pipe: bool) -> tuple[Manifest, Store]:
    manifest = Manifest.read(data)
    if not allow_pipe and any(shard.path.startswith(PIPE) for shard in manifest.shards):
        raise UserError(f"{data} names commands as shards; look at them, then give --allow-pipe to run them")
    return manifest, Store(manifest.root, allow_pipe=allow_pipe)


def evaluate(job: Job, group: Group, device: Device) -> tuple[list[dict[str, Any]], UserError | None]:
    """The numbers of the job's models, on rank 0, and what is wrong with the first that has none, after which no other is tried. Collective."""
    from mlm_dist import eval_pseudo, eval_scores

    results: list[dict[str, Any]] = []
    texts: list[str] = []
    censuses: dict[str, Census] = {}
    for candidate in job.models:
        try:
            scorer, data, *others = together(group, partial(_prepare, job, candidate, device))
            fingerprint = data.tokenizer.fingerprint
            if job.documents and not texts:
                texts = eval_pseudo.choose(data.maker, job.documents, group)
            if fingerprint not in censuses:
                censuses[fingerprint] = eval_scores.take_census(data, group, *others)
            result = eval_scores.measure(data, censuses[fingerprint], scorer, group, device)
            if job.documents:
                result["pseudo"] = eval_pseudo.measure(data, texts, scorer, group, device)
        except UserError as error:
            return results, error
        if group.rank == 0 and result["loss"] is not None:
            print(f"{candidate.label}: loss {result['loss']:.4f}, accuracy {result['accuracy']:.2%}", file=sys.stderr)
        facts = {"model": candidate.name, "step": candidate.step, "label": candidate.label}
        results.append({**facts, "tokenizer": fingerprint, **result})
    return results, None


def _prepare(job: Job, candidate: Candidate, device: Device) -> tuple[Scorer, EvalData, *tuple[EvalData, ...]]:
    """The model, and the sources as it reads them."""
    from mlm_dist.data import tokenizer as tokenizers
    from mlm_dist.eval_models import Scorer
    from mlm_dist.eval_rows import EvalData

    model, pretrained = candidate.load()
    tokenizer = tokenizers.from_pretrained(pretrained)
    scorer = Scorer(model, tokenizer, job.sources[0].settings.seq_len, candidate.name).to(device.device)
    data, *others = (
        EvalData(*_open(s.path, job.allow_pipe), tokenizer, s.settings, job.batch, s.flag) for s in job.sources
    )
    return scorer, data, *others


def _show(args: argparse.Namespace, job: Job, results: list[dict[str, Any]]) -> None:
    from mlm_dist.eval_tables import notes, publish, tables

    data = job.sources[0]
    manifest, _ = _open(data.path, job.allow_pipe)
    facts = {
        "data": data.path,
        "fingerprint": manifest.fingerprint,
        "documents": manifest.num_documents,
        "frequencies": job.sources[-1].path,
        "settings": asdict(data.settings),
        "precision": args.precision,
        "models": results,
    }
    publish(facts, tables(facts), notes(facts), path=args.json, markdown=args.markdown)


def main(argv: Sequence[str] | None = None) -> int:
    """One rank, as torchrun and other launchers start it: 0, or 2 for the user's mistake."""
    from mlm_dist import distributed
    from mlm_dist.ending import report_user_error

    parser = argparse.ArgumentParser(prog="mlm-dist eval")
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except UserError as error:
        report_user_error(error)
        return 2
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    sys.exit(main())
