"""What happens to a chaos run, and when: a pure function of a seed."""

import random
from dataclasses import dataclass, field
from typing import Any

KINDS = ("kill_rank", "kill_all", "terminate", "kill_worker", "corrupt_checkpoint", "resize", "bad_shard", "nan")
# Numbers that go wrong cost twice as many batches each time.
MOST_NANS = 3
WORLDS = (1, 2, 3)
STAGES = ("zero0", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Event:
    """One trouble.

    Attributes:
        kind: of KINDS.
        steps: steps that the attempt takes before it.
        draw: uniform in [0, 1): which rank, worker, block or byte.
        start: of ``resize``, the {world, stage, workers} with which the run goes on.
    """

    kind: str
    steps: int
    draw: float
    start: dict[str, Any] = field(default_factory=dict)


def schedule(seed: int, count: int) -> list[Event]:
    """``count`` events; each kind once before any comes twice."""
    rng = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        some = [kind for kind in KINDS if kind != "nan" or kinds.count("nan") < MOST_NANS]
        rng.shuffle(some)
        kinds += some
    return [
        Event(
            kind,
            rng.randint(4, 9),
            rng.random(),
            {"world": rng.choice(WORLDS), "stage": rng.choice(STAGES), "workers": rng.choice((0, 1, 2))}
            if kind == "resize"
            else {},
        )
        for kind in kinds[:count]
    ]
