"""``mlm-dist export``: a checkpoint as a stock masked-language model's directory, checked after it is written."""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlm_dist.errors import UserError
from mlm_dist.files import read_json, read_yaml
from mlm_dist.model.pretrained import quiet
from mlm_dist.redact import redact
from mlm_dist.tracking import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mlm_dist.checkpoint import Reader

log = logging.getLogger(__name__)

# Written into each export, so that a later one knows a directory that it may replace.
_MARK = "mlm_dist_export.json"


@dataclass(frozen=True)
class Source:
    """A checkpoint and the run directory that it lies in."""

    run_dir: Path
    checkpoint: Path


def find(path: str | Path, step: int | None = None, *, best: bool = False) -> Source:
    """The checkpoint that a run directory or a checkpoint directory stands for: of a run the one at ``step``, the
    ``best`` by validation loss, or the newest whole one.

    Raises:
        UserError: there is none.
    """
    from mlm_dist import checkpoint

    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a run directory or one of its checkpoints")
    if (path / "index.json").exists():
        if best:
            raise UserError(f"--best: {path} is one checkpoint already; give the run directory with --best")
        if step is not None:
            raise UserError(f"--step {step}: {path} is one checkpoint already; give the run directory with --step")
        # Resolved, so that `.` or `step_00000100` in its own directory has parents.
        return Source(path.resolve().parent.parent, path)
    found = checkpoint.committed(path)
    if not found:
        raise UserError(f"{path}: holds no whole checkpoint; give a run directory in which checkpoints/ has one")
    if best:
        lowest = checkpoint.best(path, log.warning)
        if lowest is None:
            raise UserError(
                f"--best: {path} has no whole checkpoint with a validation loss (data.val_manifest, eval.every)"
            )
        return Source(path, lowest)
    if step is None:
        newest = checkpoint.newest(path, log.warning)
        if newest is None:
            raise UserError(f"{path}: all its checkpoints are damaged; run mlm-dist export with another run")
        return Source(path, newest)
    chosen = path / "checkpoints" / checkpoint.name(step)
    if chosen not in found:
        steps = ", ".join(str(int(p.name.removeprefix("step_"))) for p in found)
        raise UserError(f"--step {step}: {path} has no checkpoint of that step; it has {steps}")
    return Source(path, chosen)


def load(source: Source) -> "tuple[PreTrainedModel, PreTrainedTokenizerFast]":
    """The model of a checkpoint, fp32 on the CPU in eval mode with its decoder tied, and the run's tokenizer.

    Raises:
        UserError: the checkpoint is damaged or does not fit the run's model, or the run lacks model/ or tokenizer/.
    """
    from mlm_dist.checkpoint import CheckpointError, Reader

    try:
        reader = Reader(source.checkpoint)
        reader.verify()
        return _model(source, reader), _tokenizer(source.run_dir)
    except CheckpointError as error:
        raise UserError(f"{error}; choose another checkpoint with --step") from error


def _model(source: Source, reader: "Reader") -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig

    from mlm_dist.model import families
    from mlm_dist.model.from_run import fill

    directory = source.run_dir / "model"
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory / 'config.json'}: missing; a checkpoint is exported from within its run directory")
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    config.dtype = torch.float32
    with torch.random.fork_rng(
        devices=[]
    ):  # the weights made here are all replaced; the caller's generator is not used up
        model = families.new(config)
    fill(model, reader)
    return model.eval()


