"""Numbers, times and events in words."""

import json
from datetime import UTC, datetime
from typing import Any

# What each kind of event means. One that is not here is shown by its own name.
KINDS = {
    "attempt": "the run was started",
    "finished": "the run finished",
    "stopped": "a stop was asked for; a checkpoint was written",
    "hang": "no rank got any further",
    "rollback": "back to a checkpoint, without the steps that went wrong",
    "skipped_step": "a step was skipped, weights unchanged",
    "checkpoint_failed": "a checkpoint could not be written",
    "data_loss": "documents could not be read",
    "val_data_loss": "validation documents could not be read",
    "empty_validation": "the validation set holds no text to predict",
    "worker_restarted": "a loader worker died and was started again",
    "straggler": "a rank became slow",
    "straggler_gone": "a rank is no longer slow",
    "replay_differs": "a step taken again gave another loss",
    "torn_line": "a crash left half a line",
    "damaged_lines": "lines of metrics.jsonl could not be read",
    "wandb": "W&B had trouble",
    "tensorboard": "TensorBoard's files had trouble",
    "artifact": "a checkpoint became an artifact of the W&B run",
}


def meaning(kind: str) -> str:
    """An event's kind in words."""
    return KINDS.get(kind, kind.replace("_", " "))


def short(value: float) -> str:
    """1234567 -> 1.23 M."""
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def scientific(value: float) -> str:
    """0.00025 -> 2.5e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def duration(seconds: float) -> str:
    """3700 -> 1 h 2 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def when(seconds: float | None) -> str:
    """Unix seconds as a date and time in UTC; empty for None, and for what is no date."""
    try:
        return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, OSError, ValueError):
        return ""


def plural(count: int, word: str) -> str:
    """2, "step" -> 2 steps."""
    return f"{count:,} {word}" + "s" * (count != 1)


def rest(event: dict[str, Any], most: int = 400) -> str:
    """What an event tells beside its time, kind, attempt and step."""
    shown = ("time", "kind", "attempt", "step")
    text = "; ".join(f"{k}: {_plain(v)}" for k, v in event.items() if k not in shown and v not in (None, "", [], {}))
    return text if len(text) <= most else text[: most - 1] + "…"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
