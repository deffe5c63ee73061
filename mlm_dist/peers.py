"""Which ranks are gone without a word: a connection that breaks does not say whose end it was, nor why."""

import os
import socket
import time

from mlm_dist.distributed import ControlGroup
from mlm_dist.lifecycle import same_process, started_at

# The connections of a process that is killed close a little before it counts as dead.
LOOK_S = 1.0


class Peers:
    """The other ranks of this host, by their processes. Collective."""

    def __init__(self, control: ControlGroup) -> None:
        host, pid = socket.gethostname(), os.getpid()
        everyone = control.broadcast(control.gather((host, pid, started_at(pid))))
        self._here = {
            rank: (pid, started)
            for rank, (where, pid, started) in enumerate(everyone)
            # Containers can have one name and process numbers of their own.
            if where == host and rank != control.rank and same_process(pid, started)
        }

    def gone(self) -> str:
        """The ranks of this host whose process has ended, in words; empty when there are none."""
        deadline = time.monotonic() + LOOK_S
        while True:
            gone = [rank for rank, process in self._here.items() if not same_process(*process)]
            if gone:
                ranks = ", ".join(f"{rank} (process {self._here[rank][0]})" for rank in gone)
                plural = len(gone) > 1
                return (
                    f"rank{'s' * plural} {ranks} {'are' if plural else 'is'} gone without a word, "
                    "as after a SIGKILL; the kernel sends it when memory runs out, and says so in its log (dmesg)"
                )
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.05)
