"""``mlm-dist probe``: what a classifier learns from a model, with the spread over seeds."""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlm_dist.errors import UserError
from mlm_dist.eval_tables import Table, check_json, publish
from mlm_dist.probe_data import TASKS, Columns, Examples, Task, as_number, from_dataset, read
from mlm_dist.probe_metrics import METRICS, check, score

if TYPE_CHECKING:
    import torch

    from mlm_dist.eval_models import Candidate
    from mlm_dist.probe_training import Encoded, Recipe

# Of full fine-tuning, as in the GLUE experiments of BERT; a head alone wants more.
TUNED = {"epochs": 3, "lr": 2e-5}
FROZEN = {"epochs": 20, "lr": 1e-2}
LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist probe``."""
    parser.description = "Train a small classifier on a model, several times, and report the task's metric."
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint, exported model or hub name")
    parser.add_argument("--train", type=Path, metavar="FILE", help="examples to learn from: .tsv, .csv or .jsonl")
    parser.add_argument("--dev", type=Path, metavar="FILE", help="examples to measure on")
    parser.add_argument("--data", type=Path, metavar="DIR", help="directory with the train.tsv and dev.tsv of --task")
    parser.add_argument("--dataset", metavar="NAME[:CONFIG]", help="instead of files, a data set for `datasets`")
    parser.add_argument("--dev-split", default="validation", metavar="SPLIT", help="of --dataset (default: validation)")
    parser.add_argument("--task", choices=sorted(TASKS), help="a task of GLUE: sets columns and metric")
    parser.add_argument("--text-column", metavar="NAME", help="name, or number from 1 if there is no header")
    parser.add_argument("--pair-column", metavar="NAME", help="of the second text, for tasks about two")
    parser.add_argument("--label-column", metavar="NAME")
    parser.add_argument(
        "--metric",
        choices=["auto", *METRICS],
        default="auto",
        help="auto: the task's; else accuracy, or pearson_spearman for labels with a fraction",
    )
    parser.add_argument("--frozen", action="store_true", help="train the classifier alone (default: all weights)")
    parser.add_argument("--pooling", choices=["cls", "mean"], default="cls", help="what stands for a text (cls)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how often it is trained (default: 3)")
    both = "(default: {} for all weights, {} with --frozen)"
    parser.add_argument("--epochs", type=int, metavar="N", help=both.format(TUNED["epochs"], FROZEN["epochs"]))
    parser.add_argument("--lr", type=float, help=f"highest learning rate {both.format(TUNED['lr'], FROZEN['lr'])}")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="examples of a step (default: 32)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens that are read (default: 128, or fewer)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too (- for stdout alone)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


@dataclass(frozen=True)
class Problem:
    """A task with its examples.

    Attributes:
        classes: the labels that there are, or None for a number to regress on.
        truth, goals: int64 [N] classes or float64 [N], of ``dev`` and ``train``.
    """

    train: Examples
    dev: Examples
    metric: str
    classes: list[str] | None
    goals: np.ndarray
    truth: np.ndarray

    def score(self, predicted: np.ndarray) -> dict[str, float]:
        """What predictions for ``dev`` are worth."""
        return score(self.metric, self.truth, predicted, len(self.classes or ()))

    def baseline(self) -> dict[str, float]:
        """What a guess is worth that looks at no text: the most frequent class of ``train`` (of equal ones the first), or the mean."""
        if self.classes is None:
            return self.score(np.full(len(self.truth), self.goals.mean()))
        return self.score(np.full(len(self.truth), np.bincount(self.goals).argmax()))


def run(args: argparse.Namespace) -> int:
    """``mlm-dist probe``."""
    import torch

    from mlm_dist.eval_models import candidates
    from mlm_dist.probe_training import Recipe

    defaults = FROZEN if args.frozen else TUNED
    recipe = Recipe(
        args.pooling,
        int(defaults["epochs"] if args.epochs is None else args.epochs),
        defaults["lr"] if args.lr is None else args.lr,
        args.batch,
    )
    _check_numbers(args, recipe)
    check_json(args.json)
    problem = open_problem(args)
    models = [candidate for name in args.models for candidate in candidates(name)]
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    how = {"frozen": args.frozen, "seeds": args.seeds, "max_length": args.max_length}
    results: list[dict[str, Any]] = []
    mistake = None
    for model in models:
        model.look()
    for model in models:
        try:
            results.append(measure(model, problem, recipe, device, **how))
        except UserError as error:
            mistake = error
            break
    facts = {
        "train": problem.train.source,
        "dev": problem.dev.source,
        "examples": {"train": len(problem.train), "dev": len(problem.dev)},
        "left_out": {"train": problem.train.left_out, "dev": problem.dev.left_out},
        "classes": problem.classes,
        "metric": problem.metric,
        "baseline": problem.baseline(),
        "frozen": args.frozen,
        **asdict(recipe),
        "models": results,
    }
    if results:
        publish(facts, [table(facts)], notes(facts), path=args.json, markdown=args.markdown)
    if mistake is not None:
        raise mistake
    return 0


def _check_numbers(args: argparse.Namespace, recipe: Recipe) -> None:
    least = {"seeds": args.seeds, "epochs": recipe.epochs, "batch": recipe.batch}
    for flag, value in least.items():
        if value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    if not 0 < recipe.lr < 1:
        raise UserError(f"--lr {recipe.lr}: must be above 0 and below 1; 2e-5 is usual for all weights")
    if args.max_length is not None and args.max_length < 8:
        raise UserError(f"--max-length {args.max_length}: too short; use at least 8 (128 is usual)")
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: there is no CUDA device; give cpu")


def open_problem(args: argparse.Namespace) -> Problem:
    """The examples that the arguments name.

    Raises:
        UserError: flags are missing or exclude each other, or the examples cannot be read.
    """
    task = TASKS[args.task] if args.task else None
    if args.dataset and (args.train or args.dev or args.data):
        raise UserError("--dataset: --train, --dev and --data name files; give one or the other")
    columns = _columns(args, task)
    if args.dataset:
        train, dev = (from_dataset(args.dataset, split, columns) for split in ("train", args.dev_split))
    else:
        inside = (args.data / "train.tsv", args.data / (task.dev if task else "dev.tsv")) if args.data else (None, None)
        files = {"--train": args.train or inside[0], "--dev": args.dev or inside[1]}
        missing = [flag for flag, path in files.items() if path is None]
        if missing:
            raise UserError(f"{missing[0]}: missing; give --train and --dev, or --data DIR with train.tsv and dev.tsv")
        incomplete = task is not None and task.incomplete
        train, dev = (read(path, columns, incomplete=incomplete) for path in files.values() if path is not None)
    return _problem(train, dev, columns.label, args.metric, task.metric if task else None)


def _columns(args: argparse.Namespace, task: Task | None) -> Columns:
    known = None if task is None else task.hub if args.dataset else task.files
    text, label, pair = args.text_column, args.label_column, args.pair_column
    if known is not None:
        text, label, pair = text or known.text, label or known.label, pair or known.pair
    if not text or not label:
        raise UserError("--text-column, --label-column: missing; give both, or --task for a task of GLUE")
    return Columns(text, label, pair)


def _problem(train: Examples, dev: Examples, column: str, metric: str, of_task: str | None) -> Problem:
    numbers = [as_number(label) for label in train.labels]
    if metric == "auto":
        fractions = all(n is not None for n in numbers) and any(n and not n.is_integer() for n in numbers)
        metric = of_task or ("pearson_spearman" if fractions else "accuracy")
    if metric == "pearson_spearman":
        goals, truth = (np.asarray(part.numbers(column)) for part in (train, dev))
        return Problem(train, dev, metric, None, goals, truth)
    whole = all(n is not None for n in numbers)
    classes = sorted(set(train.labels), key=(lambda label: (as_number(label), label)) if whole else None)
    check(metric, len(classes))
    place = {label: i for i, label in enumerate(classes)}
    for line, label in zip(dev.lines, dev.labels, strict=True):
        if label not in place:
            shown = ", ".join(map(repr, classes))
            raise UserError(
                f"{dev.source}, line {line}, column {column!r}: {label!r:.80} is no label of {train.source} ({shown:.300})"
            )
    goals, truth = (np.asarray([place[label] for label in part.labels], np.int64) for part in (train, dev))
    return Problem(train, dev, metric, classes, goals, truth)


def measure(
    candidate: Candidate,
    problem: Problem,
    recipe: Recipe,
    device: torch.device,
    *,
    frozen: bool,
    seeds: int,
    max_length: int | None,
) -> dict[str, Any]:
    """What the model is worth, of each seed and over all.

    Raises:
        UserError: it cannot be loaded, or reads no texts of ``max_length`` tokens.
    """
    from mlm_dist import probe_training
    from mlm_dist.eval_models import check_length, load_stock
    from mlm_dist.model import families

    if candidate.run is None:
        encoder, tokenizer = load_stock(candidate.name, "AutoModel")
    else:
        model, tokenizer = candidate.load()
        encoder = model.base_model
    longest = max_length or min(LENGTH, families.longest(encoder.config, LENGTH))
    row = [tokenizer.cls_token_id, *[tokenizer.unk_token_id] * (longest - 2), tokenizer.sep_token_id]
    check_length(encoder, row, flag="--max-length", name=candidate.name)
    train = encode(problem.train, problem.goals, encoder, tokenizer, longest)
    dev = encode(problem.dev, problem.truth, encoder, tokenizer, longest)
    classes = None if problem.classes is None else len(problem.classes)
    if frozen:
        inputs = [probe_training.embed(encoder, part, recipe, device) for part in (train, dev)]
    scores = []
    for seed in range(seeds):
        if frozen:
            predicted = probe_training.predict_frozen(inputs[0], train.targets, inputs[1], classes, recipe, seed)
        else:
            predicted = probe_training.predict_tuned(encoder, train, dev, classes, recipe, seed, device)
        scores.append(problem.score(predicted))
        print(f"{candidate.label}, seed {seed}: {problem.metric} {scores[-1][problem.metric]:.4f}", file=sys.stderr)
    spread = {name: [of_seed[name] for of_seed in scores] for name in scores[0]}
    return {
        "model": candidate.name,
        "step": candidate.step,
        "label": candidate.label,
        "max_length": longest,
        "mean": {name: statistics.fmean(values) for name, values in spread.items()},
        "deviation": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in spread.items()},
        "seeds": scores,
    }


def encode(examples: Examples, goals: np.ndarray, encoder: Any, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenize; of texts that are too long the end is left out, of pairs the end of the longer one."""
    import torch

    from mlm_dist.probe_training import Encoded

    texts = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    known = inspect.signature(encoder.forward).parameters
    pads = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": 0}
    pads = {name: pad for name, pad in pads.items() if name in encoded and name in known}
    rows = [{name: encoded[name][i] for name in pads} for i in range(len(examples))]
    return Encoded(rows, pads, torch.from_numpy(goals if goals.dtype == np.int64 else goals.astype(np.float32)))


