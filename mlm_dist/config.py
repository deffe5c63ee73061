"""The run's configuration: one tree of dataclasses, each section declared beside its owner, read from YAML, ``MLM_*`` variables and flags."""

import difflib
import glob
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mlm_dist.checkpoint import CheckpointConfig
from mlm_dist.combinations import Precision
from mlm_dist.data.batches import BatchWarmup
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.stream import DataConfig
from mlm_dist.ds_config import DeepSpeedSection
from mlm_dist.errors import UserError
from mlm_dist.evaluate import EvalConfig
from mlm_dist.lifecycle import RunConfig
from mlm_dist.model.bert import ModelConfig
from mlm_dist.optim import OptimConfig
from mlm_dist.tracking import TrackConfig

ENV_PREFIX = "MLM_"
MOST_TIMEOUT_S = 864_000
# May not change in a run directory at all; the manifest and tokenizer count by fingerprint, not by path.
IDENTITY = (
    "run.seed run.branch_from",
    "data.seq_len data.packing data.long_documents data.text_field data.lanes",
    "mask.strategy mask.rate mask.rate_schedule mask.rate_end mask.rate_steps mask.split mask.span_p mask.span_max mask.labels",
    "model.init model.name_or_path model.config",
    "train.global_batch train.batch_start train.batch_warmup_tokens",
    "optim.name optim.betas optim.eps optim.weight_decay",
)
# May change when the user says so by --allow_change KEY.
GUARDED = (
    *("train.steps", "train.epochs", "optim.lr", "optim.warmup", "optim.schedule"),
    *("optim.decay", "optim.decay_shape", "optim.final"),
)


@dataclass
class TrainConfig:
    """How long and in what pieces to train.

    Attributes:
        steps: optimizer steps; give this or ``epochs``.
        epochs: passes over the training manifest.
        global_batch: rows of one optimizer step over all ranks; accumulation is derived.
        batch_start: rows of the first steps when batches are to grow to ``global_batch``, which must be a multiple of it; they grow by as many at a time.
        batch_warmup_tokens: token places (rows x data.seq_len) over which they grow.
        micro_batch: rows of one forward and backward on one rank; ``auto``: as many as fit, by the planner and a trial on the devices.
        precision: ``fp32``; ``bf16`` or ``fp16`` (torch autocast; fp32 weights and moments; fp16 with dynamic loss scaling);
            ``bf16_pure`` (weights and activations in bf16, fp32 masters and gradient sums; ZeRO stages 1 to 3).
        clip: largest global L2 norm of the gradients; 0 is off.
        deterministic: bitwise repeatable kernels on CUDA (CPU is so anyway).
        timeout: seconds in which no rank gets any further after which the run ends with code 76, naming the ranks that are waited for; the start up
            to the first step, and checkpoints, may take 1800 s where this is less. Collectives give up after 1.25 times as long and 30 s.
        max_skipped: consecutive steps with a non-finite loss or gradient, or with a spike, before the run goes back; overflows
            that fp16's loss scale answers by halving itself are not counted.
        max_rollbacks: how often in the life of the run it may go back, to the last checkpoint before such steps, to leave
            them out from there on; after that it stops.
        spike: a step is skipped when its loss is above the median of the last 128 by more than so many (robust) standard
            deviations and by a tenth; null: none is. 10 is cautious. Steps on another mix of data or with another masking
            rate are not spikes, but may look like them.
    """

    steps: int | None = None
    epochs: int | None = None
    global_batch: int = 32
    batch_start: int | None = None
    batch_warmup_tokens: int | None = None
    micro_batch: int | Literal["auto"] = 8
    precision: Precision = "bf16"
    clip: float = 1.0
    deterministic: bool = False
    timeout: float = 1800.0
    max_skipped: int = 10
    max_rollbacks: int = 3
    spike: float | None = None

    def check(self) -> None:
        """Raises UserError for values that no run can have."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"train.steps: {self.steps}, train.epochs: {self.epochs}; give exactly one of them (--train.epochs null unsets the other)."
            )
        for key in (
            "steps",
            "epochs",
            "global_batch",
            "batch_start",
            "batch_warmup_tokens",
            "micro_batch",
            "max_skipped",
        ):
            value = getattr(self, key)
            if isinstance(value, int) and value < 1:
                raise UserError(f"train.{key}: {value} must be at least 1.")
        self.batch_warmup()
        if self.max_rollbacks < 0:
            raise UserError(f"train.max_rollbacks: {self.max_rollbacks} is negative; 0 stops the run instead.")
        if self.spike is not None and not (math.isfinite(self.spike) and self.spike > 0):
            raise UserError(f"train.spike: {self.spike} must be a positive number of standard deviations, or null.")
        if not (math.isfinite(self.clip) and self.clip >= 0):
            raise UserError(f"train.clip: {self.clip} must be a positive number, or 0 for no clipping.")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise UserError(f"train.timeout: {self.timeout} must be a positive number of seconds.")
        if self.timeout > MOST_TIMEOUT_S:
            raise UserError(f"train.timeout: {self.timeout} must be at most {MOST_TIMEOUT_S}, which is ten days.")

    def progress(self, step: int, read: int, num_bytes: int) -> float:
        """Share of the run that is done, in [0, 1], after ``step`` steps and ``read`` bytes of corpora of ``num_bytes``."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.epochs is not None
        return min(1.0, read / (self.epochs * num_bytes))

    def batch_warmup(self) -> BatchWarmup | None:
        """How batches grow, or None when all have ``global_batch`` rows. Raises UserError for growth that cannot be."""
        return BatchWarmup.of(self.batch_start, self.batch_warmup_tokens, self.global_batch)

    def smallest_batch(self) -> tuple[str, int]:
        """The key that says how many rows the first batch has, and that number."""
        if self.batch_start is not None:
            return "train.batch_start", self.batch_start
        return "train.global_batch", self.global_batch

    def check_world(self, world_size: int) -> None:
        """Raises UserError when the smallest batch has no row for some rank."""
        key, rows = self.smallest_batch()
        if rows < world_size:
            raise UserError(
                f"{key}: {rows} rows cannot feed {world_size} ranks; use at least {world_size}, or start fewer ranks."
            )


