"""What a run was made from and on, for who finds it in W&B: code, data, hardware. Nothing of it is secret."""

from collections.abc import Sequence
from typing import Any

import torch

from mlm_dist.lifecycle import environment


def provenance(
    device: torch.device, *, hosts: Sequence[str], data: Any, tokenizer: str, parameters: int
) -> dict[str, Any]:
    """For the configuration of the W&B run, beside the run's own sections.

    Args:
        device: rank 0's.
        hosts: of each rank.
        data: fingerprint of the manifest, or of several with their weights.
        tokenizer: its fingerprint.
        parameters: of the model.
    """
    of_host = environment()
    cuda = device.type == "cuda"
    return {
        "git_commit": of_host["commit"],
        "software": {"python": of_host["python"], "platform": of_host["platform"], **of_host["packages"]},
        "data_fingerprint": {"data": data, "tokenizer": tokenizer},
        "hardware": {
            "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads a rank",
            "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
        },
        "parameters": parameters,
    }
