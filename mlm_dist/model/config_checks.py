"""What the values of a model's configuration must be, whether from `model.config` or from a checkpoint's config.json.

Each check raises UserError naming the key, its value and what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlm_dist.errors import UserError
from mlm_dist.model.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Scalings of rotary frequencies that are set when the model is built. Of the others of transformers, `dynamic` and `longrope`
# set them anew in each forward pass, by its highest position.
STATIC_ROTATIONS = ("default", "linear", "yarn", "llama3", "proportional")


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float; a truth value is neither here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_keys(values: Mapping[str, Any], family: Family) -> None:
    """The names in `model.config`."""
    elsewhere = dict.fromkeys(family.hidden_dropout, "model.hidden_dropout")
    elsewhere[family.attention_dropout] = "model.attention_dropout"
    for key, value in values.items():
        if key in elsewhere:
            raise UserError(f"model.config.{key} is set by {elsewhere[key]}; move {value!r} there")
        if key not in family.keys:
            # "layers" is meant as the key that has it as a part, though by letters another may be nearer.
            near = [known for known in family.keys if str(key) in known] or difflib.get_close_matches(
                str(key), family.keys, n=1, cutoff=0.5
            )
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(family.keys)}"
            raise UserError(f"model.config.{key} (value {value!r}) is unknown; {hint}")


def check_values(values: Mapping[str, Any], source: str, family: Family, kind: type[PreTrainedConfig]) -> None:
    """The sizes in `values`, which `source` gave; absent ones are the defaults of `kind` and right."""
    from transformers.activations import ACT2FN

    for key in (*family.sizes, *family.counts):
        value = values.get(key, 1)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise UserError(f"{source}: {key} {value!r} is not a size; it must be a whole number of at least 1")
    for key in family.positive:
        value = values.get(key, 0.02)
        if not (is_number(value) and 0.0 < value < 1.0):
            raise UserError(f"{source}: {key} {value!r} is wrong; it must be a number above 0 and below 1")
    for key in family.activations:
        act = values.get(key, "gelu")
        if not isinstance(act, str) or act not in ACT2FN:
            near = difflib.get_close_matches(str(act), list(ACT2FN), n=1, cutoff=0.5)
            hint = f", a near one is {near[0]}" if near else ""
            raise UserError(f"{source}: {key} {act!r} is unknown; {family.label}'s is gelu{hint}")
    width, count = family.sizes[1], family.sizes[3]
    hidden, heads = (values.get(key, getattr(kind, key)) for key in (width, count))
    if hidden % heads:
        nearest = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))
        raise UserError(
            f"{source}: {count} {heads} does not divide {width} {hidden}; the nearest number that does is {nearest}"
        )
    if family.rotary and hidden // heads % 2:
        raise UserError(
            f"{source}: {width} {hidden} over {count} {heads} makes heads of size {hidden // heads}; a {family.label} rotates pairs of their numbers, so "
            "that it must be even"
        )


def check_padding(name: str, family: Family, stored: int, pad_token_id: int | None) -> None:
    """Where positions are counted from the padding token's id, another tokenizer's would move all of them."""
    if family.after_padding and pad_token_id not in (None, stored):
        raise UserError(
            f"data.tokenizer: its padding token is {pad_token_id}, that of {name} is {stored}, and a {family.label} counts positions from there; set "
            "data.tokenizer to the one that the checkpoint was trained with"
        )


def check_rotations(config: PreTrainedConfig, source: str, family: Family) -> None:
    """Where a long document sets the frequencies for all, it changes the others of its micro-batch."""
    if not family.rotary:
        return
    for kind, values in config.rope_parameters.items():
        scaling = values["rope_type"]
        if scaling not in STATIC_ROTATIONS:
            raise UserError(
                f"{source}: rope_parameters.{kind}.rope_type {scaling!r} cannot be trained here: with dynamic and longrope the longest document of a "
                f"micro-batch sets the rotations of all others; it must be one of {', '.join(STATIC_ROTATIONS)}"
            )
