"""Which model to train: its configuration, checked before any weight exists, and the model, new or from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mlm_dist.errors import UserError
from mlm_dist.model import config_checks, families, from_run, pretrained
from mlm_dist.model.config_checks import is_number
from mlm_dist.model.new_tokens import NewTokens, add_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ATTENTION_CHOICES = ("auto", "varlen", "sdpa", "eager")
# Positions whose logits the head holds at a time: of 30,522 tokens in fp32 they are 250 MB.
HEAD_CHUNK = 2048

_ROLES = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")

# A vocabulary is padded to such a multiple so that the product with it fills the hardware's tiles; the rows past the
# tokenizer's are never used.
_VOCABULARY_MULTIPLES = (64, 128)


@dataclass
class ModelConfig:
    """The section `model` of a run's configuration.

    Attributes:
        init: `config` for new weights, `pretrained` for those of a checkpoint in transformers' format, `run` for those of another run.
        name_or_path: with `pretrained`, a directory in transformers' format or a name on the Hugging Face hub; with `run`, a run
            directory (its newest checkpoint counts) or a checkpoint in one.
        config: with `config`, sizes by their names in the configuration of the model's type in transformers, `model_type` (default
            bert); absent ones are that configuration's, and `vocab_size` the tokenizer's.
        attention: back end; `auto` takes the fastest that is right on the device. `varlen` computes real tokens only,
            on CUDA in bf16 or fp16.
        attention_dropout: probability that replaces the one of the checkpoint (or the configuration's default).
        hidden_dropout: the same for the outputs of layers and embeddings.
        checkpoint_activations: recompute each layer in the backward pass rather than keep what it computed.
        head: `torch`, or `liger` for liger-kernel's fused decoder and cross-entropy (CUDA, the extra `liger`).
        head_chunk: selected positions whose logits are in memory at a time; beyond so many in a micro-batch the head is
            computed twice.
        compile: let torch.compile fuse the encoder layers.
    """

    init: Literal["config", "pretrained", "run"] = "config"
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


def load_config(cfg: ModelConfig, *, vocab_size: int | None, pad_token_id: int | None) -> "PreTrainedConfig":
    """The model's configuration that `cfg` asks for. Reads configuration files only, no weights.

    Args:
        cfg: the section `model`.
        vocab_size: the tokenizer's size, taken for new weights whose `config` names none; None leaves the default.
        pad_token_id: the tokenizer's padding token, whose embedding gets no gradient; None leaves the model's.

    Raises:
        UserError: a value of `cfg` is wrong, or the checkpoint is missing, unreachable, damaged, or not of one of
            `families.FAMILIES`.
    """
    from huggingface_hub.errors import StrictDataclassError

    _check_section(cfg)
    if cfg.init == "config":
        values = dict(cfg.config or {})
        model_type = values.pop("model_type", "bert")
        family = families.family(model_type, "model.config.model_type")
        source = "model.config"
        alias = families.config_class(model_type).attribute_map
        values = {alias.get(key, key): value for key, value in values.items()}
        config_checks.check_keys(values, family)
        if vocab_size is not None:
            values.setdefault("vocab_size", vocab_size)
        # Ids of the tokenizer that the type is known by, not of this run's.
        values |= {key: None for key in _ROLES if getattr(families.config_class(model_type), key, None) is not None}
    else:
        assert cfg.name_or_path is not None
        values = (from_run if cfg.init == "run" else pretrained).read_config(cfg.name_or_path)
        model_type = values.pop("model_type")
        family = families.FAMILIES[model_type]
        source = f"model.name_or_path {cfg.name_or_path}"
        values.setdefault("pad_token_id", families.config_class(model_type).pad_token_id)
        config_checks.check_padding(cfg.name_or_path, family, values["pad_token_id"], pad_token_id)
    kind = families.config_class(model_type)
    config_checks.check_values(values, source, family, kind)
    if cfg.hidden_dropout is not None:
        values |= dict.fromkeys(family.hidden_dropout, cfg.hidden_dropout)
    if cfg.attention_dropout is not None:
        values[family.attention_dropout] = cfg.attention_dropout
    if pad_token_id is not None:
        values["pad_token_id"] = pad_token_id
    try:
        config = kind.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        place = cfg.name_or_path or "model.config"
        raise UserError(f"model: {kind.__name__} refuses the configuration of {place}: {error}") from error
    config_checks.check_rotations(config, source, family)
    return config


def check_fit(config: "PreTrainedConfig", *, vocab_size: int, seq_len: int) -> None:
    """Check that the model takes what the data will give it.

    Args:
        config: the model's.
        vocab_size: number of tokens of the tokenizer.
        seq_len: longest row, in tokens.

    Raises:
        UserError: the vocabularies differ by more than padding to a multiple of 64 or 128, a row is longer than the
            position table, or the padding token's id leaves none of it.
    """
    padded = _padded(vocab_size)
    if config.vocab_size != vocab_size and config.vocab_size not in padded:
        raise UserError(
            f"the model's vocabulary of {config.vocab_size:,} tokens does not fit the tokenizer's {vocab_size:,}: for "
            f"new weights leave model.config.vocab_size out (padded it is {' or '.join(map(str, sorted(padded)))}), "
            "for a checkpoint set data.tokenizer to the one that it was trained with"
        )
    family = families.of(config)
    first, longest = family.first_position(config), family.longest(config)
    if longest < 1:
        raise UserError(
            f"pad_token_id {config.pad_token_id} leaves no position for a token: a {family.label} counts them from the padding token's id + 1, and "
            f"max_position_embeddings is {config.max_position_embeddings}; for rows of data.seq_len {seq_len} set model.config.max_position_embeddings to "
            f"at least {first + seq_len}, or data.tokenizer to one whose padding token has a low id"
        )
    if seq_len > longest:
        beside = f" less the {first} positions up to the padding token's id" if first else ""
        raise UserError(
            f"data.seq_len {seq_len} is longer than the model's position table: it must be at most {longest}, "
            f"max_position_embeddings {config.max_position_embeddings}{beside}"
        )


def _padded(vocab_size: int) -> set[int]:
    return {-(-vocab_size // multiple) * multiple for multiple in _VOCABULARY_MULTIPLES}


def check_vocabulary(cfg: ModelConfig, vocabulary: Mapping[str, int]) -> None:
    """Check the tokenizer's `vocabulary` (token -> id) against the one that lies beside a local checkpoint's weights.

    Two vocabularies of one size pass `check_fit`, yet the embeddings would belong to other tokens. Does nothing for new
    weights, for a name on the hub and for a directory that holds weights alone.

    Raises:
        UserError: the first token that differs.
    """
    if cfg.init == "config" or cfg.name_or_path is None:
        return
    place = str(from_run.directory(cfg.name_or_path) / "tokenizer") if cfg.init == "run" else cfg.name_or_path
    theirs = pretrained.read_vocabulary(place)
    if theirs is None:
        return
    ours = {index: token for token, index in vocabulary.items()}
    for index in sorted(theirs.keys() | ours.keys()):
        if ours.get(index) != theirs.get(index):
            raise UserError(
                f"data.tokenizer is not the one of model.name_or_path {cfg.name_or_path}: token {index} is "
                f"{ours.get(index)!r} in the first and {theirs.get(index)!r} in the second; set data.tokenizer to {place}"
            )


def find_new_tokens(cfg: ModelConfig, stored: int, first: int, pieces: Sequence[Sequence[int]]) -> NewTokens | None:
    """What the checkpoint of `cfg` lacks of a tokenizer that extends a vocabulary; None where it lacks nothing, because
    it was trained with that tokenizer, or begins from new weights.

    Args:
        cfg: the section `model`.
        stored: rows of the checkpoint's embeddings.
        first: size of the vocabulary that was extended.
        pieces: for each new token the ids of the old ones that it was made of.

    Raises:
        UserError: the checkpoint shows no vocabulary and its size fits both, with the new tokens and without.
    """
    if cfg.init != "pretrained" or cfg.name_or_path is None:
        return None
    new = NewTokens(first, tuple(map(tuple, pieces)))
    theirs = pretrained.read_vocabulary(cfg.name_or_path)
    if theirs is not None:
        return new if len(theirs) == first else None
    without, within = (stored in (size, *_padded(size)) for size in (first, new.vocab_size))
    if without and within:
        raise UserError(
            f"model.name_or_path: the {stored:,} embeddings of {cfg.name_or_path} may be those of {first:,} tokens or of "
            f"{new.vocab_size:,}; give a directory that holds its vocabulary, too"
        )
    return new if without else None


def build(
    cfg: ModelConfig, config: "PreTrainedConfig", *, seed: int, new_tokens: NewTokens | None = None
) -> "PreTrainedModel":
    """The model in fp32 on the CPU, in training mode.

    New weights depend on `config` and `seed` alone: not on the state of any global generator, which is left as found,
    nor on the rank. A checkpoint that has no masked-LM head (a plain encoder) gets a new one from `seed`; that and
    the weights left unused are logged. With `new_tokens` a checkpoint gets rows for them, which `config` counts already.

    Raises:
        UserError: the checkpoint lacks weights of the encoder, has others than its configuration says, or cannot be
            read.
    """
    import torch

    # Not torch.manual_seed: it would seed the accelerators' generators too, which are neither forked nor drawn from.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if cfg.init == "config":
            model = families.new(config)
        else:
            assert cfg.name_or_path is not None
            source = from_run if cfg.init == "run" else pretrained
            if new_tokens is None:
                model = source.load(cfg.name_or_path, config)
            else:
                stored = load_config(cfg, vocab_size=None, pad_token_id=config.pad_token_id)
                model = source.load(cfg.name_or_path, stored)
                add_tokens(model, new_tokens)
    assert model.config.vocab_size == config.vocab_size
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if cfg.checkpoint_activations:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def flops_per_token(config: "PreTrainedConfig", *, attended: float, selected: float) -> float:
    """Floating-point operations that training needs for one token, forward and backward.

    The products of matrices alone, two operations for each multiply-add, the backward pass twice the forward one
    (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", 2.1, with the attention term that they leave out).
    What activation checkpointing computes again does not count.

    Args:
        config: the model's.
        attended: mean number of positions that a token sees, itself included: the length of its segment for isolated
            segments. Where some layers see a window, the mean of mixed lengths gives an upper bound: a window cuts long
            segments only. For ModernBERT-base at 15% selected it is at most 1.2% too high in rows of 512 tokens, 2% of 8,192.
        selected: share of the tokens that the head runs on.
    """
    family, hidden, layers = families.of(config), config.hidden_size, config.num_hidden_layers
    embedding = getattr(config, "embedding_size", hidden)  # ELECTRA's, with a product between it and the hidden size
    products = 4 * hidden**2 + (3 if family.gated else 2) * hidden * family.feed_forward(config)
    seen = layers * attended
    if family.windows:
        local = config.layer_types.count("sliding_attention")
        seen += local * (_within(config.sliding_window, attended) - attended)
    into = 2 * embedding * hidden if embedding != hidden else 0
    head = 2 * (hidden * embedding + embedding * config.vocab_size)
    return 3.0 * float(into + layers * 2 * products + 4 * seen * hidden + selected * head)


def _within(window: int, length: float) -> float:
    """Mean number of positions at most `window` away that a token of a segment of `length` tokens sees, itself included."""
    last = length - 1
    one_side = last * length / 2 if last <= window else window * (window + 1) / 2 + (last - window) * window
    return 1 + 2 * one_side / length if length else 0.0


def _check_section(cfg: ModelConfig) -> None:
    if cfg.init not in ("config", "pretrained", "run"):
        raise UserError(f"model.init: {cfg.init!r} is unknown; it must be config, pretrained or run")
    check_attention(cfg.attention)
    if cfg.head not in ("torch", "liger"):
        raise UserError(f"model.head: {cfg.head!r} is unknown; it must be torch or liger")
    if cfg.head_chunk < 1:
        raise UserError(f"model.head_chunk: {cfg.head_chunk} must be at least 1 position; 2048 is usual")
    if cfg.init == "run" and not cfg.name_or_path:
        raise UserError("model.name_or_path is missing: model.init run needs a run directory or one of its checkpoints")
    if cfg.init == "pretrained" and not cfg.name_or_path:
        raise UserError("model.name_or_path is missing: model.init pretrained needs a directory or a name on the hub")
    if cfg.init != "config" and cfg.config:
        raise UserError(
            f"model.config {cfg.config} has no use with model.init {cfg.init}, whose sizes come from model.name_or_path"
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
        if value is not None and not (is_number(value) and 0.0 <= value < 1.0):
            raise UserError(f"model.{name}: {value!r} is not a probability; it must be at least 0 and below 1")
