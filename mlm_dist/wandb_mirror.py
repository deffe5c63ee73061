"""W&B as a mirror of ``metrics.jsonl``: one run whatever the restarts, each step once, never in the way of training.

The first line that ``metrics.jsonl`` holds for a (kind, step) is row i of the W&B run, i being its rank among such
first lines. W&B's own ``_step`` is that i, so what W&B holds is known from one number: at the start of an attempt the
rows that it lacks are sent from the file. They exist: wandb 0.31 keeps the newest rows (15 s by default) in the
memory of a process that dies with ours, and an outage loses more.

All calls of wandb run in one thread behind a queue: an outage, a full disk or a frozen service costs warnings, not
steps.
"""

import contextlib
import netrc
import os
import queue
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mlm_dist.groups import GROUPS, grouped
from mlm_dist.records import Record

Mode = Literal["online", "offline", "disabled"]

_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
_INIT_TIMEOUT = 30.0  # seconds; wandb's own is 90, too long to wait on a node without a network
_FLUSH_INTERVAL = 1.0  # seconds between writes of the offline file
_QUEUE_ROWS = 100_000


def resolve_mode(setting: str, environ: Mapping[str, str] | None = None) -> Mode:
    """The mode that ``track.wandb`` means here, decided without the network.

    An explicit setting stands. ``auto`` is WANDB_MODE if set, else online where an API key is at hand (WANDB_API_KEY,
    an identity token file or a netrc entry), else offline.
    """
    if setting != "auto":
        return _MODES[setting]
    environ = os.environ if environ is None else environ
    asked = _MODES.get(environ.get("WANDB_MODE", "").lower())
    if asked is not None:
        return asked
    return "online" if _logged_in(environ) else "offline"


