"""Distributed masked-language-model training: deterministic WebDataset streams into BertForMaskedLM under DeepSpeed ZeRO."""

__version__ = "0.1.0"
