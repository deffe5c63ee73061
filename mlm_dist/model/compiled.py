"""torch.compile for the encoder layers: one graph for all of them, or none at all."""

from __future__ import annotations

from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from mlm_dist.model import families
from mlm_dist.model.head import MaskedLM


class Control(Protocol):
    """The part of `distributed.ControlGroup` that is needed here."""

    def gather(self, obj: Any) -> list[Any] | None: ...

    def broadcast(self, obj: Any) -> Any: ...


def layer_class(module: MaskedLM) -> type[nn.Module]:
    """The class of the encoder layers."""
    return type(families.layers(module.model)[0])


def compile_together(module: MaskedLM, micro_batch: dict[str, Any], precision: str, control: Control) -> str | None:
    """`compile_layers` on all ranks, or on none. Collective; the same answer on every rank: None, or why not.

    Weights that will be bf16 (`bf16_pure`) are tried under autocast: their graph is made at the first step, but what
    cannot be compiled, or what attention refuses in fp32, is seen here.

    Raises:
        torch.OutOfMemoryError: on every rank, where it was raised on one.
    """
    dtypes = {"bf16": torch.bfloat16, "bf16_pure": torch.bfloat16, "fp16": torch.float16}
    full = False
    try:
        reason = compile_layers(module, micro_batch, autocast=dtypes.get(precision))
    except torch.OutOfMemoryError as error:
        reason, full = str(error), True
    answers = enumerate(control.gather((reason, full)) or [])
    bad = [(f"rank {rank}: {text}", is_full) for rank, (text, is_full) in answers if text is not None]
    why_not: str | None
    why_not, full = control.broadcast(max(bad, key=lambda one: one[1], default=(None, False)))
    if full:
        raise torch.OutOfMemoryError(why_not)
    if why_not is not None:
        plain_layers(module)
    return why_not


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
    layers = families.layers(module.model)
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
    for layer in families.layers(module.model):
        vars(layer).pop("forward", None)
    module.compiled = False
