"""Stands in for mlm_dist.train in the tests of the launcher: `python -m standin --config C --mode MODE`."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--config", type=Path)
parser.add_argument("--mode")
args, rest = parser.parse_known_args()
rank = int(os.environ["RANK"])
here = args.config.parent
run = here / "runs" / args.config.stem


def keep(name: str, value: object) -> None:
    """Writes `value` as JSON under the test's directory, whole or not at all."""
    part = here / f".{name}.{rank}"
    part.write_text(json.dumps(value))
    part.rename(here / f"{name}-{rank}.json")


def wait(path: Path) -> None:
    """Waits for a file."""
    while not path.exists():
        time.sleep(0.02)


# A helper that leaves the process group, as wandb's service does.
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
keep("pids", [os.getpid(), helper.pid])
keep("args", {"argv": sys.argv, "environ": dict(os.environ)})
for other in range(int(os.environ["WORLD_SIZE"])):
    wait(here / f"pids-{other}.json")

if args.mode == "finish":
    helper.kill()
elif args.mode == "raise":
    if rank == 1:
        raise RuntimeError("the thing that went wrong")
    time.sleep(600)
elif args.mode == "die":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
elif args.mode == "refuse":
    helper.kill()
    print("train: no such key: train.stepz", file=sys.stderr)
    sys.exit(2)
elif args.mode == "stop":
    run.mkdir(parents=True, exist_ok=True)
    wait(run / "stop_request")
    keep("request", json.loads((run / "stop_request").read_text()))
    for other in range(int(os.environ["WORLD_SIZE"])):
        wait(here / f"request-{other}.json")
    helper.kill()
    if rank == 0:
        status = {"state": "cancelled", "requeue": False, "step": 7, "reason": "asked"}
        (run / "status.json").write_text(json.dumps(status))
    else:
        time.sleep(0.5)
    sys.exit(75)
elif args.mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    run.mkdir(parents=True, exist_ok=True)
    keep("ready", True)
    time.sleep(600)
