"""Checks that end: in time, and with what went wrong as a fact."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mlm_dist.errors import UserError


def bounded(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What ``work`` finds or, if it fails or takes longer, ``{"error": why}``.

    It runs in a thread that is left behind when the time is up: a read of a dead network file system cannot be called off.
    """
    box: list[dict[str, Any]] = []

    def body() -> None:
        try:
            box.append(work())
        except UserError as error:
            box.append({"error": str(error)})
        except Exception as error:
            text = " ".join(str(error).split())
            box.append({"error": f"{type(error).__name__}: {text}"[:2000]})

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else {"error": f"no answer within {seconds:.0f} s"}