def table(facts: dict[str, Any]) -> Table:
    """Models, one below the other, over the guess that looks at no text; ``facts`` as ``run`` writes them in JSON."""
    metric, baseline = facts["metric"], facts["baseline"]
    others = [name for name in baseline if name != metric]
    size = facts["examples"]
    rows = []
    for model in facts["models"]:
        deviation = model["deviation"][metric]
        rows.append(
            [
                model["label"],
                f"{model['mean'][metric]:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}"),
                " ".join(f"{of_seed[metric]:.4f}" for of_seed in model["seeds"]),
                *(f"{model['mean'][name]:.4f}" for name in others),
            ]
        )
    guess = "the mean" if facts["classes"] is None else "the most frequent class"
    rows.append([f"always {guess}", f"{baseline[metric]:.4f}", "", *(f"{baseline[name]:.4f}" for name in others)])
    kind = "encoder frozen" if facts["frozen"] else "all weights trained"
    return Table(
        f"{facts['dev']}: {size['dev']:,} examples, {size['train']:,} to learn from, {kind}",
        ["model", metric, "each seed", *others],
        rows,
    )


def notes(facts: dict[str, Any]) -> list[str]:
    """What a reader of the table must know besides."""
    return [
        f"note: {count:,} lines of {facts[part]} lack columns and are left out"
        for part, count in facts["left_out"].items()
        if count
    ]
