"""Small BERTs for tests."""

import torch
from transformers import BertConfig, BertForMaskedLM


def small_bert(vocab_size: int, *, dropout: float = 0.0, pad_token_id: int = 0) -> BertForMaskedLM:
    """A BERT of 2 layers of 32 and 48 places, in training mode, whose weights, biases too, are large enough for a mistake in any of them to show."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=pad_token_id,
    )
    model = BertForMaskedLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    return model.train()
