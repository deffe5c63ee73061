"""Checkpoints in transformers' format: what their files say, and their weights with nothing lost in silence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_dist.errors import UserError
from mlm_dist.model import families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a checkpoint must have to be trained, saved and exported as a masked-language model.
_REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",  # transformers 5 builds absolute ones whatever stands here
}
# How a checkpoint was stored or trained by others, which says nothing of how it is trained here.
_NOT_OURS = (
    "_name_or_path",
    "architectures",
    "dtype",
    "gradient_checkpointing",
    "position_embedding_type",
    "torch_dtype",
    "transformers_version",
)
# Heads that checkpoints carry and a masked-language model does not have, after the encoder's name or without it.
_OTHER_HEADS = ("pooler.", "cls.seq_relationship.", "discriminator_predictions.")


def read_config(name: str, weights: bool = True) -> dict[str, Any]:
    """The configuration values of the checkpoint `name`, a directory or a name on the Hugging Face hub. Reads no weights,
    but with `weights` sees that a directory has them.

    Raises:
        UserError: it is missing, unreachable, damaged or not an encoder of `families.FAMILIES` with tied embeddings.
    """
    values = _read_directory(name, weights) if _is_path(name) else _read_hub(name)
    family = families.family(values.get("model_type"), f"model.name_or_path: {name}")
    for key, right in _REQUIRED.items():
        if values.get(key, right) != right:
            raise UserError(
                f"model.name_or_path: {name} has {key} {values[key]!r}; only {right!r} can be trained as a "
                "masked-language model here"
            )
    missing = [key for key in family.sizes if key not in values]
    if missing:
        raise UserError(f"model.name_or_path: the config.json of {name} lacks {', '.join(missing)}")
    return {key: value for key, value in values.items() if key not in _NOT_OURS}


def read_vocabulary(name: str) -> dict[int, str] | None:
    """id -> token of the vocabulary in the directory `name`; None when there is none or `name` is one of the hub's.

    Raises:
        UserError: the file that holds it is damaged.
    """
    directory = Path(name).expanduser()
    text, fast = directory / "vocab.txt", directory / "tokenizer.json"
    try:
        if fast.is_file():
            values = json.loads(fast.read_text(encoding="utf-8"))
            table = values["model"]["vocab"]  # a Unigram model's is a list of [token, score]
            pairs = table.items() if isinstance(table, dict) else ((one[0], i) for i, one in enumerate(table))
            vocabulary = {index: token for token, index in pairs}
            return vocabulary | {added["id"]: added["content"] for added in values.get("added_tokens", ())}
        if text.is_file():
            # Not splitlines: the tokens of some vocabularies are Unicode line separators.
            return dict(enumerate(text.read_text(encoding="utf-8").removesuffix("\n").split("\n")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.name_or_path: the vocabulary in {name} cannot be read: {error!r}") from error
    return None


def load(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of `name` in fp32 under `config`. A missing head is new, drawn from torch's default generator.

    Logs what was missing and what was left unused.

    Raises:
        UserError: the weights cannot be read, the encoder is incomplete, larger or of other shapes than `config`, or
            the decoder is not the embeddings.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    source = str(Path(name).expanduser()) if _is_path(name) else name
    try:
        with quiet():
            # Shapes that differ are refused below: transformers' own error does not name them.
            model, info = AutoModelForMaskedLM.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except Exception as error:  # safetensors, pickle, JSON and network errors share no base
        raise UserError(
            f"model.name_or_path: the weights of {name} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    _check_report(name, info, model)
    # transformers 5 unties, with no more than a warning, when the file holds a decoder that differs.
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise UserError(
            f"model.name_or_path: {name} holds a decoder that differs from its word embeddings; only tied ones can be "
            "trained here"
        )
    loaded: PreTrainedModel = model
    return loaded


def _check_report(name: str, info: Mapping[str, Any], model: PreTrainedModel) -> None:
    """Refuse or log what transformers' loading report `info` says of `model`."""
    base = f"{model.base_model_prefix}."
    encoder = (base, *(f"{part}." for part, _ in model.base_model.named_children()))
    other_heads = (*_OTHER_HEADS, *(base + head for head in _OTHER_HEADS))
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    lost = [key for key in missing if key.startswith(base)]
    if lost:
        raise UserError(f"model.name_or_path: {name} lacks {len(lost)} weights of the encoder, {lost[0]} first")
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, stored, wanted = wrong[0]
        raise UserError(
            f"model.name_or_path: {len(wrong)} weights of {name} differ in shape from its config.json: {key} is "
            f"{list(stored)}, not {list(wanted)}"
        )
    stray = [key for key in unused if key.startswith(encoder) and not key.startswith(other_heads)]
    if stray:
        raise UserError(
            f"model.name_or_path: {name} holds {len(stray)} weights of the encoder that its config.json does not have, "
            f"{stray[0]} first"
        )
    if missing:
        logger.warning("%s has no masked-LM head, new from the seed: %s", name, ", ".join(missing))
    if unused:
        level = logging.INFO if all(key.startswith(other_heads) for key in unused) else logging.WARNING
        logger.log(level, "%s: left unused: %s", name, ", ".join(unused))


def _is_path(name: str) -> bool:
    """Whether `name` can only be meant as a path: names on the hub have at most one slash, and none at the ends."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/") or Path(name).exists()


def _read_directory(name: str, weights: bool) -> dict[str, Any]:
    directory = Path(name).expanduser()
    if not directory.exists():
        raise UserError(
            f"model.name_or_path: {name} does not exist; it must be a directory with config.json and model.safetensors"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            f"model.name_or_path: {name} holds no config.json; it must be a directory in transformers' format"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.name_or_path: {path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"model.name_or_path: {path} holds a {type(values).__name__}, not a model's configuration")
    if weights and not any((directory / file).is_file() for file in _WEIGHT_FILES):
        raise UserError(f"model.name_or_path: {name} holds no weights; it must have one of {', '.join(_WEIGHT_FILES)}")
    return values


def _read_hub(name: str) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name_or_path: {name} is neither a directory here nor a model that the Hugging Face hub gives "
            f"({cause}); download it where there is a network and give the directory"
        ) from error
    return dict(values)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing bars and tables of its own while it loads or saves; `load` logs what they say."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
