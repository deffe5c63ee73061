"""What the ranks of the traffic's tests run: training steps whose collectives are counted below DeepSpeed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist import distributed
from tests.dist.engine_cases import (
    Template,
    dealt,
    gather_all,
    learning_rate,
    make_engine,
    make_module,
    parts,
    restore_all,
    selected_total,
)

# Where the whole tensor of a collective is: what is reduced, or what is gathered.
_WHOLE = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "all_to_all": 0,
    "all_to_all_single": 0,
}
_NAMES = ("tensor", "tensor_list", "output_tensor", "input_list", "input", "output", "output_tensor_list")

# (name of the collective, type of the elements)
Key = tuple[str, str]


@contextmanager
def counted() -> Iterator[Counter[Key]]:
    """Counts the elements of torch.distributed's collectives. To be entered before DeepSpeed looks the functions up."""
    seen: Counter[Key] = Counter()
    plain = {name: getattr(dist, name) for name in _WHOLE}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            whole = args[_WHOLE[name]] if len(args) > _WHOLE[name] else next(kwargs[n] for n in _NAMES if n in kwargs)
            for tensor in whole if isinstance(whole, list | tuple) else [whole]:
                seen[name, str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
            return plain[name](*args, **kwargs)

        return call

    send = dist.batch_isend_irecv

    def counting_sends(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                seen["send", str(operation.tensor.dtype).removeprefix("torch.")] += operation.tensor.numel()
        return send(operations)

    for name in plain:
        setattr(dist, name, counting(name))
    dist.batch_isend_irecv = counting_sends
    try:
        yield seen
    finally:
        dist.batch_isend_irecv = send
        for name, function in plain.items():
            setattr(dist, name, function)


def run(cases: list[dict[str, Any]]) -> list[dict[str, dict[Key, int]]]:
    """Each case {template, precision, accumulation, model}: elements of each kind of collective in a `step` that is not the first, a `save` and a `restore`."""
    with counted() as seen:
        distributed.init(60)
        control = distributed.ControlGroup(60)
        results = []
        for case in cases:
            template: Template = case["template"]
            module = make_module(**case.get("model", {}))
            engine = make_engine(
                template, clip=case.get("clip", 1.0), precision=case.get("precision", "fp32"), module=module
            )
            for step in range(3):  # stage 3 learns the order of use in the first
                seen.clear()
                batches = parts(step, control.rank, control.world_size, case.get("accumulation", 1))
                engine.step(
                    batches, selected_total=selected_total(step), lr=learning_rate(step), seeds=[0] * len(batches)
                )
            result = {"step": dict(seen)}
            saved = gather_all(engine)
            seen.clear()
            engine.snapshot(dealt(engine))
            result["save"] = dict(seen)
            seen.clear()
            restore_all(engine, saved)
            results.append({**result, "restore": dict(seen)})
            engine.close()
        distributed.shutdown()
    return results
