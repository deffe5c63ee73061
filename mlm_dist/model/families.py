"""The architectures that can be trained: an encoder, and a head of a dense layer, an activation, a norm and a decoder.

Everything here goes by `config.model_type`. A model that is not in `FAMILIES` is refused with the reason, before any of
its weights is read.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlm_dist.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Family:
    """What is particular to the models of a type.

    Attributes:
        label: its name among people.
        head: the parts of the head by their path in the model: dense layer, activation (None: a plain gelu that is no part), norm, decoder.
        layers: path of the list of layers in the encoder.
        sizes: keys of its configuration that a checkpoint must have, whole numbers of at least 1: vocabulary, hidden size, layers, heads, intermediate size.
        counts: others of that kind.
        positive: keys of numbers above 0 and below 1.
        activations: keys of names of activations.
        flags: keys of truth values, which its own configuration class judges.
        hidden_dropout: keys that `model.hidden_dropout` sets.
        attention_dropout: the key that `model.attention_dropout` sets.
        after_padding: the first position is the one after the padding token's id (fairseq's numbering).
        windows: some layers see a window of positions only.
        gated: the feed-forward part has a gate: three products in place of two.
        rotary: positions are rotations of queries and keys, not a table.
    """

    label: str
    head: tuple[str, str | None, str, str]
    layers: str = "encoder.layer"
    sizes: tuple[str, ...] = _COMMON
    counts: tuple[str, ...] = ("max_position_embeddings", "type_vocab_size")
    positive: tuple[str, ...] = ("initializer_range", "layer_norm_eps")
    activations: tuple[str, ...] = ("hidden_act",)
    flags: tuple[str, ...] = ()
    hidden_dropout: tuple[str, ...] = ("hidden_dropout_prob",)
    attention_dropout: str = "attention_probs_dropout_prob"
    after_padding: bool = False
    windows: bool = False
    gated: bool = False
    rotary: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """What `model.config` may hold. Dropout is not here because `model.hidden_dropout` and `model.attention_dropout`
        own it for every kind of start."""
        return (*self.sizes, *self.counts, *self.positive, *self.activations, *self.flags)

    def first_position(self, config: PreTrainedConfig) -> int:
        """The number of a document's first position in the table of positions."""
        return config.pad_token_id + 1 if self.after_padding else 0

    def longest(self, config: PreTrainedConfig) -> int:
        """Tokens of the longest document that the model has positions for."""
        return int(config.max_position_embeddings) - self.first_position(config)

    def feed_forward(self, config: PreTrainedConfig) -> int:
        """Size of the feed-forward part."""
        return int(getattr(config, self.sizes[4]))

    def dropouts(self, config: PreTrainedConfig) -> tuple[float, float]:
        """(of attention weights, of the outputs of layers and embeddings: the largest where there are several)."""
        return getattr(config, self.attention_dropout), max(getattr(config, key) for key in self.hidden_dropout)


_LM_HEAD = ("lm_head.dense", None, "lm_head.layer_norm", "lm_head.decoder")
FAMILIES = {
    "bert": Family(
        "BERT",
        (
            "cls.predictions.transform.dense",
            "cls.predictions.transform.transform_act_fn",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
        ),
    ),
    "roberta": Family("RoBERTa", _LM_HEAD, after_padding=True),
    "xlm-roberta": Family("XLM-RoBERTa", _LM_HEAD, after_padding=True),
    "camembert": Family("CamemBERT", _LM_HEAD, after_padding=True),
    "distilbert": Family(
        "DistilBERT",
        ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        layers="transformer.layer",
        sizes=("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim"),
        counts=("max_position_embeddings",),
        positive=("initializer_range",),
        activations=("activation",),
        hidden_dropout=("dropout",),
        attention_dropout="attention_dropout",
    ),
    "electra": Family(
        "ELECTRA",
        (
            "generator_predictions.dense",
            "generator_predictions.activation",
            "generator_predictions.LayerNorm",
            "generator_lm_head",
        ),
        counts=("max_position_embeddings", "type_vocab_size", "embedding_size"),
    ),
    "modernbert": Family(
        "ModernBERT",
        ("head.dense", "head.act", "head.norm", "decoder"),
        layers="layers",
        counts=("max_position_embeddings", "local_attention", "global_attn_every_n_layers"),
        positive=("initializer_range", "norm_eps"),
        activations=("hidden_activation", "classifier_activation"),
        flags=("norm_bias", "attention_bias", "mlp_bias", "decoder_bias", "classifier_bias"),
        hidden_dropout=("embedding_dropout", "mlp_dropout"),
        attention_dropout="attention_dropout",
        windows=True,
        gated=True,
        rotary=True,
    ),
}

_SEQ2SEQ = "it is an encoder with a decoder, which learns to write the text again and not to fill masks"
_OWN_ATTENTION = "its attention is its own, and nobody has shown that the documents of a row stay apart in it"
_OWN = (
    "deberta",
    "deberta-v2",
    "mpnet",
    "longformer",
    "big_bird",
    "reformer",
    "nystromformer",
    "yoso",
    "mra",
    "funnel",
)
# Why not, for those that people ask for.
_REASONS = {
    **dict.fromkeys(("t5", "mt5", "bart", "mbart", "mvp", "pegasus"), _SEQ2SEQ),
    **dict.fromkeys(("gpt2", "gpt_neox", "llama", "mistral", "qwen2"), "it predicts the next token, not masked ones"),
    **dict.fromkeys(_OWN, _OWN_ATTENTION),
    **dict.fromkeys(
        ("xlm", "flaubert"), "its head is one with its loss, so that it cannot run on a part of the tokens"
    ),
    "fnet": "it mixes all tokens of a row, whatever document they are of",
    "albert": "its layers share their weights, which neither the planner nor activation checkpointing has",
}


def family(model_type: object, where: str) -> Family:
    """The family of a `model_type`, which `where` has.

    Raises:
        UserError: it cannot be trained, with the reason.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = _REASONS.get(str(model_type), "nobody has shown yet that its loss here is its own")
    raise UserError(
        f"{where} is a model of type {model_type!r}, which cannot be trained here: {reason}; it must be one of {', '.join(FAMILIES)}"
    )


def of(config: PreTrainedConfig) -> Family:
    """The family of a configuration that was accepted."""
    return FAMILIES[config.model_type]


def longest(config: PreTrainedConfig, default: int) -> int:
    """Tokens of the longest document that a model of any type has positions for; ``default`` where its configuration does not say."""
    family = FAMILIES.get(config.model_type)
    return family.longest(config) if family else getattr(config, "max_position_embeddings", None) or default


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a family."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def new(config: PreTrainedConfig, *, meta: bool = False) -> PreTrainedModel:
    """The stock masked-language model with new weights, or with none (`meta`)."""
    import torch
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    # Not AutoModelForMaskedLM.from_config, which builds in the dtype that the configuration was stored with.
    with torch.device("meta") if meta else contextlib.nullcontext():
        return MODEL_FOR_MASKED_LM_MAPPING[type(config)](config)


def head_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Dense layer, activation, norm and decoder of a model's head."""
    from transformers.activations import ACT2FN

    dense, activation, norm, decoder = of(model.config).head
    act = ACT2FN["gelu"] if activation is None else model.get_submodule(activation)
    return model.get_submodule(dense), act, model.get_submodule(norm), model.get_submodule(decoder)


def layers(model: PreTrainedModel) -> Any:
    """The list of the encoder's layers."""
    return model.base_model.get_submodule(of(model.config).layers)
