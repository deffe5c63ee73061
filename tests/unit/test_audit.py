"""`make audit` says what it found, and how much it could look at; it stops nothing."""

import os
import subprocess
import sys

from tests.audit import lines
from tests.ranks import ROOT


def test_what_is_found_and_what_could_not_be_checked_is_said() -> None:
    found = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1", "2.0"]}]},
            {"name": "b", "version": "2.0", "vulns": [{"id": "GHSA-2", "fix_versions": []}]},
            {"name": "c", "version": "3.0", "vulns": []},
            {"name": "d", "skip_reason": "Dependency not found on PyPI"},
        ]
    }
    assert lines(found) == [
        "audit: a 1.0: PYSEC-1, fixed in 1.1, 2.0",
        "audit: b 2.0: GHSA-2, fixed in no release",
        "audit: 2 known vulnerabilities in 3 of 4 packages; the others could not be checked",
    ]


def test_without_a_network_it_says_so_and_succeeds() -> None:
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}
    env = {**os.environ, **nowhere, "no_proxy": ""}
    done = subprocess.run([sys.executable, "-m", "tests.audit"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("audit: nothing was checked: the advisory service cannot be reached (")
