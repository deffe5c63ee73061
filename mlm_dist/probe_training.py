"""A small classifier on an encoder, trained to see what the encoder knows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROPOUT = 0.1
WEIGHT_DECAY = 0.01
WARMUP = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained.

    Attributes:
        pooling: what stands for a text: the first token's last hidden state, or the mean over its tokens.
        epochs, batch: over the training examples, and how many a step takes.
        lr: the highest, after a tenth of the steps; it falls to 0 at the end.
    """

    pooling: Literal["cls", "mean"]
    epochs: int
    lr: float
    batch: int


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples.

    Attributes:
        rows: of each, the tokenizer's lists by name (input_ids, ...), not padded.
        pads: what each name is filled up with.
        targets: int64 [N] classes, or float32 [N] to regress on.
    """

    rows: list[dict[str, list[int]]]
    pads: dict[str, int]
    targets: Tensor

    def batch(self, index: list[int], device: torch.device) -> dict[str, Tensor]:
        """The inputs of these examples, int64 [B, longest]."""
        width = max(len(self.rows[i]["input_ids"]) for i in index)
        return {
            name: torch.tensor([self.rows[i][name] + [pad] * (width - len(self.rows[i][name])) for i in index]).to(
                device
            )
            for name, pad in self.pads.items()
        }


class Probe(nn.Module):
    """An encoder with a head."""

    def __init__(self, encoder: PreTrainedModel, head: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.head, self.pooling = encoder, head, pooling

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Scores, [B, outputs]."""
        scores: Tensor = self.head(pooled(self.encoder, inputs, self.pooling))
        return scores


def pooled(encoder: PreTrainedModel, inputs: dict[str, Tensor], pooling: str) -> Tensor:
    """What stands for each text, [B, hidden]."""
    hidden: Tensor = encoder(**inputs)[0]
    if pooling == "cls":
        return hidden[:, 0]
    seen = inputs["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * seen).sum(1) / seen.sum(1)


def embed(encoder: PreTrainedModel, part: Encoded, recipe: Recipe, device: torch.device) -> Tensor:
    """What stands for each text of ``part`` while nothing of the encoder is trained, fp32 [N, hidden]."""
    encoder.to(device).eval()
    return _over(part, recipe.batch, lambda index: pooled(encoder, part.batch(index, device), recipe.pooling))


def predict_frozen(
    train: Tensor, targets: Tensor, dev: Tensor, classes: int | None, recipe: Recipe, seed: int
) -> np.ndarray:
    """Train a head on embeddings, predict those of ``dev``: int64 [N] classes or, with ``classes`` None, float64 [N].

    ``seed`` decides the head's first weights, the order of examples and the dropout; the caller's generators are not used up.
    """
    with _seeded(seed, train.device):
        head = _head(train.shape[1], classes).to(train.device)
        _fit(head, lambda index: train[index], targets, recipe, seed)
        with torch.no_grad():
            return _predictions(head.eval()(dev), classes)


def predict_tuned(
    encoder: PreTrainedModel,
    train: Encoded,
    dev: Encoded,
    classes: int | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> np.ndarray:
    """As ``predict_frozen``, and the encoder is trained too: a copy of it."""
    with _seeded(seed, device):
        head = _head(encoder.config.hidden_size, classes)
        probe = Probe(copy.deepcopy(encoder), head, recipe.pooling).to(device).train()
        _fit(probe, lambda index: train.batch(index, device), train.targets, recipe, seed)
        probe.eval()
        return _predictions(_over(dev, recipe.batch, lambda index: probe(dev.batch(index, device))), classes)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _head(hidden: int, classes: int | None) -> nn.Module:
    return nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(hidden, classes or 1))


def _predictions(scores: Tensor, classes: int | None) -> np.ndarray:
    found = scores[:, 0].double() if classes is None else scores.argmax(1)
    values: np.ndarray = found.cpu().numpy()
    return values


def _over(part: Encoded, batch: int, of: Callable[[list[int]], Tensor]) -> Tensor:
    """``of`` every example, in order, without a graph."""
    with torch.no_grad():
        count = len(part.rows)
        return torch.cat([of(list(range(i, min(i + batch, count)))) for i in range(0, count, batch)]).float()


def _fit(module: nn.Module, inputs: Callable[[list[int]], Any], targets: Tensor, recipe: Recipe, seed: int) -> None:
    """AdamW; the rate rises over the first ``WARMUP`` of the steps and falls to 0 in a line."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    steps = recipe.epochs * -(-len(targets) // recipe.batch)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(targets), generator=order).split(recipe.batch):
            scores = module(inputs(index.tolist()))
            wanted = targets[index].to(scores.device)
            loss = F.cross_entropy(scores, wanted) if wanted.dtype == torch.int64 else F.mse_loss(scores[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            schedule.step()
