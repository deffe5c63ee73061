"""The files of DeepSpeed's ``save_checkpoint``: found, held against each other, and loaded without executing anything.

They are pickles. torch's restricted unpickler reads them, which knows tensors, containers and the few classes named here;
DeepSpeed's own converters (``zero_to_fp32``, ``ds_to_universal``) would run whatever a file says. Read against 0.19.8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError

_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?(model|optim)_states\.pt")
_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
# Of a checkpoint that a model in one piece does not have, and what it comes from.
_FOREIGN = {
    "layer_*-model*_states.pt": "pipeline parallelism",
    "*expert_*_states.pt": "experts",
    "offloaded_tensors": "an optimizer offloaded to NVMe",
}


@dataclass(frozen=True)
class Files:
    """What the files of one tag hold, as they were saved.

    Attributes:
        models: the model states of each rank at stage 3, of one at the others.
        optims: the optimizer states of each rank; empty at stage 0.
    """

    directory: Path
    models: list[dict[str, Any]]
    optims: list[dict[str, Any]]


def find(source: Path, tag: str | None) -> Path:
    """The directory of a tag (by default the one that ``latest`` names) in a directory of ``save_checkpoint``, or the one that ``source`` is.

    Raises:
        UserError: there is none.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; give the one that was handed to DeepSpeed's save_checkpoint")
    if tag is None and any(source.glob("*_model_states.pt")):
        return source
    if tag is None:
        try:
            tag = (source / "latest").read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"{source}: holds no file latest and no *_model_states.pt; give the directory of save_checkpoint, with --tag where it has no latest"
            ) from None
    directory = source / tag
    # A tag is a name: what `latest` says must not lead out of the directory.
    if not tag or Path(tag).name != tag or not any(directory.glob("*_model_states.pt")):
        has = sorted(p.parent.name for p in source.glob("*/*_model_states.pt"))
        raise UserError(f"--tag: {source} holds no checkpoint {tag!r}; it has {', '.join(sorted(set(has))) or 'none'}")
    return directory


def load(directory: Path, trust_pickle: bool) -> Files:
    """Load the files of a tag. Tensors stay on the disk until they are used.

    Args:
        trust_pickle: let the files execute what they say, where the restricted unpickler cannot read them.

    Raises:
        UserError: files are missing or damaged, hold more than tensors and DeepSpeed's own, or are of a model in several pieces.
    """
    for pattern, what in _FOREIGN.items():
        if any(directory.glob(pattern)):
            raise UserError(f"{directory}: was saved with {what}, which cannot be converted")
    models: dict[int, Path] = {}
    optims: dict[int, Path] = {}
    for path in directory.glob("*.pt"):
        if match := _RANK.fullmatch(path.name):
            rank, piece, kind = int(match[1]), int(match[2]), match[3]
        elif match := _WHOLE.fullmatch(path.name):
            rank, piece, kind = 0, int(match[1]), "model"
        else:
            continue
        if piece:
            raise UserError(f"{path}: the model was cut by tensor parallelism, which cannot be converted")
        (models if kind == "model" else optims)[rank] = path
    for kind, found in (("model", models), ("optim", optims)):
        missing = set(range(len(found))) - found.keys()
        if missing or (kind == "model" and not found):
            raise UserError(f"{directory}: the {kind}_states of rank {min(missing, default=0)} are missing")
    loaded = [[_load(found[rank], trust_pickle) for rank in sorted(found)] for found in (models, optims)]
    return Files(directory, *loaded)


def _load(path: Path, trust_pickle: bool) -> dict[str, Any]:
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        with safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            unknown = get_unsafe_globals_in_checkpoint(path)
            if unknown and not trust_pickle:
                raise UserError(
                    f"{path}: holds more than tensors and DeepSpeed's own objects: {', '.join(sorted(unknown))}. Loading them executes what the file "
                    "says. If you trust whoever wrote it, add --trust-pickle."
                )
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=not unknown)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({first})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no checkpoint of DeepSpeed")
    return content
