"""How a rank leaves: what it says of a user's mistake, and an end that waits for nobody."""

import multiprocessing
import os
import sys
import time

from mlm_dist.errors import UserError
from mlm_dist.redact import redact

# Ranks other than the first give it this long to show an error that all of them have, before they show it themselves.
OTHERS_WAIT_S = 5.0


def leave(code: int) -> None:
    """End this process without the usual tidying, which would wait for ranks that are gone."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report_user_error(error: UserError | str) -> None:
    """Print it, on rank 0 at once: the launcher ends the others while they give it time, so the same mistake is shown once."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_S)
    print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
