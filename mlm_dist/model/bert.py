"""Which BERT to train: its configuration, checked before any weight exists, and the model, new or from a checkpoint."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlm_dist.errors import UserError
from mlm_dist.model import pretrained

if TYPE_CHECKING:
    from transformers import BertConfig, BertForMaskedLM

ATTENTION_CHOICES = ("auto", "varlen", "sdpa", "eager")
# Positions whose logits the head holds at a time: of 30,522 tokens in fp32 they are 250 MB.
HEAD_CHUNK = 2048

# What `model.config` may hold. Dropout is not here because `model.hidden_dropout` and `model.attention_dropout` own it
# for every kind of start.
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_POSITIVE = ("initializer_range", "layer_norm_eps")
_CONFIG_KEYS = (*_COUNTS, *_POSITIVE, "hidden_act")
_ELSEWHERE = {"hidden_dropout_prob": "model.hidden_dropout", "attention_probs_dropout_prob": "model.attention_dropout"}

# A vocabulary is padded to such a multiple so that the product with it fills the hardware's tiles; the rows past the
# tokenizer's are never used.
_VOCABULARY_MULTIPLES = (64, 128)


@dataclass
class ModelConfig:
    """The section `model` of a run's configuration.

    Attributes:
        init: `config` for new weights, `pretrained` for those of a checkpoint.
        name_or_path: with `pretrained`, a directory in transformers' format or a name on the Hugging Face hub.
        config: with `config`, sizes by their BertConfig names; absent ones are BERT-base's, and `vocab_size` the
            tokenizer's.
        attention: back end; `auto` takes the fastest that is right on the device. `varlen` computes real tokens only,
            on CUDA in bf16 or fp16.
        attention_dropout: probability that replaces the one of the checkpoint (or BertConfig's 0.1).
        hidden_dropout: the same for the outputs of layers and embeddings.
        checkpoint_activations: recompute each layer in the backward pass rather than keep what it computed.
        head: `torch`, or `liger` for liger-kernel's fused decoder and cross-entropy (CUDA, the extra `liger`).
        head_chunk: selected positions whose logits are in memory at a time; beyond so many in a micro-batch the head is
            computed twice.
        compile: let torch.compile fuse the encoder layers.
    """

    init: Literal["config", "pretrained"] = "config"
    name_or_path: str | None = None
    config: dict[str, Any] | None = None
    attention: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    attention_dropout: float | None = None
    hidden_dropout: float | None = None
    checkpoint_activations: bool = False
    head: Literal["torch", "liger"] = "torch"
    head_chunk: int = HEAD_CHUNK
    compile: bool = False


def check_attention(name: str) -> str:
    """Return `name` when `model.attention` may be so; UserError otherwise."""
    if name not in ATTENTION_CHOICES:
        raise UserError(f"model.attention: {name!r} is unknown; it must be one of {', '.join(ATTENTION_CHOICES)}")
    return name


def load_config(cfg: ModelConfig, *, vocab_size: int | None, pad_token_id: int) -> "BertConfig":
    """The BertConfig that `cfg` asks for. Reads configuration files only, no weights.

    Args:
        cfg: the section `model`.
        vocab_size: the tokenizer's size, taken for new weights whose `config` names none; None leaves BertConfig's.
        pad_token_id: the tokenizer's padding token, whose embedding gets no gradient.

    Raises:
        UserError: a value of `cfg` is wrong, or the checkpoint is missing, unreachable, damaged, or not a BERT encoder.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import BertConfig

    _check_section(cfg)
    if cfg.init == "config":
        values = dict(cfg.config or {})
        _check_keys(values)
        _check_values(values, "model.config")
        if vocab_size is not None:
            values.setdefault("vocab_size", vocab_size)
    else:
        assert cfg.name_or_path is not None
        values = pretrained.read_config(cfg.name_or_path)
        _check_values(values, f"model.name_or_path {cfg.name_or_path}")
    for key, value in (
        ("hidden_dropout_prob", cfg.hidden_dropout),
        ("attention_probs_dropout_prob", cfg.attention_dropout),
    ):
        if value is not None:
            values[key] = value
    try:
        return BertConfig.from_dict({**values, "pad_token_id": pad_token_id})
    except (StrictDataclassError, TypeError, ValueError) as error:
        source = cfg.name_or_path or "model.config"
        raise UserError(f"model: BertConfig refuses the configuration of {source}: {error}") from error


def check_fit(config: "BertConfig", *, vocab_size: int, seq_len: int) -> None:
    """Check that the model takes what the data will give it.

    Args:
        config: the model's.
        vocab_size: number of tokens of the tokenizer.
        seq_len: longest row, in tokens.

    Raises:
        UserError: the vocabularies differ by more than padding to a multiple of 64 or 128, or a row is longer than the
            position table.
    """
    padded = {-(-vocab_size // multiple) * multiple for multiple in _VOCABULARY_MULTIPLES}
    if config.vocab_size != vocab_size and config.vocab_size not in padded:
        raise UserError(
            f"the model's vocabulary of {config.vocab_size:,} tokens does not fit the tokenizer's {vocab_size:,}: for "
            f"new weights leave model.config.vocab_size out (padded it is {' or '.join(map(str, sorted(padded)))}), "
            "for a checkpoint set data.tokenizer to the one that it was trained with"
        )
    if seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.seq_len {seq_len} is longer than the model's position table: it must be at most "
            f"max_position_embeddings, {config.max_position_embeddings}"
        )


def check_vocabulary(cfg: ModelConfig, vocabulary: Mapping[str, int]) -> None:
    """Check the tokenizer's `vocabulary` (token -> id) against the one that lies beside a local checkpoint's weights.

    Two vocabularies of one size pass `check_fit`, yet the embeddings would belong to other tokens. Does nothing for new
    weights, for a name on the hub and for a directory that holds weights alone.

    Raises:
        UserError: the first token that differs.
    """
    if cfg.init != "pretrained" or cfg.name_or_path is None:
        return
    theirs = pretrained.read_vocabulary(cfg.name_or_path)
    if theirs is None:
        return
    ours = {index: token for token, index in vocabulary.items()}
    for index in sorted(theirs.keys() | ours.keys()):
        if ours.get(index) != theirs.get(index):
            raise UserError(
                f"data.tokenizer is not the one of model.name_or_path {cfg.name_or_path}: token {index} is "
                f"{ours.get(index)!r} in the first and {theirs.get(index)!r} in the second; set data.tokenizer to "
                f"{cfg.name_or_path}"
            )


def build(cfg: ModelConfig, config: "BertConfig", *, seed: int) -> "BertForMaskedLM":
    """The model in fp32 on the CPU, in training mode.

    New weights depend on `config` and `seed` alone: not on the state of any global generator, which is left as found,
    nor on the rank. A checkpoint that has no masked-LM head (a plain BertModel) gets a new one from `seed`; that and
    the weights left unused are logged.

    Raises:
        UserError: the checkpoint lacks weights of the encoder, has others than its configuration says, or cannot be
            read.
    """
    import torch
    from transformers import BertForMaskedLM

    # Not torch.manual_seed: it would seed the accelerators' generators too, which are neither forked nor drawn from.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if cfg.init == "config":
            model = BertForMaskedLM(config)
        else:
            assert cfg.name_or_path is not None
            model = pretrained.load(cfg.name_or_path, config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if cfg.checkpoint_activations:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def flops_per_token(config: "BertConfig", *, attended: float, selected: float) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    The products of matrices alone, two operations for each multiply-add, the backward pass twice the forward one
    (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", 2.1, with the attention term that they leave out).
    What activation checkpointing computes again does not count.

    Args:
        config: the model's.
        attended: mean number of positions that a token sees, itself included: the length of its segment for isolated
            segments.
        selected: share of the tokens that the head runs on.
    """
    hidden, feed_forward = config.hidden_size, config.intermediate_size
    layer = 2 * (4 * hidden**2 + 2 * hidden * feed_forward) + 4 * attended * hidden
    head = 2 * (hidden**2 + hidden * config.vocab_size)
    return 3.0 * float(config.num_hidden_layers * layer + selected * head)


def _check_section(cfg: ModelConfig) -> None:
    if cfg.init not in ("config", "pretrained"):
        raise UserError(f"model.init: {cfg.init!r} is unknown; it must be config or pretrained")
    check_attention(cfg.attention)
    if cfg.head not in ("torch", "liger"):
        raise UserError(f"model.head: {cfg.head!r} is unknown; it must be torch or liger")
    if cfg.head_chunk < 1:
        raise UserError(f"model.head_chunk: {cfg.head_chunk} must be at least 1 position; 2048 is usual")
    if cfg.init == "pretrained" and not cfg.name_or_path:
        raise UserError("model.name_or_path is missing: model.init pretrained needs a directory or a name on the hub")
    if cfg.init == "pretrained" and cfg.config:
        raise UserError(
            f"model.config {cfg.config} has no use with model.init pretrained, whose sizes come from model.name_or_path"
            f" {cfg.name_or_path}; leave one out"
        )
    if cfg.init == "config" and cfg.name_or_path:
        raise UserError(
            f"model.name_or_path {cfg.name_or_path} has no use with model.init config; set model.init to pretrained or "
            "leave the name out"
        )
    if cfg.init == "config" and not cfg.config:
        raise UserError(
            "model.config is missing: model.init config needs the sizes, such as hidden_size and num_hidden_layers"
        )
    for name in ("attention_dropout", "hidden_dropout"):
        value = getattr(cfg, name)
        if value is not None and not (_is_number(value) and 0.0 <= value < 1.0):
            raise UserError(f"model.{name}: {value!r} is not a probability; it must be at least 0 and below 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_keys(values: Mapping[str, Any]) -> None:
    """The names in `model.config`."""
    for key, value in values.items():
        if key in _ELSEWHERE:
            raise UserError(f"model.config.{key} is set by {_ELSEWHERE[key]}; move {value!r} there")
        if key not in _CONFIG_KEYS:
            # "layers" is meant as the key that has it as a part, though by letters another may be nearer.
            near = [known for known in _CONFIG_KEYS if str(key) in known] or difflib.get_close_matches(
                str(key), _CONFIG_KEYS, n=1, cutoff=0.5
            )
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(_CONFIG_KEYS)}"
            raise UserError(f"model.config.{key} (value {value!r}) is unknown; {hint}")


def _check_values(values: Mapping[str, Any], source: str) -> None:
    """The sizes in `values`, which `source` gave; absent ones are BertConfig's and right."""
    from transformers.activations import ACT2FN

    for key in _COUNTS:
        value = values.get(key, 1)
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise UserError(f"{source}: {key} {value!r} is not a size; it must be a whole number of at least 1")
    for key in _POSITIVE:
        value = values.get(key, 0.02)
        if not (_is_number(value) and 0.0 < value < 1.0):
            raise UserError(f"{source}: {key} {value!r} is wrong; it must be a number above 0 and below 1")
    act = values.get("hidden_act", "gelu")
    if not isinstance(act, str) or act not in ACT2FN:
        near = difflib.get_close_matches(str(act), list(ACT2FN), n=1, cutoff=0.5)
        hint = f", a near one is {near[0]}" if near else ""
        raise UserError(f"{source}: hidden_act {act!r} is unknown; BERT's is gelu{hint}")
    hidden, heads = values.get("hidden_size", 768), values.get("num_attention_heads", 12)
    if hidden % heads:
        nearest = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))
        raise UserError(
            f"{source}: num_attention_heads {heads} does not divide hidden_size {hidden}; the nearest number that does "
            f"is {nearest}"
        )