def _logged_in(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    home = Path(environ.get("HOME") or "~").expanduser()
    candidates = [Path(environ["NETRC"]).expanduser()] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for path in candidates:
        try:
            entry = netrc.netrc(path).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


# Of a table of predictions.
COLUMNS = ("text", "truth", "probability of the truth", "prediction", "probability", "next")


def to_row(record: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What W&B is sent for one line of ``metrics.jsonl``: the axis ``global_step``, and the values by groups.

    Args:
        predictions: of a validation; the rows of a table.
    """
    row: dict[str, Any] = {"global_step": record["step"], **grouped(record)}
    if "time" in record:
        row["_timestamp"] = record["time"]  # wandb's own key: a row sent late keeps its time
    if predictions:
        row["val/predictions"] = _table(predictions)
    return row


def _table(predictions: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    table = wandb.Table(columns=list(COLUMNS))
    for row in predictions:
        (word, probability), *others = row["predictions"]
        more = ", ".join(f"{other} {p:.3f}" for other, p in others)
        table.add_data(row["text"], row["truth"], row["truth_probability"], word, probability, more)
    return table


def read_wandb_file(path: Path) -> Iterator[Any]:
    """The records (``wandb.proto.wandb_internal_pb2.Record``) that a ``.wandb`` file holds, up to a torn end.

    The format is LevelDB's log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a 7-byte header
    ``:W&B`` + u16 magic + version, with plain CRC-32 (checked). wandb 0.31 has its reader in Go only.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # the rest of a block too small for a header is padding
            position += room
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        payload = data[position + 7 : position + 7 + length]
        if kind not in (1, 2, 3, 4) or len(payload) < length or zlib.crc32(payload, zlib.crc32(bytes([kind]))) != crc:
            return
        position += 7 + length
        parts = payload if kind in (1, 2) else parts + payload  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def rows_held(directory: Path) -> int:
    """How many rows the offline files of earlier attempts under ``directory`` hold: 1 + the largest ``_step`` on
    disk.
    """
    held = 0
    for path in sorted(directory.glob("attempt_*/wandb/offline-run-*/run-*.wandb")):
        for record in read_wandb_file(path):
            if record.WhichOneof("record_type") == "history":
                held = max(held, record.history.step.num + 1)
    return held


def init(wandb: Any, directory: Path, mode: Mode, **start: Any) -> Any:
    """``wandb.init`` of a run that goes on where it exists, says nothing, and sends nothing that could be secret; what it writes is under ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    # Tables wait there to be uploaded; by default in the home directory, which is small on clusters.
    os.environ.setdefault("WANDB_DATA_DIR", str(directory))
    wandb.setup(settings=wandb.Settings(silent=True))  # before init: the login speaks by these
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # it would record the command line, which may carry credentials
        x_transaction_log_flush_interval=_FLUSH_INTERVAL,
        init_timeout=_INIT_TIMEOUT,
        finish_timeout=60.0,
    )
    run = wandb.init(dir=str(directory), mode=mode, resume="allow", allow_val_change=True, settings=settings, **start)
    run.define_metric("global_step", hidden=True)
    for group in GROUPS:
        run.define_metric(f"{group}/*", step_metric="global_step")
    run.define_metric("val/loss", step_metric="global_step", summary="min,last")
    return run


def log_checkpoint(run: Any, path: Path, aliases: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Log a checkpoint directory as a version of the run's artifact ``checkpoint-ID``: names and sizes of its files, and where they lie.

    Raises:
        OSError, ValueError: it is not there any more.
    """
    import wandb

    artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=dict(facts))
    artifact.add_reference(f"file://{path.resolve()}", checksum=False)
    run.log_artifact(artifact, aliases=list(aliases))


class Mirror:
    """Sends rows to W&B from a thread of its own.

    Args:
        directory: ``RUN/wandb``; attempt k writes under ``attempt_000k``.
        mode: ``online`` falls back to ``offline`` when the server cannot be reached within 30 s.
        config: already free of secrets.
        history: the records of ``metrics.jsonl`` so far, in row order, each with its predictions; those that W&B lacks are sent first.
        tables: there will be predictions.
        warn: called with one line of text, at most once for a failure that ends the mirroring of this attempt.
    """

    def __init__(
        self,
        directory: Path,
        *,
        mode: Literal["online", "offline"],
        run_id: str,
        project: str,
        name: str,
        config: Mapping[str, Any],
        attempt: int,
        history: Sequence[tuple[Record, Sequence[Record]]],
        tables: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.mode: Mode = mode
        self._root = directory
        self._directory = directory / f"attempt_{attempt:04d}"
        self._start_args = {"id": run_id, "project": project, "name": name, "config": dict(config)}
        self._tables, self._warn = tables, warn
        self._broken = False
        self._exit_code = 0
        self._queue: queue.Queue[Callable[[Any], Any] | None] = queue.Queue(_QUEUE_ROWS)  # what to do with the W&B run
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(list(history),), name="wandb-mirror", daemon=True)
        self._thread.start()
        # Waiting matters: loader workers are forked soon after, and a fork in the middle of wandb's imports would
        # leave their locks held in the child.
        self._ready.wait(2 * _INIT_TIMEOUT)

    def put(self, row: int, record: Record, predictions: Sequence[Record] = ()) -> None:
        """Queue one record as row number ``row``. Never blocks, never raises."""
        self._put(lambda run: run.log(to_row(record, predictions), step=row, commit=True))

    def alert(self, title: str, text: str, level: Literal["WARN", "ERROR"]) -> None:
        """Queue an alert, which W&B sends to whom its user settings say. Never blocks, never raises."""
        self._put(lambda run: run.alert(title, text, level=level))

    def checkpoint(self, path: Path, aliases: Sequence[str], facts: Mapping[str, Any]) -> bool:
        """Queue a checkpoint as an artifact that refers to where it lies; False where W&B gets nothing more. Never blocks, never raises."""

        def send(run: Any) -> None:
            try:
                log_checkpoint(run, path, aliases, facts)
            except (OSError, ValueError) as error:  # retention was faster
                self._warn(f"W&B gets no artifact of {path.name} ({_line(error)})")

        return self._put(send)

    def _put(self, action: Callable[[Any], Any]) -> bool:
        if not self._broken:
            try:
                self._queue.put_nowait(action)
            except queue.Full:
                self._fail("W&B does not answer", RuntimeError(f"{_QUEUE_ROWS:,} rows are waiting"))
        return not self._broken

    def finish(self, exit_code: int, timeout: float) -> None:
        """End the W&B run with ``exit_code``; after ``timeout`` seconds go on without it."""
        self._exit_code = exit_code
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._fail("W&B did not finish", TimeoutError(f"no answer in {timeout:.0f} s"))
            _drop_service()

    def _main(self, history: list[tuple[Record, Sequence[Record]]]) -> None:
        try:
            try:
                run = self._open()
                if self._tables:
                    with contextlib.suppress(ImportError):
                        import pandas  # noqa: F401  # as wandb does at its first table, see __init__
                held = self._held(run, len(history))
            finally:
                self._ready.set()
            for row in range(held, len(history)):
                run.log(to_row(*history[row]), step=row, commit=True)
            while (action := self._queue.get()) is not None:
                action(run)
            run.finish(exit_code=self._exit_code)
            if self.mode == "offline":
                # The service writes the file's end after finish() has returned; it is whole when the service has gone.
                import wandb

                wandb.teardown()
        except Exception as error:
            self._fail("W&B failed", error)
            _drop_service()

    def _held(self, run: Any, available: int) -> int:
        if self.mode == "online":
            return int(run.step)
        try:
            return rows_held(self._root)
        except Exception as error:  # a damaged file of an earlier attempt: rather a gap than rows twice
            self._warn(
                f"W&B: cannot tell what earlier attempts hold, so rows that they lost stay lost ({_line(error)})"
            )
            return available

    def _open(self) -> Any:
        import wandb

        try:
            return self._init(wandb)
        except Exception as error:
            if self.mode != "online":
                raise
            self._warn(f"W&B cannot be reached, so this attempt is tracked offline ({_line(error)})")
            with contextlib.suppress(SystemExit):  # it exits with the service's code
                wandb.teardown()  # the service still holds the run's id
            self.mode = "offline"
            return self._init(wandb)

    def _init(self, wandb: Any) -> Any:
        return init(wandb, self._directory, self.mode, **self._start_args)

    def _fail(self, what: str, error: BaseException) -> None:
        if not self._broken:
            self._broken = True
            self._warn(f"{what}; training goes on, and the next attempt sends the missing rows ({_line(error)})")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _drop_service() -> None:
    """Kill the wandb-core process that this process started, and take down wandb's exit hook, which would wait for it.

    By wandb's internals, as it offers no way to leave a service that does not answer.
    """
    import wandb

    with contextlib.suppress(Exception):
        wandb.setup()._connection._proc._process.kill()
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