@dataclass
class Config:
    """Everything that a run is made from."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def check(self) -> None:
        """Check every section alone. Raises UserError naming the key, its value and what would be right."""
        for section in fields(self):
            check = getattr(getattr(self, section.name), "check", None)
            if check:
                check()
        self.mask.check_packing(self.data.packing)
        if self.train.steps is not None:
            self.optim.check_steps(self.train.steps)

    def flat(self) -> dict[str, Any]:
        """``{"section.key": value}`` in plain types (tuples become lists)."""
        return {f"{s}.{k}": _plain(v) for s, section in asdict(self).items() for k, v in section.items()}

    def dump(self) -> str:
        """The configuration as YAML that ``load`` reads back."""
        return yaml.safe_dump(
            {s: {k: _plain(v) for k, v in section.items()} for s, section in asdict(self).items()}, sort_keys=False
        )

    def identity(self, data: Any, tokenizer: str) -> dict[str, Any]:
        """What a run directory is tied to: the identity keys, and the fingerprints of the data (``DataInputs.fingerprints``) and the tokenizer."""
        flat = self.flat()
        if flat["optim.name"] == "cpu_adam":  # the same algorithm and state
            flat["optim.name"] = "adamw"
        return {key: flat[key] for line in IDENTITY for key in line.split()} | {
            ("data.sources" if isinstance(data, dict) else "data.manifest"): data,
            "data.tokenizer": tokenizer,
        }

    def guarded(self) -> dict[str, Any]:
        """The keys that change only by ``--allow_change``."""
        flat = self.flat()
        return {key: flat[key] for key in GUARDED}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def known_keys() -> list[str]:
    """Every ``section.key``."""
    sections = typing.get_type_hints(Config)
    return [
        f"{s.name}.{f.name}" for s in fields(Config) for f in fields(sections[s.name]) if is_dataclass(sections[s.name])
    ]


def _unknown(kind: str, key: str, candidates: Sequence[str]) -> UserError:
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.3)
    return UserError(f"{kind}: unknown key {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))


def _check_yaml(path: Path) -> None:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(
            f"--config: {str(path)!r} cannot be read ({error.strerror}). Give the path of a run config such as recipes/demo.yaml."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"--config: {str(path)!r} must hold sections such as 'run:' and 'data:', not {type(tree).__name__}."
        )
    known = known_keys()
    sections = sorted({k.split(".")[0] for k in known})
    for section, content in tree.items():
        if section not in sections:
            raise _unknown(str(path), str(section), sections)
        if not isinstance(content, dict):
            raise UserError(f"{path}: section {section!r} must hold keys, not {content!r}.")
        for key in content:
            if f"{section}.{key}" not in known:
                raise _unknown(str(path), f"{section}.{key}", known)


def _check_flags(argv: Sequence[str]) -> None:
    known = known_keys()
    for word in argv:
        key = word.removeprefix("--").split("=", 1)[0]
        meant = key.replace("-", "_") == "allow_change" or any(key == k or key.startswith(k + ".") for k in known)
        if word.startswith("--") and not meant:
            raise _unknown("flag", f"--{key}", [f"--{k}" for k in (*known, "allow_change")])


def _check_environment(environ: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + k.upper().replace(".", "__") for k in known_keys()}
    # MLM_TRAIN_STEPS, one underscore short, must not be passed over in silence; other tools' MLM_ variables may be there.
    sections = tuple(f"{ENV_PREFIX}{s.name.upper()}_" for s in fields(Config))
    for name in environ:
        if name.startswith(ENV_PREFIX) and ("__" in name or name.startswith(sections)) and name not in known:
            raise _unknown("environment", name, sorted(known))


@dataclass
class Invocation:
    """A parsed command line.

    Attributes:
        config: the configuration, checked section by section.
        allow_change: keys that the user lets differ from the run directory's.
    """

    config: Config
    allow_change: list[str]


def load(argv: Sequence[str], prog: str = "mlm-dist train") -> Invocation:
    """Read a command line: flag > ``MLM_*`` environment (``MLM_TRAIN__STEPS``) > the YAML of ``--config`` > default.

    Raises:
        UserError: no or unreadable config, unknown key, value of a wrong type or out of range.
        SystemExit: after ``--help``.
    """
    import jsonargparse

    argv = list(argv)
    path = _pop_option(argv, "--config")
    help_wanted = "-h" in argv or "--help" in argv
    if not help_wanted:
        if path is None:
            raise UserError("--config: missing. Give a run config, for example --config recipes/smoke.yaml.")
        _check_yaml(Path(path))
        _check_flags(argv)
        _check_environment(os.environ)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config FILE [--section.key VALUE ...]",
        description="Any key of the run config can be given as a flag or as an MLM_SECTION__KEY variable.",
        default_env=True,
        env_prefix="MLM",
        exit_on_error=False,
        default_config_files=[glob.escape(path)] if path else None,
    )
    sections = typing.get_type_hints(Config)
    for section in fields(Config):
        parser.add_class_arguments(sections[section.name], section.name)
    parser.add_argument(
        "--allow_change",
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="let this key differ from the run directory's",
    )
    try:
        namespace = parser.parse_args(argv)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        raise UserError(_wrong_value(" ".join(str(error).split()))) from error
    config = Config(**{s.name: _section(sections[s.name], namespace[s.name]) for s in fields(Config)})
    if config.run.name is None:
        config.run.name = Path(path).stem if path else "run"
    config.check()
    allow = list(namespace["allow_change"])
    for key in allow:
        if key not in GUARDED:
            raise UserError(f"--allow_change: {key!r} cannot be allowed; the keys that can are {', '.join(GUARDED)}.")
    return Invocation(config, allow)


def _wrong_value(message: str) -> str:
    """jsonargparse's complaint in the words of the user: the key, its value and what would be right."""
    found = re.search(r'"(\w+)\.(\w+)": .*(?:Got value|Given value): (.*)$', message)
    if not found or f"{found[1]}.{found[2]}" not in known_keys():
        return message
    hint = typing.get_type_hints(typing.get_type_hints(Config)[found[1]])[found[2]]
    return f"{found[1]}.{found[2]}: {found[3]!r} is wrong; it must be {in_words(hint)}."


