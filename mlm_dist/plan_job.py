"""What decides a rank's memory: the model's sizes and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlm_dist.model import families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Model:
    """The sizes of a masked-language model without pooler, its decoder tied to its word embedding.

    Attributes:
        positions, types: rows of those embeddings; 0 where there are none.
        embedding: size of the embeddings and of the head, where it is not the hidden size (ELECTRA's); 0 where it is.
        modern: the layers are ModernBERT's: gated, with rotary positions and windows, without biases (those that layers and norms may have are not counted).
        decoder_bias: the decoder has a bias.
    """

    vocab: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int
    embedding: int = 0
    modern: bool = False
    decoder_bias: bool = True

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Model:
        """The sizes that `config` holds."""
        family, width = families.of(config), getattr(config, "embedding_size", config.hidden_size)
        return cls(
            vocab=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate=family.feed_forward(config),
            positions=0 if family.rotary else config.max_position_embeddings,
            types=getattr(config, "type_vocab_size", 0),
            embedding=width if width != config.hidden_size else 0,
            modern=family.gated,
            decoder_bias=getattr(config, "decoder_bias", True),
        )

    @property
    def width(self) -> int:
        """Size of the embeddings and of the head."""
        return self.embedding or self.hidden

    @cached_property
    def decayed(self) -> list[int]:
        """Elements of each parameter that decays, in the module's order (RoBERTa's tables are in another): ZeRO 1 and 2 cut partitions out of these."""
        h, i, e = self.hidden, self.intermediate, self.width
        layer = [3 * h * h, h * h, 2 * i * h, h * i] if self.modern else [h * h] * 4 + [i * h, h * i]
        tables = [self.words, *(n * e for n in (self.positions, self.types) if n)]
        return [*tables, *([e * h] if self.embedding else []), *layer * self.layers, h * e]

    @cached_property
    def others(self) -> list[int]:
        """Elements of each parameter that does not decay: biases and norms."""
        h, e = self.hidden, self.width
        if self.modern:  # the first layer's norm is the embeddings'
            return [h] * (2 * self.layers + 2) + [self.vocab] * self.decoder_bias
        return (
            [e] * 2
            + [h] * bool(self.embedding)
            + ([h] * 9 + [self.intermediate]) * self.layers
            + [e] * 3
            + [self.vocab] * self.decoder_bias
        )

    @property
    def words(self) -> int:
        """Elements of the word embedding, the largest parameter of any usual model."""
        return self.vocab * self.width

    @property
    def products(self) -> int:
        """Elements of the matrices of one layer."""
        h, i = self.hidden, self.intermediate
        return 4 * h * h + (3 if self.modern else 2) * h * i

    @property
    def layer(self) -> int:
        """Elements of one layer: its matrices, their biases, two norms."""
        h = self.hidden
        return self.products + (2 * h if self.modern else 9 * h + self.intermediate)

    @property
    def embeddings(self) -> int:
        """Elements of the embeddings, their norm and the product after them; of ModernBERT, of whose norms one lies elsewhere."""
        h, e = self.hidden, self.width
        norms = h if self.modern else 2 * e
        return self.words + (self.positions + self.types) * e + norms + (e * h + h if self.embedding else 0)

    @property
    def head(self) -> int:
        """Elements of the head that are its own: dense layer, norm, the decoder's bias where it has one."""
        e = self.width
        return self.hidden * e + (e if self.modern else 3 * e) + self.vocab * self.decoder_bias

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
