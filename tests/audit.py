"""Known vulnerabilities in the packages of constraints.txt, by pip-audit: reported, and never a failure.

    python -m tests.audit

An advisory of last night must not stop a change that has nothing to do with it, and many come before there is a release to move to. And pip-audit alone
would say "No known vulnerabilities found" where the service knows none of the packages, as behind a mirror without advisories.
"""

import json
import subprocess
import sys
from typing import Any

from tests.ranks import ROOT


def lines(found: dict[str, Any]) -> list[str]:
    """What to say of pip-audit's JSON."""
    packages = found["dependencies"]
    checked = [package for package in packages if "vulns" in package]
    out = [
        f"audit: {package['name']} {package['version']}: {vuln['id']}, fixed in {', '.join(vuln['fix_versions']) or 'no release'}"
        for package in checked
        for vuln in package["vulns"]
    ]
    return [
        *out,
        f"audit: {len(out)} known vulnerabilities in {len(checked)} of {len(packages)} packages; the others could not be checked",
    ]


def main() -> int:
    """Report; returns 0."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", "constraints.txt", "--no-deps", "--disable-pip"]
    options = ["--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        print("\n".join(lines(json.loads(done.stdout))))
    except ValueError:  # nothing came
        last = done.stderr.strip().splitlines() or [f"pip-audit ended with exit code {done.returncode}"]
        print(f"audit: nothing was checked: the advisory service cannot be reached ({last[-1][:300]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