def in_words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    if origin is list and is_dataclass(parts[0]):
        return f"a list of {{{', '.join(f.name for f in fields(parts[0]))}}}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes if it looks like a number)",
    }
    return {**words, dict: "keys with their values", types.NoneType: "null"}[origin or hint]


def _section(cls: Any, values: Any) -> Any:
    """A section from what jsonargparse made of it: namespaces within become dicts, or the dataclasses that a list is of."""
    out = {}
    for key, value in vars(values).items():
        hint = typing.get_type_hints(cls).get(key)
        items = [part for part in typing.get_args(hint) if typing.get_origin(part) is list]
        if isinstance(value, list) and items and is_dataclass(item := typing.get_args(items[0])[0]):
            value = [item(**vars(v)) for v in value]  # type: ignore[operator]
        out[key] = dict(value.as_dict()) if hasattr(value, "as_dict") else value
    return cls(**{k: v for k, v in out.items() if not k.startswith("__")})


def _pop_option(argv: list[str], option: str) -> str | None:
    value = None
    for i in range(len(argv) - 1, -1, -1):
        if argv[i] == option and i + 1 < len(argv):
            value = value or argv[i + 1]
            del argv[i : i + 2]
        elif argv[i].startswith(option + "="):
            value = value or argv[i].split("=", 1)[1]
            del argv[i]
    return value
