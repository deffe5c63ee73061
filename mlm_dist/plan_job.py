"""What decides a rank's memory: the model's sizes and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Model:
    """The sizes of a BertForMaskedLM without pooler, its decoder tied to its word embedding."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Model:
        """The sizes that `config` holds."""
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=config.intermediate_size,
            positions=config.max_position_embeddings,
            types=config.type_vocab_size,
        )

    @cached_property
    def decayed(self) -> list[int]:
        """Elements of each parameter that decays, in the module's order: ZeRO 1 and 2 cut the ranks' partitions out of these."""
        h, i = self.hidden, self.intermediate
        layer = [h * h] * 4 + [i * h, h * i]
        return [self.words, self.positions * h, self.types * h] + layer * self.layers + [h * h]

    @cached_property
    def others(self) -> list[int]:
        """Elements of each parameter that does not decay: biases and norms."""
        h = self.hidden
        return [h] * 2 + ([h] * 9 + [self.intermediate]) * self.layers + [h] * 3 + [self.vocab]

    @property
    def words(self) -> int:
        """Elements of the word embedding, the largest parameter of any usual BERT."""
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        """Elements of one layer: four H x H products, two H x I ones, their biases, two norms."""
        h, i = self.hidden, self.intermediate
        return 4 * (h * h + h) + 2 * h * i + i + h + 4 * h

    @property
    def embeddings(self) -> int:
        """Elements of the embeddings and their norm."""
        return self.words + (self.positions + self.types + 2) * self.hidden

    @property
    def head(self) -> int:
        """Elements of the head that are its own: dense layer, norm, the decoder's bias."""
        return self.hidden * self.hidden + 3 * self.hidden + self.vocab

    @property
    def parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return self.embeddings + self.layers * self.layer + self.head

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.decayed)

    def in_partition(self, world_size: int) -> int:
        """Elements of the parameters of which a rank's partition has a part, each counted whole: the most of any rank."""
        size, most = -(-sum(self.decayed) // world_size), 0
        bounds = [0]
        for numel in self.decayed:
            bounds.append(bounds[-1] + numel)
        first = last = 0
        for rank in range(world_size):
            while bounds[first + 1] <= rank * size and first + 2 < len(bounds):
                first += 1
            while last + 1 < len(bounds) and bounds[last] < (rank + 1) * size:
                last += 1
            most = max(most, bounds[last] - bounds[first])
        return most + -(-(self.parameters - sum(self.decayed)) // world_size)


@dataclass(frozen=True)
class Job:
    """What decides a rank's memory.

    Attributes:
        model: the sizes.
        zero: the section `zero_optimization` of the DeepSpeed template.
        world_size: ranks.
        micro_batch: rows of one forward and backward.
        seq_len: tokens of a row; rows are taken to be full.
        selected: share of the tokens that carry a label.
        precision: `train.precision`.
        attention: `eager`, `sdpa` or `varlen`, as the device will run it (see `attention.resolve_attention`).
        attention_dropout, hidden_dropout: probabilities.
        checkpoint_activations: each layer is computed again in the backward pass.
        head_chunk: most positions whose logits are there at a time.
        accumulate: a step has more than one micro-batch.
        device: `cuda` or `cpu`.
    """

    model: Model
    zero: Mapping[str, Any] = field(hash=False)
    world_size: int
    micro_batch: int
    seq_len: int
    selected: float
    precision: str = "bf16"
    attention: str = "sdpa"
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    checkpoint_activations: bool = False
    head_chunk: int = 2048
    accumulate: bool = True
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch * self.seq_len

    @property
    def weight(self) -> int:
        """w: bytes of a weight on the device."""
        return 2 if self.precision == "bf16_pure" else 4

    @property
    def compute(self) -> int:
        """c: bytes of what products give."""
        return 4 if self.precision == "fp32" else 2

    @property
    def autocast(self) -> bool:
        """Products get copies of weights and inputs in the lower precision."""
        return self.compute < self.weight

    @property
    def keeps_casts(self) -> bool:
        """The backward pass uses those copies; DeepSpeed's own linear function of stage 3 keeps what they were made from, and makes them again."""
        return self.autocast and self.zero["stage"] < 3

    @property
    def offload(self) -> bool:
        """The optimizer lives on the host."""
        return "offload_optimizer" in self.zero
