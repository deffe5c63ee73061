"""What a run was made from and on, for who finds it in W&B: code, data, hardware. Nothing of it is secret."""

from collections.abc import Sequence
from typing import Any

import torch

from mlm_dist.lifecycle import environment


def machine(device: torch.device, ranks: int) -> dict[str, Any]:
    """The devices that a run trains on, by rank 0's, for env.json."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, threads a rank: {torch.get_num_threads()}"
    )
    return {"device": name, "devices": ranks}


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
            "device": machine(device, len(hosts))["device"],
            "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
            "ranks": len(hosts),
            "hosts": sorted(set(hosts)),
        },
        "parameters": parameters,
    }
