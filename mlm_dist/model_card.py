"""The model card of an export: what the model is, from which data and recipe, how far it came, and what it was not tested for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlm_dist.errors import UserError
from mlm_dist.report import facts, read
from mlm_dist.report.run import Run, account, load, number, whole
from mlm_dist.report.summary import draw
from mlm_dist.report.words import duration

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CURVES = "training.png"
# An absolute path, of this host or as file:, and not the path in another address.
_PATH = re.compile(r"(?<![^\s'\"=,(\[])(file:/*(?=/)|~[^/\s]*|)(/[^\s'\",)\]]+)")
# Validations in the table: the last ones, and the best.
_MOST_VALIDATIONS = 10


@dataclass(frozen=True)
class Exported:
    """The checkpoint that a card is of.

    Attributes:
        trainer: what the checkpoint tells of the training up to it.
        dtype: of the weights that were written: fp32, bf16 or fp16.
    """

    run_dir: Path
    step: int
    trainer: Mapping[str, Any]
    dtype: str


def write(directory: Path, of: Exported, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write ``README.md`` and, where the run's metrics are there, the picture that it shows."""
    run = _up_to(of.run_dir, of.step)
    if run is not None:
        draw(run, facts.headline(run), directory / CURVES)
    (directory / "README.md").write_text(_card(of, run, model, tokenizer), encoding="utf-8")


def _up_to(run_dir: Path, step: int) -> Run | None:
    """The run as it was at ``step``; None without a record of it."""
    try:
        run = load(run_dir)
    except UserError:  # no metrics: a checkpoint can be exported all the same
        return None
    train, val = ([r for r in records if r["step"] <= step] for records in (run.train, run.val))
    restarts = [s for s in run.restarts if s <= step]
    return replace(run, train=train, val=val, restarts=restarts, status={}) if train or val else None


def _card(of: Exported, run: Run | None, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
    name, config = of.run_dir.resolve().name, _public(read.config(of.run_dir)[0])
    head = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": [model.config.model_type, "fill-mask", "mlm-dist"],
        "mask_token": tokenizer.mask_token,
    }
    longest = tokenizer.model_max_length
    recipe = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).strip() if config else "not recorded"
    # A fence longer than any run of backticks in the recipe.
    fence = "```" if "```" not in recipe else "`" * 12
    curves = "" if run is None else f"\n![Loss, accuracy, learning rate and throughput]({CURVES})\n"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {name}

A masked-language model ({type(model).__name__}) trained with mlm-dist.

{_table(_model(of, model, tokenizer))}

## Use

```python
from transformers import pipeline

fill = pipeline("fill-mask", model="path/to/this/directory")
fill("The first word of this sentence is {tokenizer.mask_token}.")
```

## Data

{_table(_data(of, run, config))}

## Training
{curves}
{_table(_training(of, run, config))}

{_validations(run)}

## Recipe

{fence}yaml
{recipe}
{fence}

## Limitations

