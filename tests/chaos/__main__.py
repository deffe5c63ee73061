"""``python -m tests.chaos``: a long schedule of troubles, and at the end the comparison."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.chaos import Chaos
from tests.chaos.schedule import schedule


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--events", type=int, default=24, help="how many (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), schedule(args.seed, args.events), lambda line: print(line, flush=True))
        chaos.play()
        print(chaos.compare())
    return 0


if __name__ == "__main__":
    sys.exit(main())
