"""Hosts without ssh: a `pdsh` for PATH whose commands are run by the test's own process, out of the launcher's reach."""

import json
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

# As the real one: joins its arguments by spaces, puts each host's number for %n and % for %%, waits for all hosts and
# returns the largest code. A shell on the host reads the result.
PDSH = """#!{python} -S
import getopt, json, os, re, sys, time
here = {here!r}
flags, words = getopt.getopt(sys.argv[1:], "SNf:w:")
flags = dict(flags)
hosts = flags["-w"].split(",")
for n, host in enumerate(hosts):
    if os.path.exists(code := os.path.join(here, host + ".code")):
        os.remove(code)
    line = re.sub("%(.)", lambda m: dict(n=str(n), h=host).get(m[1], m[1]), " ".join(words))
    part = os.path.join(here, "." + host)
    with open(part, "w") as f:
        json.dump([sys.argv, os.environ["PDSH_SSH_ARGS_APPEND"], line], f)
    os.rename(part, os.path.join(here, host + ".asked"))
codes = []
for host in hosts:
    path = os.path.join(here, host + ".code")
    while not os.path.exists(path):
        time.sleep(0.05)
    codes.append(int(open(path).read()))
    sys.stdout.buffer.write(open(os.path.join(here, host + ".out"), "rb").read())
sys.exit(max(codes))
"""


class FakeHosts:
    """Hosts whose commands come by the `pdsh` in the directory `bin`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name, text in (("pdsh", PDSH.format(python=sys.executable, here=str(folder))), ("ssh", "#!/bin/false\n")):
            path = self.bin / name
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.shells: list[subprocess.Popen[bytes]] = []
        self.asked: dict[str, tuple[list[str], str, str]] = {}  # by host: pdsh's argv, ssh's arguments, the command
        self.deaf = False  # say that all went well, and do nothing
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        running: dict[str, subprocess.Popen[bytes]] = {}
        while not self._end.is_set():
            for path in self.folder.glob("*.asked"):
                self.asked[path.stem] = tuple(json.loads(path.read_text()))
                path.unlink()
                with (self.folder / f"{path.stem}.out").open("wb") as out:
                    # What ssh would give: little of an environment, and another directory.
                    shell = subprocess.Popen(
                        ["sh", "-c", ":" if self.deaf else self.asked[path.stem][2]],
                        env={"PATH": os.defpath, "HOME": str(self.folder)},
                        cwd="/",
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                    )
                running[path.stem] = shell
                self.shells.append(shell)
            for host, shell in list(running.items()):
                if (code := shell.poll()) is not None:
                    part = self.folder / f".{host}.code"
                    part.write_text(str(128 - code if code < 0 else code))
                    part.rename(self.folder / f"{host}.code")
                    del running[host]
            time.sleep(0.02)

    def close(self) -> None:
        """Ends them."""
        self._end.set()
        self._thread.join()
        for shell in self.shells:
            shell.kill()
            shell.wait()
