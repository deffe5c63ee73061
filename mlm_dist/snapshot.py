"""An engine's state copied to host memory, each tensor whole at one rank: what a training step waits for when a checkpoint is written.

A rank sends what it holds of a tensor to the tensor's owner and to nobody else, and what the owner holds itself is not sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

# Tensors are sent together up to so many elements, or one that has more by itself; on CUDA they are as many bytes of the device's memory for a moment.
BATCH_ELEMENTS = 1 << 24
# What one rank holds of a flattened tensor: first element, how many.
Span = tuple[int, int]


class Snapshot:
    """Takes copies into host memory that is allocated once: a copy is good until the next one is taken.

    Args:
        shapes: of the whole tensors by key, in an order that all ranks share.
        owners: the rank that gets each of them.
        spans: by key, what each rank holds of it, in rank order.
        pinned: the state is on a CUDA device, from which pinned memory is copied to faster and without waiting.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        owners: Mapping[str, int],
        spans: Mapping[str, list[Span]],
        *,
        pinned: bool,
    ) -> None:
        self._shapes, self._owners, self._spans, self._pinned = shapes, owners, spans, pinned
        self._rank = dist.get_rank()
        mine = [key for key in shapes if owners[key] == self._rank]
        self._host = {key: torch.empty(shapes[key].numel(), pin_memory=pinned) for key in mine}

    def take(self, local: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """This rank's tensors as they are now. Collective.

        Args:
            local: what this rank holds of a tensor, flat and fp32, on any device; not called where it is not needed.
        """
        with torch.no_grad():
            for batch in self._batches():
                self._take(batch, local)
            if self._pinned:
                torch.cuda.synchronize()
        return {key: flat.view(self._shapes[key]) for key, flat in self._host.items()}

    def _take(self, batch: list[str], local: Callable[[str], Tensor]) -> None:
        operations: list[dist.P2POp] = []
        arrivals: list[tuple[Tensor, Tensor]] = []
        for tag, key in enumerate(batch):
            owner, others = self._owners[key], self._senders(key)
            if owner == self._rank:
                values = local(key)
                self._place(key, owner).copy_(values, non_blocking=self._pinned)
                for rank in others:
                    place = self._place(key, rank)
                    target = place if values.device == place.device else torch.empty_like(place, device=values.device)
                    operations.append(dist.P2POp(dist.irecv, target, rank, tag=tag))
                    if target is not place:
                        arrivals.append((place, target))
            elif self._rank in others:
                operations.append(dist.P2POp(dist.isend, local(key).contiguous(), owner, tag=tag))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for place, target in arrivals:
            place.copy_(target, non_blocking=True)

    def _senders(self, key: str) -> list[int]:
        """Ranks that hold something of a tensor that its owner does not."""
        owner, spans = self._owners[key], self._spans[key]
        if spans[owner][1] == self._shapes[key].numel():
            return []
        return [rank for rank, (_, count) in enumerate(spans) if rank != owner and count]

    def _place(self, key: str, rank: int) -> Tensor:
        """Where a rank's part of a tensor of this rank's goes."""
        start, count = self._spans[key][rank]
        return self._host[key][start : start + count]

    def _batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        room = BATCH_ELEMENTS
        for key, shape in self._shapes.items():
            if batch and math.prod(shape) > room:
                yield batch
                batch, room = [], BATCH_ELEMENTS
            batch.append(key)
            room -= math.prod(shape)
        yield batch
