"""Drives a small real run through a schedule of troubles, then compares it with a run that nothing happened to.

That other run has the same ledger from its start: what a fault made the run leave out is part of what its data is a
function of. Its shards are whole again, nothing is killed, and its numbers are good.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlm_dist import checkpoint
from mlm_dist.config import load
from mlm_dist.files import read_json_lines
from mlm_dist.inputs import DataInputs
from mlm_dist.ledger import Ledger
from mlm_dist.records import read_metrics
from tests.chaos.rank import PAUSE, ROWS
from tests.chaos.schedule import Event
from tests.e2e.faulty import FAULTS, fault
from tests.e2e.program import Program, save_config

EVERY = 3  # steps between checkpoints
PAUSE_S = 0.05  # in each step, so that a trouble falls near the step that it is meant for
ENDED_S = 120.0
STOPPED = 75
# fp32 sums of other ranks in another order; between the same ranks and stages the losses are equal to the bit.
CLOSE = 1e-4


@dataclass
class Chaos:
    """A run and its troubles.

    Attributes:
        events: the troubles, in their order.
        say: told of each.
    """

    folder: Path
    events: list[Event]
    say: Callable[[str], None] = lambda _line: None
    start: dict[str, Any] = field(default_factory=lambda: {"world": 2, "stage": "zero1", "workers": 1})
    faults: list[dict[str, Any]] = field(default_factory=list)
    intact: dict[Path, bytes] = field(default_factory=dict)  # what shards held before they were damaged
    logged: int = 0  # bytes of metrics.jsonl before the last start

    def __post_init__(self) -> None:
        steps = 10 + sum(event.steps + EVERY for event in self.events)
        self.config = save_config(
            self.folder,
            data={"max_bad_fraction": 0.5},
            model={"attention_dropout": 0.0, "hidden_dropout": 0.0},
            train={"steps": steps, "max_skipped": 1, "max_rollbacks": 99, "timeout": 20.0},
            checkpoint={"every": EVERY, "keep": 4},
            eval={"every": 10},
            track={"wandb": "offline"},
        )
        self.steps = steps
        self.run = self.folder / "runs" / "run"
        self.rows = self.folder / "rows"

    # ---- the run ----

    def play(self) -> None:
        """All events, one after the other, then to the end; says of each what it cost."""
        told = ""
        for number, event in enumerate([*self.events, None]):
            before, begun = self.newest(), time.monotonic()
            program = self.begin(PAUSE_S if event else 0.0)
            self.wait_for(program, before + 1)
            if told:
                self.say(f"{told}, goes on {time.monotonic() - begun:.1f} s after the start")
            if event is None:
                break
            at, troubled = self.wait_for(program, before + event.steps), time.monotonic()
            outcome = getattr(self, event.kind)(event, program)
            told = (
                f"{number + 1:3} {event.kind:18} at step {at:4}: {outcome}; {at - min(at, self.newest())} steps to take again, "
                f"over after {time.monotonic() - troubled:.1f} s"
            )
        program.finish(ENDED_S)
        assert self.status()["state"] == "finished"

    def begin(self, pause: float = PAUSE_S) -> Program:
        """Start the run again, as it was started last."""
        path = self.run / "metrics.jsonl"
        self.logged = path.stat().st_size if path.exists() else 0  # what is behind it is of this attempt
        s = self.start
        flags = ["--deepspeed.config", s["stage"], "--data.workers", str(s["workers"])]
        environ = {FAULTS: json.dumps(self.faults), ROWS: str(self.rows), PAUSE: str(pause)}
        return Program(self.config, s["world"], flags, module="tests.chaos.rank", environ=environ).start()

    def wait_for(self, program: Program, step: int) -> int:
        """Return the last step of this attempt, when it is ``step`` or later."""
        deadline = time.monotonic() + ENDED_S
        while (reached := self.reached()) < step:
            assert time.monotonic() < deadline and all(r.poll() is None for r in program.ranks), program.output()
            time.sleep(0.02)
        return reached

    def reached(self) -> int:
        """The last step that this attempt has logged, or 0."""
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(self.logged)
            lines = file.read().split(b"\n")[:-1]
        return max((json.loads(line)["step"] for line in lines), default=0)

    def newest(self) -> int:
        """The step of the newest checkpoint, or 0."""
        found = checkpoint.newest(self.run) if self.run.exists() else None
        return checkpoint.Reader(found).step if found else 0

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    def ended(self, program: Program) -> list[int]:
        """Exit codes; a moment later nothing of the program may be left."""
        codes = program.wait(ENDED_S)
        left = {r: pids for r, rank in enumerate(program.ranks) if (pids := members(rank.pid))}
        deadline = time.monotonic() + 10
        while left and time.monotonic() < deadline:
            time.sleep(0.1)
            left = {r: pids for r in left if (pids := members(program.ranks[r].pid))}
        assert not left, f"left running: {left}\n{program.output()}"
        return codes

    # ---- troubles ----

    def kill_rank(self, event: Event, program: Program) -> str:
        """One rank dies of SIGKILL, as by the OOM killer; its workers, left alone, must end by themselves."""
        victim = int(event.draw * program.world)
        program.ranks[victim].kill()
        codes = self.ended(program)
        assert all(code not in (0, STOPPED) for code in codes), codes
        return f"exit codes {codes}"

    def kill_all(self, _event: Event, program: Program) -> str:
        """The node goes down."""
        program.kill()
        return "all ranks killed"

    def terminate(self, event: Event, program: Program) -> str:
        """SIGTERM to one rank: all agree on a step, and write a checkpoint of it."""
        program.ranks[int(event.draw * program.world)].send_signal(signal.SIGTERM)
        codes = self.ended(program)
        assert codes == [STOPPED] * program.world, program.output()
        assert (self.status()["state"], self.status()["step"]) == ("cancelled", self.newest())
        return f"stopped at step {self.newest()}"

    def kill_worker(self, event: Event, program: Program) -> str:
        """A loader worker dies, and is started again where it was; without one, that is a rank."""
        workers = [pid for rank in program.ranks for pid in members(rank.pid) if pid != rank.pid and is_worker(pid)]
        if not workers:
            return self.kill_rank(event, program)
        before = len(self._events("worker_restarted"))
        os.kill(workers[int(event.draw * len(workers))], signal.SIGKILL)
        # It may have read so far ahead that its rank asks for more only in the next attempt.
        self.wait_for(program, self.reached() + 3)
        program.kill()
        return f"{len(self._events('worker_restarted')) - before} worker started again; then all ranks killed"

    def corrupt_checkpoint(self, event: Event, program: Program) -> str:
        """The newest checkpoint loses a bit: the one before is taken."""
        program.kill()
        found = checkpoint.newest(self.run)
        if (
            found is None or len(checkpoint.committed(self.run)) < 2
        ):  # of a run without a whole one nothing is begun anew
            return "all ranks killed before there were two checkpoints"
        files = sorted(path for path in found.iterdir() if path.stat().st_size)
        victim = files[int(event.draw * len(files))]
        data = bytearray(victim.read_bytes())
        data[int(event.draw * 7919) % len(data)] ^= 1
        victim.write_bytes(data)
        return f"{found.name}/{victim.name} damaged; the newest whole one is now {self.newest()}"

    def resize(self, event: Event, program: Program) -> str:
        """The run goes on with other ranks, another stage, other workers."""
        program.kill()
        self.start = event.start
        return "on as {world} ranks, {stage}, {workers} workers".format(**event.start)

    def bad_shard(self, event: Event, program: Program) -> str:
        """A block that no checkpoint has begun to read rots on the disk."""
        program.kill()
        path, offset = self._unread_block(event.draw)
        data = bytearray(path.read_bytes())
        self.intact.setdefault(path, bytes(data))
        data[offset + 600] ^= 0xFF
        path.write_bytes(data)
        return f"{path.name} damaged at byte {offset}"

    def nan(self, event: Event, program: Program) -> str:
        """A batch gives NaN on one rank whenever it is trained on; the run goes back and leaves it out."""
        program.kill()
        batch = self.reached() + 1 + int(event.draw * 3)
        self.faults.append(fault("loss" if event.draw < 0.5 else "gradient", batch, rank=0))
        program = self.begin()
        deadline = time.monotonic() + ENDED_S
        while not any(batch in e["bad"] for e in self._events("rollback")):
            assert time.monotonic() < deadline and all(r.poll() is None for r in program.ranks), program.output()
            time.sleep(0.05)
        program.kill()
        back = self._events("rollback")[-1]
        return f"batch {batch} is not finite: back to step {back['to']}, without {back['skip']}"

    def _events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_json_lines(self.run / "events.jsonl") if e["kind"] == kind]

    def _unread_block(self, draw: float) -> tuple[Path, int]:
        """The shard and the offset of a block that lies, in its lane, behind all that any checkpoint has read."""
        stream = self._inputs().stream(0, 1)
        cursors = stream.start_cursors()
        if found := checkpoint.newest(self.run):
            cursors = np.asarray(checkpoint.Reader(found).trainer["cursors"])
        lane = int(draw * len(cursors))
        epoch, position, _ = cursors[lane].tolist()
        blocks = stream.order.blocks(epoch, lane)
        if position + 1 >= len(blocks):
            epoch, position = epoch + 1, -1
            blocks = stream.order.blocks(epoch, lane)
        place = stream.order.place(epoch, int(blocks[position + 1]))
        shard, offset, _ = stream.makers[0].where(place.block)
        return self.folder / "corpus" / shard, offset

    def _inputs(self) -> DataInputs:
        config = load(["--config", str(self.config)]).config
        config.data.workers = 0
        return DataInputs(config)

    # ---- the comparison ----

    def compare(self) -> str:
        """Run undisturbed what the run came to be, and hold the two against each other; says how far they are apart."""
        for path, data in self.intact.items():
            path.write_bytes(data)
        ledger = Ledger.read(self.run / "events.jsonl")
        calm = self.folder / "runs" / "calm"
        calm.mkdir()
        kept = [e for e in read_json_lines(self.run / "events.jsonl") if e["kind"] in ("data_loss", "rollback")]
        (calm / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
        rows = self.folder / "calm-rows"
        environ = {ROWS: str(rows)}
        Program(self.config, 1, ["--run.name", "calm"], module="tests.chaos.rank", environ=environ).start().finish(
            ENDED_S
        )

        ours, theirs = last_rows(self.rows), last_rows(rows)
        assert ours.keys() == theirs.keys() == set(range(self.steps))
        differ = [step for step in theirs if ours[step] != theirs[step]]
        assert not differ, f"the data of steps {differ[:10]} differs"

        mine, reference = (read_metrics(run / "metrics.jsonl") for run in (self.run, calm))
        lines = [{(m["kind"], m["step"]) for m in metrics} for metrics in (mine, reference)]
        assert lines[0] == lines[1], f"in one of the two only: {lines[0] ^ lines[1]}"
        left_out = {step + 1 for first, last in ledger.skips for step in range(first, last + 1)}
        worst = 0.0
        for a, b in zip(mine, reference, strict=True):
            if a["kind"] == "train":
                assert (a["loss"] is None) == (b["loss"] is None) == (a["step"] in left_out), (a, b)
                assert (a["tokens"], a["selected"], a["lr"]) == (b["tokens"], b["selected"], b["lr"])
            if a["loss"] is not None:
                worst = max(worst, abs(a["loss"] - b["loss"]))
        assert worst < CLOSE, f"losses differ by {worst}"
        ids = {m.name.split("-")[-1] for m in (self.run / "wandb").glob("*/offline-run-*")}
        assert len(ids) <= 1, f"W&B has the runs {ids}"
        for path in checkpoint.committed(self.run)[-1:]:
            checkpoint.Reader(path).verify()
        return (
            f"{self.steps} steps, {len(ledger.faults)} losses and {len(ledger.skips)} roll-backs in the ledger ({len(left_out)} steps left out): "
            f"the data of every step is equal, losses differ by at most {worst:.1e}"
        )


def last_rows(folder: Path) -> dict[int, dict[str, str]]:
    """By step, the digest of each row of its batch as it was taken last, put together from all ranks: a row's number says which it is."""
    out: dict[int, dict[str, str]] = {}
    for path in sorted(folder.iterdir(), key=lambda p: int(p.name.split("-")[0])):
        for note in read_json_lines(path):
            out.setdefault(note["step"], {}).update(note["rows"])
    return out


def members(group: int) -> list[int]:
    """Processes of a process group that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return sorted(found)


def is_worker(pid: int) -> bool:
    """Whether a process of a rank is a loader worker: a fork of it, with its command line."""
    with contextlib.suppress(OSError):
        return b"tests.chaos.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
