"""What a key of ``metrics.jsonl`` is called in W&B and TensorBoard, where like is shown beside like."""

from collections.abc import Mapping
from typing import Any

_PERF = ("tokens_per_s", "step_time", "tflops", "mfu", "slowest_rank", "slowest_host", "slowest_excess")
_DATA = ("data_wait", "epoch", "progress", "tokens", "selected", "lost_documents")
_SYSTEM = ("memory_gib", "world_size", "attempt")
GROUPS = ("train", "val", "perf", "data", "system")


def group(kind: str, key: str) -> str:
    """The group of a key of a record of ``kind`` ("train" or "val").

    Of a training step: ``perf`` is how fast it goes, ``data`` what is read and how long is waited for it, ``system`` what
    it runs on, ``train`` the rest. A validation is all ``val``, but for what it runs on.
    """
    if key in _SYSTEM:
        return "system"
    if kind != "train":
        return kind
    if key in _PERF or key.startswith("time_"):
        return "perf"
    return "data" if key in _DATA else "train"


def grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one line of ``metrics.jsonl`` under ``GROUP/KEY``; nulls are left out, and of a validation what its training step has too."""
    row = {}
    for key, value in record.items():
        if key in ("step", "kind", "time") or value is None:
            continue
        name = group(record["kind"], key)
        if name != "system" or record["kind"] == "train":
            row[f"{name}/{key}"] = int(value) if isinstance(value, bool) else value
    return row
