"""What the ranks of the tests of whole curves run: a task that is learned within 200 steps, with micro-batches of very
unequal counts, by engines and by the plain loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlm_dist import distributed
from mlm_dist.engine import Engine, MicroBatch
from tests.dist.engine_cases import LENGTH, OPTIM, build_adamw, collate, make_engine, make_module

MASK = 4
TOPICS, WORDS = 8, 12
# Selected tokens of the rows of a step, in micro-batches of 2 rows: one of 1, one of none, two of 20, others between.
COUNTS = (1, 0, 10, 10, 0, 0, 3, 4, 12, 8, 2, 3, 5, 6, 1, 2)
MICRO_BATCH = 2
TOTAL = sum(COUNTS)
CLIP = 1.0


def make_row(step: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [S] with masks, selected positions, labels. A row's words are of one topic, the rarer the later."""
    generator = torch.Generator().manual_seed(1009 * step + index)
    topic = int(torch.randint(TOPICS, (1,), generator=generator))
    frequency = 1 / torch.arange(1, WORDS + 1)
    words = torch.multinomial(frequency, LENGTH, replacement=True, generator=generator)
    tokens = 5 + topic * WORDS + words
    selected = torch.randperm(LENGTH, generator=generator)[: COUNTS[index]].sort().values
    labels = tokens[selected]
    tokens[selected] = MASK
    return tokens, selected, labels


@cache
def micro_batch(step: int, indices: tuple[int, ...]) -> MicroBatch:
    return collate([make_row(step, index) for index in indices])


def learning_rate(step: int) -> float:
    return 5e-3 * min(1.0, (step + 1) / 20)


@cache
def plain_curve(steps: int, layers: int, left_out: tuple[int, ...]) -> list[float]:
    """Losses of plain PyTorch in fp32, one process, the whole batch at once; `left_out` are steps with no update."""
    module = make_module(layers=layers)
    optimizer = torch.optim.AdamW(build_adamw(module, OPTIM).param_groups, lr=OPTIM.lr, foreach=False, fused=False)
    losses = []
    for step in range(steps):
        loss_sum, _ = module(**micro_batch(step, tuple(range(len(COUNTS)))))
        loss = loss_sum / TOTAL
        losses.append(float(loss.detach()))
        if step in left_out:
            continue
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return losses


def engine_curve(engine: Engine, steps: int, rows: int) -> dict[str, Any]:
    """Mean losses over all ranks, norms, steps that overflowed; micro-batches of `rows` rows, dealt to the ranks in turn."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    starts = range(0, len(COUNTS), rows)[rank::world]
    sums = torch.zeros(steps, dtype=torch.float64)
    norms: list[float] = []
    overflows: list[int] = []
    for step in range(steps):
        mine = [micro_batch(step, tuple(range(start, start + rows))) for start in starts]
        result = engine.step(mine, selected_total=TOTAL, lr=learning_rate(step), seeds=[0] * len(mine))
        assert result.skipped == result.overflow
        if result.overflow:
            overflows.append(step)
        sums[step] = result.loss_sum
        norms.append(float(result.grad_norm))
    torch.distributed.all_reduce(sums)
    return {"losses": (sums / TOTAL).tolist(), "norms": norms, "overflows": overflows}


# ---- the cases: each is called on every rank ----


def curves(cases: list[tuple[str, str]], steps: int) -> list[dict[str, Any]]:
    """Each template and precision: losses, steps that overflowed, and the losses of plain PyTorch without these."""
    distributed.init(60)
    results = []
    for template, precision in cases:
        engine = make_engine(template, clip=CLIP, precision=precision, layers=1)
        record = engine_curve(engine, steps, rows=8)
        engine.close()
        plain = plain_curve(steps, 1, tuple(record["overflows"]))
        results.append({"case": (template, precision), **record, "plain": plain})
    distributed.shutdown()
    return results


def split(template: str, steps: int) -> dict[str, Any]:
    """The same micro-batches of the same steps on however many ranks there are: losses, norms and final weights."""
    distributed.init(60)
    engine = make_engine(template, clip=CLIP)
    record = engine_curve(engine, steps, rows=MICRO_BATCH)
    weights = {name: engine.gather_parameter(name) for name in engine.names()}
    engine.close()
    distributed.shutdown()
    return {**record, "weights": weights}
