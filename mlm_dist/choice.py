"""From a run's configuration to the planner's jobs, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mlm_dist.plan import Prediction
from mlm_dist.plan_job import Job, Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mlm_dist.config import Config

# What a CUDA device must have beside the tensors: the context with its kernels, libraries' workspaces, and what the caching allocator cannot use for being in
# pieces. A figure by experience, not by arithmetic, so whoever knows better gives another.
CUDA_RESERVE = 640 << 20
# Share by which a prediction may be off.
MARGIN = 0.1
# Tokens of a micro-batch from which on a way counts as good; with fewer, launching kernels and reading weights weighs too much. By experience.
ENOUGH_TOKENS = 4096
# Standard deviations above its mean that the count of selected positions of a micro-batch is taken to reach.
DEVIATIONS = 4.0


class Way(NamedTuple):
    """A template, with activation checkpointing or without."""

    template: str
    checkpoint: bool


# From what costs a step least to what costs it most: ZeRO 1 and 2 add traffic that overlaps, checkpointing a third more computing, ZeRO 3 half more traffic,
# offload the way to the host and a step on its cores.
ORDER = tuple(
    Way(template, checkpoint)
    for templates in (("zero0", "zero1", "zero2"), ("zero3",), ("zero2_offload",), ("zero3_offload",))
    for checkpoint in (False, True)
    for template in templates
)


@dataclass(frozen=True)
class Option:
    """A way with a micro-batch, and what it needs."""

    way: Way
    micro_batch: int
    prediction: Prediction


def selected_share(config: Config, tokens: int) -> float:
    """The largest share of a micro-batch's `tokens` that the head must expect to be selected."""
    if config.mask.labels != "masked":
        return 1.0
    rates = [config.mask.rate, config.mask.rate_end, *(source.mask_rate for source in config.data.corpora())]
    rate = max(rate for rate in rates if rate is not None)
    return min(1.0, rate + DEVIATIONS * math.sqrt(rate * (1 - rate) / tokens))


def share(config: Config, world_size: int) -> int:
    """Rows of the global batch that fall on a rank if they are dealt evenly: it can get more where the number of ranks does not divide the stream's lanes."""
    return -(-config.train.global_batch // world_size)


def enough(config: Config, world_size: int) -> int:
    """Rows of a micro-batch of `ENOUGH_TOKENS`, or a rank's whole share when that is less."""
    return min(share(config, world_size), -(-ENOUGH_TOKENS // config.data.seq_len))


def micro_batches(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]


def job(
    config: Config,
    bert: PreTrainedConfig,
    zero: Mapping[str, Any],
    *,
    world_size: int,
    micro_batch: int,
    device: str,
    attention: str,
    checkpoint: bool | None = None,
) -> Job:
    """What a rank of this run does, as the planner takes it.

    Args:
        zero: the template's `zero_optimization`.
        device: `cuda` or `cpu`.
        attention: what `attention.choose` made of `model.attention`.
        checkpoint: in place of `model.checkpoint_activations`.
    """
    from mlm_dist.model import families
    from mlm_dist.model.attention import resolve_attention

    dropout, hidden_dropout = families.of(bert).dropouts(bert)
    if attention != "varlen":
        attention = resolve_attention(attention, device_type=device, dropout=dropout)
    return Job(
        Model.of(bert),
        zero,
        world_size,
        micro_batch,
        config.data.seq_len,
        selected_share(config, micro_batch * config.data.seq_len),
        precision=config.train.precision,
        attention=attention,
        attention_dropout=dropout,
        hidden_dropout=hidden_dropout,
        head_chunk=config.model.head_chunk,
        checkpoint_activations=config.model.checkpoint_activations if checkpoint is None else checkpoint,
        accumulate=share(config, world_size) > micro_batch,
        device=device,
    )


def fits(prediction: Prediction, memory: int, device: str) -> bool:
    """Whether a prediction is surely within `memory` bytes."""
    return needed(prediction, device) * (1 + MARGIN) <= memory


def needed(prediction: Prediction, device: str) -> int:
    """Bytes that `device` is predicted to give; on a CPU the host's are its too."""
    return prediction.total + (prediction.total_host if device == "cpu" else 0)


def choose(options: Sequence[Option], memory: int, device: str, *, enough: int = 1) -> Option | None:
    """The largest micro-batch that fits of the first way that fits with `enough` rows, or else of the first that fits at all; None when nothing does."""
    fitting = [option for option in options if fits(option.prediction, memory, device)]
    first = next((option.way for least in (enough, 1) for option in fitting if option.micro_batch >= least), None)
    return max(
        (option for option in fitting if option.way == first), key=lambda option: option.micro_batch, default=None
    )
