"""The dry runs in docs/clusters.md are what the commands print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(
    r"^    \$ mlm-launch (.* --dry-run)\n((?:    .+\n)+)", (ROOT / "docs/clusters.md").read_text(), re.MULTILINE
)


def test_every_launcher_is_shown() -> None:
    assert [command.split()[0] for command, _ in SHOWN] == ["local", "hosts", "hosts", "slurm"]


@pytest.mark.parametrize(("command", "output"), SHOWN)
def test_dry_runs_in_the_docs(command: str, output: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {manifest: none.json}\n")
    (tmp_path / "hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    env = {"PATH": "/opt/mlm/bin:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
    start = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from launcher.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", start, *shlex.split(command)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    places = {
        sys.executable: "/opt/mlm/bin/python",
        str(ROOT): "/opt/mlm/mlm_dist",
        os.path.realpath(tmp_path): "/data/job",
    }
    printed = done.stdout
    for here, there in places.items():
        printed = printed.replace(here, there)
    assert re.sub(r"eyJ\S+", "eyJjd2Qi...", printed) == re.sub("^    ", "", output, flags=re.MULTILINE)
