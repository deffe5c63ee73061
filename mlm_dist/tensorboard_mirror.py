"""TensorBoard as a mirror of ``metrics.jsonl``: ``RUN/tensorboard`` holds each step once, whatever the restarts.

An attempt writes one event file anew, from all that ``metrics.jsonl`` holds, and then removes those before it: what a killed
attempt had in memory, and what a replay gave another value, need no thought. A thread does it (measured 0.5 ms a logged step),
so that neither a long history nor a slow disk costs steps.
"""

import queue
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mlm_dist.errors import UserError
from mlm_dist.groups import grouped
from mlm_dist.records import Record


def check_installed() -> None:
    """Raises UserError where the package is missing."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("track.tensorboard: true needs the package tensorboard: pip install 'mlm-dist[tensorboard]'")


class TensorBoard:
    """Writes records to an event file from a thread of its own.

    Args:
        directory: ``RUN/tensorboard``; what other attempts wrote there is replaced.
        history: records so far, each with its predictions (see ``tracking.read_predictions``).
        warn: called with one line of text, at most once.
    """

    def __init__(
        self, directory: Path, history: Sequence[tuple[Record, Sequence[Record]]], warn: Callable[[str], None]
    ) -> None:
        self._directory, self._warn = directory, warn
        # A step means: forget what was from there on.
        self._queue: queue.SimpleQueue[tuple[Record, Sequence[Record]] | int | None] = queue.SimpleQueue()
        for item in history:
            self._queue.put(item)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, name="tensorboard", daemon=True)
        self._thread.start()
        # Loader workers are forked soon after, and a fork in the middle of an import would leave its lock held in the child.
        self._ready.wait(60)

    def put(self, record: Record, predictions: Sequence[Record] = ()) -> None:
        """Queue one record. Never blocks, never raises."""
        if self._thread.is_alive():
            self._queue.put((record, predictions))

    def take_back(self, to: int) -> None:
        """Queue that the steps after ``to`` come again, with other values. Never blocks, never raises."""
        if self._thread.is_alive():
            self._queue.put(to + 1)

    def finish(self, timeout: float) -> None:
        """Write what is queued and close the file, waiting at most ``timeout`` seconds."""
        self._queue.put(None)
        self._thread.join(timeout)

    def _main(self) -> None:
        try:
            from tensorboard.plugins.text import summary_v2  # noqa: F401  # for _events
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            old = list(self._directory.glob("*")) if self._directory.exists() else []
            writer = EventFileWriter(str(self._directory))
            # A TensorBoard that is open meanwhile forgets what it has read of the old file.
            self._ready.set()
            writer.add_event(_start(0))
            for path in old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            while (item := self._queue.get()) is not None:
                for event in [_start(item)] if isinstance(item, int) else _events(*item):
                    writer.add_event(event)
                if self._queue.empty():
                    writer.flush()
            writer.close()
        except Exception as error:
            self._warn(
                f"TensorBoard gets nothing more in this attempt, and all of it in the next ({type(error).__name__}: {error})"
            )
        finally:
            self._ready.set()


def _start(step: int) -> Any:
    """Of this event TensorBoard makes that what it has read from ``step`` on is forgotten."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    return Event(step=step, session_log=SessionLog(status=SessionLog.START))


def _events(record: Record, predictions: Sequence[Record]) -> Iterable[Any]:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb

    values = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in grouped(record).items()
        if isinstance(value, int | float)
    ]
    yield Event(wall_time=record["time"], step=record["step"], summary=Summary(value=values))
    if predictions:
        lines = ["| text | truth | prediction | probability |", "|---|---|---|---|"]
        for row in predictions:
            word, probability = row["predictions"][0]
            cells = (row["text"], row["truth"], word, f"{probability:.3f}")
            lines.append("| " + " | ".join(" ".join(str(c).splitlines()).replace("|", "&#124;") for c in cells) + " |")
        text = text_pb("val/predictions", "\n".join(lines))
        yield Event(wall_time=record["time"], step=record["step"], summary=text)
