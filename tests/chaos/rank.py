"""The program as the chaos runs start it: with numbers that go wrong (tests.e2e.faulty), a pause in each step, and a note of every row that it is given.

The notes go to MLM_TEST_ROWS/ATTEMPT-RANK.jsonl: {step, rows: {number in the run: digest}}.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mlm_dist.data.stream import Batch
from mlm_dist.feed import Feeder
from tests.e2e import faulty

ROWS = "MLM_TEST_ROWS"
PAUSE = "MLM_TEST_PAUSE"


def digests(batch: Batch) -> dict[int, str]:
    """Of each live row, by its number in the run: ids, segments and labels."""
    out = {}
    for i in range(len(batch.rows)):
        if batch.live[i]:
            row = batch.rows.slice(i, i + 1)
            parts = (row.ids, row.segment_lengths, row.positions, row.labels)
            out[int(batch.index[i])] = hashlib.sha256(
                b"|".join(part.astype("<u4").tobytes() for part in parts)
            ).hexdigest()[:16]
    return out


def main() -> int:
    folder = Path(os.environ[ROWS])
    folder.mkdir(parents=True, exist_ok=True)
    # The order of the files is that of the attempts.
    notes = (folder / f"{time.time_ns()}-{os.environ['RANK']}.jsonl").open("w", buffering=1)
    take = Feeder.__next__

    def noted(self: Feeder) -> Any:
        batch, micro_batches = take(self)
        notes.write(json.dumps({"step": batch.step, "rows": digests(batch)}) + "\n")
        time.sleep(float(os.environ.get(PAUSE, "0")))
        return batch, micro_batches

    Feeder.__next__ = noted  # type: ignore[method-assign]
    return faulty.main()


if __name__ == "__main__":
    sys.exit(main())
