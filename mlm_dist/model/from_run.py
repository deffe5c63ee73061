"""The model of another run: its sizes and tokenizer from the run directory, its weights from a checkpoint there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist.errors import UserError
from mlm_dist.model import families, pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from mlm_dist.checkpoint import Reader

logger = logging.getLogger(__name__)


def directory(source: str) -> Path:
    """The run directory of `source`, which is one or a checkpoint in one."""
    path = Path(source).expanduser()
    return path.resolve().parent.parent if path.parent.name == "checkpoints" else path


def read_config(source: str) -> dict[str, Any]:
    """The configuration values of the run's model. Reads no weights.

    Raises:
        UserError: `source` is no run, or has no checkpoint yet.
    """
    from mlm_dist import checkpoint

    run = directory(source)
    if not (run / "model" / "config.json").is_file():
        raise UserError(
            f"model.name_or_path: {source} is no run: there is no {run / 'model' / 'config.json'}; give a run directory or one of its checkpoints"
        )
    if not checkpoint.committed(run):
        raise UserError(f"model.name_or_path: {source} has no checkpoint yet; wait for its first")
    return pretrained.read_config(str(run / "model"), weights=False)


def newest(source: str, warn: Callable[[str], None]) -> Path:
    """The checkpoint `source`, or the newest whole one of the run `source`. While that run goes on only one rank may choose.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from mlm_dist import checkpoint

    try:
        return checkpoint.locate(source, warn)
    except checkpoint.CheckpointError as error:
        raise UserError(f"model.name_or_path: {error}") from error


def load(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of the checkpoint `source`, or of the newest whole one of the run `source`, in fp32 under `config`.

    Raises:
        UserError: there is none, it is damaged, or its weights are not those of `config`.
    """
    from mlm_dist import checkpoint

    path = newest(source, logger.warning)
    try:
        model = families.new(config)
        fill(model, checkpoint.Reader(path))
    except checkpoint.CheckpointError as error:
        raise UserError(f"model.name_or_path: {error}") from error
    logger.info("weights from %s", path)
    return model


def fill(model: PreTrainedModel, reader: Reader) -> None:
    """Put the checkpoint's weights into `model`, all of them.

    Raises:
        UserError: the two have not the same parameters of the same shapes.
        CheckpointError: the checkpoint cannot be read.
    """
    import torch

    stored = set(reader.names())
    aliases: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    with torch.no_grad():
        for names in aliases.values():
            held = [name for name in names if name in stored]
            if not held:
                raise UserError(f"{reader.path}: holds no {names[0]}, which the model of its run has")
            value, parameter = reader.parameter(held[0]), parameters[names[0]]
            if value.shape != parameter.shape:
                raise UserError(
                    f"{reader.path}: {held[0]} is {tuple(value.shape)}, the model of its run has {tuple(parameter.shape)}"
                )
            parameter.copy_(value)
            stored.difference_update(held)
    if stored:
        raise UserError(f"{reader.path}: holds {min(stored)}, which the model of its run has not")
