"""One attempt at reading the output of a command."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Generator
from typing import Any

from mlm_dist.storage.readers import PIECE, SPAN, Failed, too_early

PIPE = "pipe:"


class PipeReader:
    """The output of shell commands, ``pipe:COMMAND``, through webdataset: nothing can seek in it, so it is read whole.

    Args:
        timeout: Seconds to wait for each `SPAN` of output; then the command and what it started are killed.
    """

    concurrent = True

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    def read(self, path: str, offset: int, length: int) -> bytes:
        assert offset == 0, "the output of a command is one block"
        parts = []
        for part in self.pieces(path, 0, length + 1):
            parts.append(part)
            length -= len(part)
            if length < 0:
                raise Failed("the command gives more bytes than the manifest says")
        if length:
            raise too_early(length)
        return b"".join(parts)

    def pieces(self, path: str, offset: int, end: int) -> Generator[bytes, None, None]:
        """All output, or a little more than ``end`` bytes of it; a command that has not ended by itself by then is killed."""
        assert offset == 0, "nothing can seek in the output of a command"
        from webdataset.gopen import Pipe

        # A session of its own, so that a whole pipeline can be killed; no standard input, which is the run's.
        try:
            pipe = Pipe(
                path.removeprefix(PIPE),
                mode="rb",
                shell=True,
                bufsize=0,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                timeout=self.timeout,
            )
        except OSError as error:  # too long, or no process to be had
            raise Failed(f"the command cannot be started: {error.strerror}") from error
        clean = False
        try:
            clean = yield from self._output(pipe, end)
        finally:
            if not clean:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pipe.proc.pid, signal.SIGKILL)
            pipe.proc.wait()
            pipe.stream.close()

    def _output(self, pipe: Any, end: int) -> Generator[bytes, None, bool]:
        """Yield output and return whether the command came to its end."""
        poll = select.poll()
        poll.register(pipe.stream, select.POLLIN)
        done, left = 0, self.timeout
        while done < end:
            before = time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Failed(f"the command gave {done} bytes and not the rest in {self.timeout:g} s")
            left -= time.monotonic() - before
            try:
                part = pipe.read(PIECE)
            except OSError as error:  # the command has ended badly
                raise _bad_end(pipe.proc.returncode) from error
            if not part:
                break
            left = self.timeout if (done + len(part)) // SPAN > done // SPAN else left
            done += len(part)
            yield part
        else:
            return False
        try:
            status = pipe.proc.wait(max(left, 0.0))
        except subprocess.TimeoutExpired:
            raise Failed(f"the command closed its output and did not end in {self.timeout:g} s") from None
        if status:
            raise _bad_end(status)
        return True

    def stat(self, path: str) -> tuple[int, str]:
        raise Failed("the length of a command's output is known only when it has run", again=False)

    def forget(self, path: str) -> None:
        pass


def _bad_end(status: int) -> Failed:
    return Failed(
        f"the command was killed by signal {-status}" if status < 0 else f"the command ended with exit status {status}"
    )
