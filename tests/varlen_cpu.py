"""`torch.nn.attention.varlen` on a CPU: kernels under torch's own operators, so that its wrapper, its autograd formula
and all of ours run where there is no GPU. Importing this registers them.

What the CUDA kernels demand, int32 bounds from 0 to T and a longest segment that is not too short, is demanded here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen


def _segments(tokens: int, bounds: Tensor, longest: int) -> Iterator[slice]:
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == tokens
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        assert 0 <= end - start <= longest
        yield slice(start, end)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[heads, Q, K] of [Q, heads, dim] and [K, heads, dim]."""
    return torch.einsum("qhd,khd->hqk", query * scale, key).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    assert torch.equal(cu_q, cu_k) and max_q == max_k and rest[0] is False
    out = torch.empty_like(query)
    for part in _segments(len(query), cu_q, max_q):
        weights = _weights(query[part], key[part], rest[1])
        out[part] = torch.einsum("hqk,khd->qhd", weights, value[part])
    statistics = query.new_zeros((query.shape[1], len(query)), dtype=torch.float32)
    return out, statistics, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, max_q, _, _, _, scale = rest[:6]
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for part in _segments(len(query), cu_q, max_q):
        weights = _weights(query[part], key[part], scale)
        grad_weights = torch.einsum("qhd,khd->hqk", grad[part], value[part])
        grad_scores = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grads[0][part] = torch.einsum("hqk,khd->qhd", grad_scores, key[part])
        grads[1][part] = torch.einsum("hqk,qhd->khd", grad_scores, query[part])
        grads[2][part] = torch.einsum("hqk,qhd->khd", weights, grad[part])
    return grads
