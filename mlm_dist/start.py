"""What rank 0 does before the others: takes the run directory, finds what to go on from, and writes down what the attempt is made from."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlm_dist import branch, checkpoint, rollback
from mlm_dist.config import Config
from mlm_dist.data.lanes import Lost
from mlm_dist.errors import UserError
from mlm_dist.inputs import Inputs
from mlm_dist.ledger import Ledger, Skip
from mlm_dist.lifecycle import RunDir, StopFlag, environment, write_json
from mlm_dist.model import from_run
from mlm_dist.redact import redact


@dataclass(frozen=True)
class Opened:
    """What all ranks are told.

    Attributes:
        attempt: its number, from 1.
        checkpoint: to go on from, or None.
        source: of ``model.init: run``, the checkpoint whose weights the run begins with.
        finished: the run is, and nothing was changed.
        lost, skips: what it goes on without: (source, epoch, block), and ranges of batches.
    """

    attempt: int
    checkpoint: Path | None
    source: str | None
    finished: bool
    lost: Lost
    skips: list[Skip]


def open_run(
    config: Config,
    inputs: Inputs,
    directory: RunDir,
    flag: StopFlag,
    machine: Mapping[str, Any],
    allow_change: Sequence[str],
    say: Callable[[str], None],
) -> tuple[Opened, Ledger, dict[str, Any]]:
    """Take ``directory``, whose stop requests set ``flag``, for an attempt on ``machine``; after an error it is free again.

    Returns:
        What all ranks are told; the ledger, which rank 0 keeps; facts of the attempt for its event.

    Raises:
        UserError: it is another run's, or in use, or holds nothing whole to go on from; too much of the data is lost.
        OSError: it cannot be read or written.
    """
    inputs.check_remote()
    directory.prepare()
    directory.acquire(flag)
    try:
        return _open(config, inputs, directory, machine, list(allow_change), say)
    except BaseException:
        directory.release()
        raise


def _open(
    config: Config,
    inputs: Inputs,
    directory: RunDir,
    machine: Mapping[str, Any],
    allow_change: list[str],
    say: Callable[[str], None],
) -> tuple[Opened, Ledger, dict[str, Any]]:
    path = directory.path
    identity = json.loads(json.dumps(config.identity(inputs.fingerprints(), inputs.tokenizer.fingerprint)))
    changed = directory.check_identity(identity, config.guarded(), allow_change)
    finished = (directory.last_status or {}).get("state") == "finished" and not changed
    ledger = Ledger.read(path / "events.jsonl")
    rollback.discard(rollback.void_checkpoints(path, ledger))
    found = checkpoint.newest(
        path, say, lambda r: "a roll-back took its steps back" if rollback.void(r, ledger) else None
    )
    if found is None and (damaged := checkpoint.committed(path)):
        raise UserError(
            f"run {str(path)!r}: none of its {len(damaged)} checkpoints is whole. Bring one back, or delete {path / 'checkpoints'} to begin anew."
        )
    if found is None and config.run.branch_from is not None:
        found = _branch(config, inputs, directory, identity, allow_change, say)
    source = None
    if found is None and config.model.init == "run":
        assert config.model.name_or_path is not None
        source = str(from_run.newest(config.model.name_or_path, say))
    reader = None if found is None else checkpoint.Reader(found)
    if reader is not None:
        ledger.add(reader.trainer["ledger"])
        ledger.add_skips(reader.trainer.get("skips", ()))
    if verdict := ledger.verdict(inputs.num_documents, config.data.max_bad_fraction):
        raise UserError(verdict + "\nMend the data, or raise data.max_bad_fraction to go on without these documents.")
    if not finished:
        _describe(config, inputs, directory, machine, changed, say)
        directory.status("running", 0 if reader is None else reader.step)
        # After the status: a start that dies between them still sees what --allow_change changed.
        directory.record_identity(identity, config.guarded())
    facts = {
        "stage": inputs.ds_config["zero_optimization"]["stage"],
        "known_losses": inputs.known_losses(),
        "documents": inputs.num_documents,
        "changed": changed,
        "branch_from": config.run.branch_from,
    }
    return Opened(directory.attempt, found, source, finished, ledger.lost_blocks(), ledger.skips), ledger, facts


def _branch(
    config: Config,
    inputs: Inputs,
    directory: RunDir,
    identity: dict[str, Any],
    allow_change: list[str],
    say: Callable[[str], None],
) -> Path:
    """The checkpoint of another run that this one begins from, copied into its directory."""
    assert config.run.branch_from is not None
    base = branch.Base(config.run.branch_from, say)
    base.check_identity(identity)
    progress = config.train.progress(base.step, base.reader.trainer["bytes"], inputs.num_bytes)
    base.check_rate(progress, config.optim.lr, config.optim, allow_change)
    # Before the copy: a start that dies between them leaves a directory without a checkpoint, which is held to nothing.
    directory.record_identity(identity, config.guarded())
    found = base.adopt(directory.path)
    say(f"branches from {base.path}")
    return found


def _describe(
    config: Config,
    inputs: Inputs,
    directory: RunDir,
    machine: Mapping[str, Any],
    changed: dict[str, list[Any]],
    say: Callable[[str], None],
) -> None:
    """Write down what the attempt is made from, so that the directory alone tells it."""
    path = directory.path
    write_config(config, path / "config.yaml")
    write_json(path / "env.json", {**environment(), **machine})
    inputs.bert_config.save_pretrained(path / "model")
    inputs.pretrained_tokenizer.save_pretrained(path / "tokenizer")
    if directory.died is not None:
        say(f"attempt {directory.died.get('attempt')} died without a word; its lock is taken over")
    if changed:
        changes = (f"{k} from {old} to {new}" for k, (old, new) in changed.items())
        say(f"changed by --allow_change: {', '.join(changes)}")


def write_config(config: Config, path: Path) -> None:
    """The config, whole, for the run to be started from; with a password or key in it, for its owner's eyes alone."""
    plain = json.loads(json.dumps(asdict(config)))
    path.unlink(missing_ok=True)
    mode = 0o666 if redact(plain) == plain else 0o600
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(config.dump())
