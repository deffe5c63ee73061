"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass
class LossScaler:
    """The factor on the losses: halved when gradients overflow, doubled after GROWTH_INTERVAL steps without.

    torch.amp.GradScaler's rule and constants. That class itself takes its overflow from the gradients of one optimizer
    before they are clipped, which ZeRO has only inside its own step(); here the step's outcome, known to every rank
    alike, is told to it.

    Attributes:
        scale: the factor now, a power of 2.
        good_steps: steps applied since it last changed.
    """

    scale: float = 2.0**16
    good_steps: int = 0

    GROWTH_INTERVAL: ClassVar[int] = 2000
    SMALLEST: ClassVar[float] = 1.0

    def applied(self) -> None:
        """To be called after a step that was applied."""
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def overflowed(self) -> bool:
        """To be called after a step whose losses were finite and whose gradients were not.

        Whether the scale explains it: False at the smallest one, where the gradients themselves are at fault.
        """
        if self.scale <= self.SMALLEST:
            return False
        self.scale, self.good_steps = self.scale / 2, 0
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON."""
        return asdict(self)

    def load(self, state: dict[str, Any] | None) -> None:
        """The reverse of state(); None (a checkpoint of another precision) begins anew."""
        self.__init__(**(state or {}))  # type: ignore[misc]
