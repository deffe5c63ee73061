"""Nothing piles up in a run: no memory, no file handle, no process."""

from pathlib import Path

import pytest

from benchmarks.long import Watch, growth_mb
from tests.e2e.program import Program, save_config

pytestmark = pytest.mark.timeout(240)
# Allocators settle by 2 or 3 MB in 200 steps; one step's activations kept in each of them are more than 100.
GROWTH_MB = 8.0


def test_memory_handles_and_children_stay_as_they_are(tmp_path: Path) -> None:
    config = save_config(
        tmp_path,
        data={"workers": 2, "lanes": 8},
        train={"steps": 100_000, "global_batch": 16, "micro_batch": 8},
        eval={"every": 50},
        checkpoint={"every": 25},
    )
    program = Program(config, 2).start()
    try:
        watch = Watch(program, tmp_path / "runs/run")
        first, *others = (watch.at(step) for step in (60, 160, 260))
        left = watch.stop()
    finally:
        program.kill()
    for look in others:
        assert (look.handles, look.children) == (first.handles, first.children), (first, look)
    assert first.children == (2, 2)
    assert growth_mb(first, others[-1]) < GROWTH_MB
    assert left == []
