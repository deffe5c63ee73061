"""What the model is called with: tensors by name and, where rows are flat, the length of the longest segment."""

from typing import Any

import torch

MicroBatch = dict[str, Any]


def on_device(micro_batch: MicroBatch, device: torch.device, *, pin: bool = False) -> MicroBatch:
    """Its tensors on ``device``; the host waits for no copy. ``pin``: copy from page-locked memory, so that the device works on meanwhile."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value.pin_memory() if pin else value).to(device, non_blocking=True)

    return {name: moved(value) for name, value in micro_batch.items()}
