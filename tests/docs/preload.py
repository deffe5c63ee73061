"""Imported once, by the process that those of tests/docs/shell.py are forked from."""

from importlib import import_module

for name in (
    "deepspeed",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "launcher.cli",
    "mlm_dist.data.prepare",
    "mlm_dist.data.train_tokenizer",
    "mlm_dist.report",
    "mlm_dist.train",
):
    import_module(name)