The model gives back what was frequent in its training text, its errors and its biases too. It was scored by masked tokens of the validation text above and
by nothing else: not on other tasks, languages or domains, nor for bias or safety. Inputs longer than {longest:,} tokens must be cut.
"""


def _public(value: Any) -> Any:
    """A copy of a config without the directories above what absolute paths in it name: they may tell of people and machines."""
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, str):
        return _PATH.sub(_end, value)
    return value


def _end(path: re.Match[str]) -> str:
    home = path[1].startswith("~")
    names = [name for name in path[2].split("/") if name]
    return "/".join(["…", *names[0 if home else 2 :][-2:]])  # without /home/someone, which ~ stands for


def _model(of: Exported, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    c = model.config
    size = sum(p.numel() for p in model.parameters())
    return {
        "Model": f"{type(model).__name__}, {c.num_hidden_layers} layers, hidden {c.hidden_size}, "
        f"{c.num_attention_heads} heads, {size:,} parameters, {of.dtype}",
        "Vocabulary": f"{len(tokenizer):,} tokens",
        "Longest input": f"{tokenizer.model_max_length:,} tokens",
        "Steps": f"{of.step:,}",
    }


def _data(of: Exported, run: Run | None, config: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    data = config.get("data", {})
    sources = data.get("sources")
    named = [
        data.get("manifest"),
        *(s.get("manifest") for s in (sources if isinstance(sources, list) else []) if isinstance(s, dict)),
    ]
    if any(named):
        out["Data"] = ", ".join(f"`{m}`" for m in named if m)
    identity, _ = read.identity(of.run_dir)
    if fingerprint := identity.get("data.manifest", identity.get("data.sources")):
        out["Fingerprint"] = f"`{fingerprint}`"
    starts = [e["documents"] for e in (run.events if run else []) if isinstance(e.get("documents"), list)]
    if starts:
        out["Documents"] = " + ".join(f"{n:,}" for n in starts[-1] if whole(n) is not None)
    if data.get("seq_len"):
        out["Sequence length in training"] = f"{data['seq_len']} tokens"
    last = run.train[-1] if run and run.train else {}
    tokens = number(of.trainer.get("tokens")) or number(last.get("tokens"))
    if tokens:
        out["Useful tokens seen"] = f"{tokens:,.0f}"
    if (epoch := number(last.get("epoch"))) is not None:
        out["Epochs"] = f"{epoch:.3g}"
    lost = sum(whole(f.get("documents")) or 0 for f in of.trainer.get("ledger") or ())
    out["Documents lost to faults"] = f"{lost:,}"
    out["Language"] = "not recorded: it is that of the data"
    return out


def _training(of: Exported, run: Run | None, config: Mapping[str, Any]) -> dict[str, str]:
    if run is None:
        return {"Metrics": "not recorded"}
    out = {}
    last = run.train[-1] if run.train else {}
    if (loss := number(last.get("loss"))) is not None:
        # With labels: all the loss is over unmasked tokens too; validation is always over masked ones.
        kind = "masked" if config.get("mask", {}).get("labels", "masked") == "masked" else "labelled"
        out["Training loss"] = f"{loss:.4f} nats per {kind} token (step {last['step']:,})"
    if scored := facts.scored(run):
        out["Validation loss"] = _measured(scored[-1])
    if run.unigram_entropy is not None:
        out["Unigram entropy of the validation text"] = f"{run.unigram_entropy:.4f} nats"
    if (ranks := whole(last.get("world_size"))) is not None:
        out["Ranks"] = str(ranks)
    environment = run.environment
    if environment.get("device"):
        out["Devices"] = f"{environment.get('devices')} x {environment['device']}"
    for key in ("platform", "python"):
        if environment.get(key):
            out[key.capitalize()] = str(environment[key])
    parts = account(run)
    if parts and of.step >= max(r["step"] for r in run.records):  # the time up to an earlier step is not known so well
        out["Wall-clock time"] = f"{duration(parts['wall'])}, of it {duration(parts['kept'])} in steps that count"
    if environment.get("commit"):
        out["Commit of mlm-dist"] = f"`{environment['commit']}`"
    packages = environment.get("packages")
    if isinstance(packages, dict) and packages:
        out["Software"] = ", ".join(f"{k} {v}" for k, v in packages.items())
    return out


def _measured(record: Mapping[str, Any]) -> str:
    parts = [f"{record['loss']:.4f} nats per masked token"]
    for key, form in (("perplexity", "perplexity {:.2f}"), ("accuracy", "accuracy {:.1%}")):
        if (value := number(record.get(key))) is not None:
            parts.append(form.format(value))
    return f"{', '.join(parts)} (step {record['step']:,})"


def _validations(run: Run | None) -> str:
    """Of the last validations, and of the best, a table."""
    best = facts.best(run) if run else None
    if run is None or best is None:
        return "No validation was made."
    scored = facts.scored(run)
    shown = scored[-_MOST_VALIDATIONS:]
    shown = shown if any(r is best for r in shown) else [best, *shown]
    lines = ["| Step | Validation loss | Perplexity | Accuracy |", "|---|---|---|---|"]
    for r in shown:
        cells: Sequence[str] = [
            f"{r['step']:,}",
            f"{r['loss']:.4f}" + (" (best)" if r is best else ""),
            *("" if (v := number(r.get(k))) is None else format(v, form) for k, form in (("perplexity", ".2f"), ("accuracy", ".1%"))),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
