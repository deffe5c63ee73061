"""A small model and a tokenizer of every family that can be trained."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mlm_dist.model import families
from mlm_dist.model.bert import ModelConfig, load_config
from tests.corpora import documents, save_tokenizer

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# `model.config` of each, without `model_type`. Windows of 7 positions are shorter than the tests' documents; of 4 layers two are local.
SIZES: dict[str, dict[str, Any]] = {
    "bert": _COMMON,
    "roberta": _COMMON,
    "xlm-roberta": _COMMON,
    "camembert": _COMMON,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "electra": _COMMON | {"embedding_size": 16},
    "modernbert": _COMMON
    | {"num_hidden_layers": 4, "local_attention": 6, "global_attn_every_n_layers": 3, "intermediate_size": 48},
}
POSITIONS = 48


def section(model_type: str, **values: Any) -> ModelConfig:
    """The section `model` of a new model of that type."""
    config = {"model_type": model_type, "max_position_embeddings": POSITIONS, **SIZES[model_type]}
    return ModelConfig(config=config, hidden_dropout=0.0, attention_dropout=0.0, **values)


def small(model_type: str, vocab_size: int, pad_token_id: int = 1, **values: Any) -> PreTrainedModel:
    """A model of that type, `values` in its configuration, in training mode; its weights, biases too, are large enough to show a mistake in any of them."""
    cfg = section(model_type)
    cfg.config = {**(cfg.config or {}), **values}
    model = families.new(load_config(cfg, vocab_size=vocab_size, pad_token_id=pad_token_id))
    norms = {id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in (m.weight,)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if id(parameter) in norms else 0.0, 0.2, generator=generator)
    return model.train()


def save_byte_level(path: Path, names: tuple[str, ...] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")) -> Path:
    """RoBERTa's kind of tokenizer, byte-level BPE, over the words of `documents`."""
    backend = Tokenizer(models.BPE(unk_token=names[3]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=list(names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return _save(path, backend, trainer, names)


def save_sentencepiece(path: Path) -> Path:
    """XLM-RoBERTa's kind of tokenizer, a Unigram model with its mark before each word."""
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _save(
        path,
        backend,
        trainers.UnigramTrainer(vocab_size=150, show_progress=False, special_tokens=list(names), unk_token=names[3]),
        names,
    )


def _save(path: Path, backend: Tokenizer, trainer: Any, names: tuple[str, ...]) -> Path:
    backend.train_from_iterator(documents(200), trainer)
    first, _, last, *_ = names
    backend.post_processor = processors.RobertaProcessing(
        (last, backend.token_to_id(last)),
        (first, backend.token_to_id(first)),
        trim_offsets=True,
        add_prefix_space=False,
    )
    roles = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), names, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **roles).save_pretrained(path)
    return path


def save_tokenizer_for(model_type: str, path: Path) -> Path:
    """The kind of tokenizer that models of that type have."""
    if model_type in ("roberta",):
        return save_byte_level(path)
    if model_type == "modernbert":
        return save_byte_level(path, ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))
    return save_sentencepiece(path) if model_type in ("xlm-roberta", "camembert") else save_tokenizer(path)