def _tokenizer(run_dir: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer

    directory = run_dir / "tokenizer"
    if not directory.is_dir():
        raise UserError(f"{directory}: missing; a run keeps its tokenizer there")
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def export(path: str | Path, output: str | Path | None = None, *, step: int | None = None, best: bool = False) -> Path:
    """Write config, weights (safetensors, fp32), tokenizer and model card; returns the directory, by default
    ``RUN/export``.

    The directory appears whole or not at all: it is written beside its place, loaded again through
        AutoModelForMaskedLM, compared to the bit with the checkpoint, then renamed. An export that is already there
        is replaced.

    Raises:
        UserError: no checkpoint there, or ``output`` exists and is no export.
    """
    source = find(path, step, best=best)
    target = Path(output) if output is not None else source.run_dir / "export"
    if target.exists() and not (target / _MARK).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output: {str(target)!r} exists and is no export of mlm-dist; give another directory")
    model, tokenizer = load(source)
    with _replacing(target) as directory, quiet():
        _write(directory, source, model, tokenizer)
        _verify(directory, model, tokenizer)
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new directory beside ``target`` that takes its place at the end, or vanishes on an error."""
    new, old = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        raise UserError(
            f"--output: {str(target)!r} cannot be written ({error.strerror or error}); give another directory"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _write(directory: Path, source: Source, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    from mlm_dist.checkpoint import Reader
    from mlm_dist.model import families

    tokenizer.model_max_length = min(tokenizer.model_max_length, families.of(model.config).longest(model.config))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    reader = Reader(source.checkpoint)
    (directory / "README.md").write_text(card(source, reader.step, reader.trainer, model, tokenizer), encoding="utf-8")
    mark = {"format": "mlm_dist.export", "version": 1, "run": source.run_dir.resolve().name, "step": reader.step}
    (directory / _MARK).write_text(json.dumps(mark, indent=1) + "\n")


def _verify(directory: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Load what was written as a user would, and compare."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    loaded = AutoModelForMaskedLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    written = dict(loaded.named_parameters(remove_duplicate=False))
    for name, value in model.named_parameters(remove_duplicate=False):
        # As integers: bits, so that -0.0 is not 0.0 and a NaN is itself.
        if not torch.equal(written[name].view(torch.int32), value.view(torch.int32)):
            raise RuntimeError(f"{directory}: {name} differs after loading it again")
    if loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight:
        raise RuntimeError(f"{directory}: the decoder is not tied after loading it again")
    if (
        AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False).get_vocab()
        != tokenizer.get_vocab()
    ):
        raise RuntimeError(f"{directory}: the tokenizer differs after loading it again")


def card(
    source: Source,
    step: int,
    trainer: Mapping[str, Any],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
) -> str:
    """The model card (Markdown with the hub's YAML head): what the model is, from which data and recipe, and how far
    it came.
    """
    from mlm_dist.model import families

    name, config = source.run_dir.resolve().name, redact(read_yaml(source.run_dir / "config.yaml"))
    head = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": [model.config.model_type, "fill-mask", "mlm-dist"],
        "mask_token": tokenizer.mask_token,
    }
    c = model.config
    size = sum(p.numel() for p in model.parameters())
    facts = {
        "Model": f"{type(model).__name__}, {c.num_hidden_layers} layers, hidden {c.hidden_size}, "
        f"{c.num_attention_heads} heads, {size:,} parameters",
        "Vocabulary": f"{len(tokenizer):,} tokens",
        "Longest input": f"{families.of(c).longest(c)} tokens",
        "Steps": f"{step:,}",
        **_training_facts(source.run_dir, step, trainer, config),
    }
    table = "\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items())
    recipe = yaml.safe_dump(config, sort_keys=False).strip() if config else "not recorded"
    # A fence longer than any run of backticks in the recipe.
    fence = "```" if "```" not in recipe else "`" * 12
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

A masked-language model ({families.of(c).label}) trained with mlm-dist.

| | |
|---|---|
{table}

## Use

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/directory")
fill("The first word of this sentence is {tokenizer.mask_token}.")
```

## Recipe

{fence}yaml
{recipe}
{fence}
"""


def _training_facts(run_dir: Path, step: int, trainer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    data = config.get("data") or {}
    if data.get("manifest"):
        facts["Data"] = f"`{data['manifest']}`"
    if data.get("seq_len"):
        facts["Sequence length in training"] = f"{data['seq_len']} tokens"
    records = (
        [r for r in read_metrics(run_dir / "metrics.jsonl") if r["step"] <= step]
        if (run_dir / "metrics.jsonl").is_file()
        else []
    )
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val" and r.get("loss") is not None]
    tokens = trainer.get("tokens") or (train[-1].get("tokens") if train else None)
    if tokens:
        facts["Useful tokens seen"] = f"{tokens:,}"
    if train and train[-1].get("epoch") is not None:
        facts["Epochs"] = f"{train[-1]['epoch']:.3g}"
    if train and train[-1].get("loss") is not None:
        # With labels: all the loss is over unmasked tokens too; validation is always over masked ones.
        kind = "masked" if (config.get("mask") or {}).get("labels", "masked") == "masked" else "labelled"
        facts["Training loss"] = f"{train[-1]['loss']:.4f} nats per {kind} token (step {train[-1]['step']:,})"
    if val:
        last = val[-1]
        more = [f"perplexity {last['perplexity']:.2f}"] if last.get("perplexity") is not None else []
        more += [f"accuracy {last['accuracy']:.1%}"] if last.get("accuracy") is not None else []
        facts["Validation loss"] = (
            ", ".join([f"{last['loss']:.4f} nats per masked token", *more]) + f" (step {last['step']:,})"
        )
    packages = (read_json(run_dir / "env.json") or {}).get("packages")
    if packages:
        facts["Software"] = ", ".join(f"{k} {v}" for k, v in packages.items())
    return facts


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist export``."""
    parser.description = (
        "Write a checkpoint as a stock masked-language model's directory (safetensors, tokenizer, model card)."
    )
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", type=Path, help="run directory, or one of its checkpoints"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN/export)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    which.add_argument(
        "--best", action="store_true", help="the checkpoint with the lowest validation loss of those kept"
    )


def run(args: argparse.Namespace) -> int:
    """``mlm-dist export``."""
    import torch

    if not torch.cuda.is_available():  # save_pretrained imports DeepSpeed, which else warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print(export(args.source, args.output, step=args.step, best=args.best))
    return 0
