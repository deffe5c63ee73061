"""torch.compile for the encoder layers: one graph for all of them, or none at all."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from mlm_dist.model.head import MaskedLM


def layer_class(module: MaskedLM) -> type[nn.Module]:
    """The class of the encoder layers."""
    return type(module.model.bert.encoder.layer[0])


def compile_layers(
    module: MaskedLM, micro_batch: dict[str, Any], *, autocast: torch.dtype | None, backend: str = "inductor"
) -> str | None:
    """Compile the forward of each encoder layer, and train on `micro_batch` once to see that it works.

    The layer's `forward` is compiled, not its call, so that hooks (ZeRO-3's, and those of others) stay outside; with
    `fullgraph`, so that what cannot be compiled is an error here and not a slow run. All layers have the same code and
    sizes and share one graph. Every micro-batch must have the shape of `micro_batch`, else a graph is made for each;
    the number of segments of a flat one is free.

    Args:
        module: on the device where it trains, its weights not yet partitioned.
        micro_batch: on that device, of the shape that all have.
        autocast: the dtype that it trains under, or None.
        backend: torch.compile's.

    Returns:
        None, or why it does not work; the layers are then as they were.
    """
    layers = module.model.bert.encoder.layer
    compiled = torch.compile(layer_class(module).forward, fullgraph=True, backend=backend)
    for layer in layers:
        layer.forward = MethodType(compiled, layer)
    module.compiled = True
    try:
        with torch.autocast(next(module.parameters()).device.type, autocast, enabled=autocast is not None):
            loss, _ = module(**micro_batch)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from the tracer, the code generator, a compiler or what it made: whatever it is
        plain_layers(module)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    finally:
        module.zero_grad(set_to_none=True)
    return None


def plain_layers(module: MaskedLM) -> None:
    """Undo `compile_layers`."""
    for layer in module.model.bert.encoder.layer:
        vars(layer).pop("forward", None)
    module.compiled = False
