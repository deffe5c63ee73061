"""Checkpoints that know neither the ZeRO stage nor the number of ranks.

A checkpoint is a directory of safetensors and JSON files; nothing in it is executed at load.

    step_00000100/
        part-00000-of-00002.safetensors ...   tensors ``param/NAME`` and ``state/KEY/NAME``, fp32, each in one part
        optimizer.json                        class, scalars, groups by parameter name
        trainer.json                          step, data cursors, ledger, counters, validation loss, W&B id
        index.json                            size and SHA-256 of every file, and which part holds which tensor
        COMMIT                                SHA-256 of index.json, written last

It is written under a temporary name and renamed when it is whole, so a crash leaves the one before. Each rank writes its part in a
thread; the training step waits only for the copy to host memory.
"""

from mlm_dist.checkpoint.format import (
    FORMAT,
    MOST_OWNERS,
    VERSION,
    CheckpointConfig,
    CheckpointError,
    assign,
    name,
)
from mlm_dist.checkpoint.reader import Reader, adopt, committed, locate, newest, readers
from mlm_dist.checkpoint.retention import best, validation_loss
from mlm_dist.checkpoint.writer import Writer

__all__ = [
    "FORMAT",
    "MOST_OWNERS",
    "VERSION",
    "CheckpointConfig",
    "CheckpointError",
    "Reader",
    "Writer",
    "adopt",
    "assign",
    "best",
    "committed",
    "locate",
    "name",
    "newest",
    "readers",
    "validation_loss",
]
