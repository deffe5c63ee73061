"""Masking: which tokens the model must predict, and what it sees in their place.

``token`` is BERT's rule (Devlin et al. 2019, section 3.1): each position by probability ``rate``; of those 80% become [MASK], 10% a random token, 10% stay.
``mask_only`` is the tutorial's: each position by probability ``rate``, all to [MASK].
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlm_dist.data.rng import keyed_philox, uniforms
from mlm_dist.data.tokenizer import TextTokenizer
from mlm_dist.errors import UserError


@dataclass
class MaskConfig:
    """How tokens are masked.

    Attributes:
        strategy: ``token`` (80/10/10) or ``mask_only`` (all to [MASK]).
        rate: probability that a position is selected.
        split: for ``token``, the shares of [MASK], random token and unchanged.
        labels: ``masked`` (loss on the selected positions) or ``all`` (on every real position, [CLS] and [SEP] too, as the tutorial does at batch 1).
    """

    strategy: Literal["token", "mask_only"] = "token"
    rate: float = 0.15
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    labels: Literal["masked", "all"] = "masked"

    def check(self) -> None:
        """Raises UserError for a rate or split that is no probability."""
        if not 0.0 < self.rate < 1.0:
            raise UserError(f"mask.rate: {self.rate} is not a probability between 0 and 1; BERT uses 0.15.")
        if not (min(self.split) >= 0 and abs(sum(self.split) - 1.0) <= 1e-6):
            raise UserError(
                f"mask.split: {list(self.split)} must be three shares >= 0 that sum to 1; BERT uses [0.8, 0.1, 0.1]."
            )


def mask(
    ids: np.ndarray, tokenizer: TextTokenizer, config: MaskConfig, key: tuple[int | str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Mask the tokens of one block.

    Args:
        ids: [T] token ids of all rows, one after the other.
        key: keys the draws; two per token whatever is selected, so that another rate keeps each token's draws.

    Returns:
        (input ids [T] as the model sees them, bool [T] selected). A special token is never selected and never a random replacement.
    """
    raw = keyed_philox(*key).random_raw(2 * len(ids)).reshape(2, -1)
    is_special = np.zeros(max(tokenizer.vocab_size, int(tokenizer.special.max()) + 1), bool)
    is_special[tokenizer.special] = True
    chosen = np.flatnonzero((uniforms(raw[0]) < config.rate) & ~is_special[ids])
    out = ids.copy()
    if config.strategy == "mask_only":
        out[chosen] = tokenizer.mask_id
    else:
        # The second draw's high half decides what happens, its low half which random token.
        action = (raw[1][chosen] >> np.uint64(32)).astype(np.float64) * 2.0**-32
        pick = ((raw[1][chosen] & np.uint64(0xFFFFFFFF)) * np.uint64(len(tokenizer.ordinary))) >> np.uint64(32)
        to_mask = action < config.split[0]
        to_random = ~to_mask & (action < config.split[0] + config.split[1])
        out[chosen[to_mask]] = tokenizer.mask_id
        out[chosen[to_random]] = tokenizer.ordinary[pick[to_random].astype(np.int64)]
    selected = np.zeros(len(ids), bool)
    selected[chosen] = True
    return out, selected
