"""A simulated Slurm cluster and what the tests do to it; `minicluster.sh` beside this file says how it is made."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mlm_dist.files import read_json
from tests.e2e.program import losses
from tests.ranks import ROOT

SCRIPT = Path(__file__).with_name("minicluster.sh")
CANNOT = 77  # exit code of the script where the machine cannot do it
SECRETS = {"WANDB_API_KEY": "canary0" * 6, "HF_TOKEN": "hf_canary1"}
# The environment that jobs are submitted from.
SUBMITTER = {
    **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MLM_", "WANDB_"))},
    **SECRETS,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
T = TypeVar("T")


class CannotRun(Exception):
    """This machine has not what a cluster needs; says what."""


class Cluster:
    """`nodes` hosts named node1, node2, ... and the login host, which is up from the beginning until `down`."""

    def __init__(self, nodes: int, environ: Mapping[str, str] | None = None) -> None:
        """Raises CannotRun. `environ` is for the script: its MINICLUSTER_* variables."""
        self.nodes = nodes
        # Not under pytest's directory: it is closed to munge's user, and too long a path for a socket.
        self.parent = Path(tempfile.mkdtemp(prefix="mlm-", dir="/tmp"))
        self.parent.chmod(0o755)
        self.dir = self.parent / "c"
        # When this process dies, however it does, the other end of the pipe is closed, and the cluster ends.
        lease, self._lease = os.pipe()
        try:
            done = subprocess.run(
                [SCRIPT, "up", self.dir, str(nodes)],
                env={**SUBMITTER, **(environ or {}), "MINICLUSTER_LEASE": str(lease)},
                pass_fds=[lease],
                capture_output=True,
                text=True,
                timeout=90,
            )
        finally:
            os.close(lease)
        if done.returncode:
            self.down()
            if done.returncode == CANNOT:
                raise CannotRun(done.stderr.strip())
            raise AssertionError(f"no cluster:\n{done.stderr}")

    def down(self) -> None:
        """Switches everything off and deletes its files."""
        self._script("down")
        os.close(self._lease)
        shutil.rmtree(self.parent)

    # ---- the hosts ----

    def _script(self, command: str, *words: object, check: bool = True, **options: object) -> str:
        done = subprocess.run(
            [SCRIPT, command, self.dir, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **{"timeout": 60, "env": SUBMITTER, **options},  # type: ignore[call-overload]
        )
        assert not check or done.returncode == 0, f"{command} {words}: {done.returncode}\n{done.stdout}"
        return str(done.stdout)

    def run(self, *command: object, **options: object) -> str:
        """Output of a command on the login host, which must succeed unless `check=False`; other options are subprocess.run's."""
        return self._script("run", *command, **options)

    def on(self, node: int, *command: object, **options: object) -> str:
        """The same on a node."""
        return self._script("on", node, *command, **options)

    def start_on(self, node: int, *command: object, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on a node, its output going to `log`."""
        with log.open("wb") as file:
            return subprocess.Popen(
                [SCRIPT, "on", self.dir, str(node), *map(str, command)],
                env=SUBMITTER,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def power_off(self, node: int) -> None:
        """The node is gone at once."""
        self._script("power-off", node)

    def boot(self, node: int) -> None:
        """Switches the node on; no effect when it is."""
        self._script("boot", node)

    def cut(self, node: int) -> None:
        """Takes the node's network cable out."""
        self._script("cut", node)

    def heal(self, node: int) -> None:
        """Puts it back."""
        self._script("heal", node)

    def _processes(self, node: int) -> dict[int, tuple[int, str]]:
        lines = (line.split(maxsplit=3) for line in self._script("ps", node).splitlines())
        return {int(pid): (int(parent), args) for pid, parent, _, args in lines}

    def leftovers(self) -> dict[int, dict[int, str]]:
        """Of each node that has any, command line by process id of all that runs and is not the host's own."""
        found = {}
        for node in range(1, self.nodes + 1):
            # The daemon of a step on a node that was cut off takes a minute to understand that the step is over.
            ours = {p: args for p, (_, args) in self._processes(node).items() if not args.startswith("slurmstepd: ")}
            found |= {node: ours} if ours else {}
        return found

    def ranks(self, node: int) -> list[int]:
        """Process ids of the training programs on a node, without their loader workers."""
        found = self._processes(node)
        programs = {p: parent for p, (parent, args) in found.items() if "-m mlm_dist.train" in args}
        return [p for p, parent in programs.items() if parent in found and "-m launcher.exec" in found[parent][1]]

    # ---- jobs ----

    def launch(self, *words: object, **options: object) -> str:
        """Output of `mlm-launch WORDS` on the login host."""
        return self.run(sys.executable, "-m", "launcher.cli", *words, **options)

    def submit(self, config: Path, *words: object) -> str:
        """Id of the job that `mlm-launch slurm --config CONFIG WORDS` submitted."""
        output = self.launch("slurm", "--config", config, *words, cwd=config.parent)
        found = re.search(r"job (\d+) submitted", output)
        assert found, output
        return found[1]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", job).splitlines()[0]))

    def wait_for(self, what: str, condition: Callable[[], T], timeout: float = 60.0) -> T:
        """Polls until the condition holds; fails with its name when the time (seconds) is up."""
        deadline = time.monotonic() + timeout
        while True:
            if found := condition():
                return found
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}\n{self.run('squeue', '--long')}"
            time.sleep(0.1)

    def wait_for_end(self, job: str, timeout: float = 120.0) -> str:
        """The state in which the job ended."""

        def ended() -> str | None:
            state = self.job(job)["JobState"]
            return state if state in ENDED else None

        return self.wait_for(f"end of job {job}", ended, timeout)

    def wait_for_step(self, run: Path, step: int, timeout: float = 90.0) -> None:
        """Returns when `metrics.jsonl` holds the step."""
        self.wait_for(f"step {step} of {run}", lambda: max(losses(run), default=0) >= step, timeout)

    def wait_for_attempt(self, run: Path, attempt: int, timeout: float = 90.0) -> int:
        """Waits until the attempt has made some steps and a checkpoint of its own; returns the last step seen."""

        def steps() -> int:
            made = attempt_steps(run).get(attempt, [])
            newest = max((int(p.parent.name[5:]) for p in run.glob("checkpoints/step_*/COMMIT")), default=0)
            return made[-1] if made and newest > made[0] else 0

        return self.wait_for(f"checkpoint of attempt {attempt} of {run}", steps, timeout)

    def wait_until_quiet(self, timeout: float = 20.0) -> None:
        """Waits until nothing of any job runs on any node."""
        deadline = time.monotonic() + timeout
        while found := self.leftovers():
            assert time.monotonic() < deadline, f"left running after {timeout:g} s: {json.dumps(found, indent=1)}"
            time.sleep(0.2)

    def mend(self) -> None:
        """Ends all jobs and brings all nodes back."""
        self.run("scancel", "--user=root")
        for node in range(1, self.nodes + 1):
            self._script("boot", node)
            self._script("heal", node)
        idle = ["sinfo", "--noheader", "--partition=debug", "--states=idle", "--format=%D"]
        self.wait_for("all nodes idle", lambda: self.run(*idle).strip() == str(self.nodes))

    def tails(self, lines: int = 30) -> str:
        """The ends of Slurm's logs."""
        return tails(sorted(self.dir.glob("log/slurm*.log")), lines)


def tails(paths: Sequence[Path], lines: int = 40) -> str:
    """The ends of files, for a test that failed."""
    return "\n".join(
        f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) for path in paths
    )


def attempt_steps(run: Path) -> dict[int, list[int]]:
    """Training steps by attempt, from `metrics.jsonl`."""
    found: dict[int, list[int]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        if record["kind"] == "train":
            found.setdefault(record["attempt"], []).append(record["step"])
    return found


def status(run: Path) -> dict[str, object]:
    """`status.json`."""
    found = read_json(run / "status.json")
    assert isinstance(found, dict), run
    return found


def assert_same_losses(run: Path, reference: Path) -> None:
    """Of all steps, but for rounding, which depends on how many ranks share in a sum."""
    for kind in ("train", "val"):
        got, want = losses(run, kind), losses(reference, kind)
        assert sorted(got) == sorted(want) and got
        assert max(abs(got[step] - want[step]) for step in want) < 1e-5
