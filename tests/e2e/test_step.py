"""The program's choices of attention, head and compilation: refused before the start, or the same on all ranks."""

from pathlib import Path
from typing import Any

import pytest

from mlm_dist.config import load
from mlm_dist.errors import UserError
from mlm_dist.inputs import Inputs
from tests.e2e.program import losses, save_config
from tests.ranks import run_ranks

PLAIN = {"attention_dropout": 0.0, "hidden_dropout": 0.0}


def test_a_compiled_run_is_the_plain_run_and_no_rank_compiles_alone(tmp_path: Path) -> None:
    config = save_config(tmp_path, model=PLAIN | {"compile": True}, train={"steps": 3})

    def run(name: str, template: str, breaks_on: list[int]) -> tuple[list[list[str]], dict[int, float]]:
        flags = ["--run.name", name, "--deepspeed.config", template]
        args: dict[str, Any] = {"config": str(config), "flags": flags, "breaks_on": breaks_on}
        warnings = run_ranks("tests.dist.step_cases:program", 2, args, timeout=200)
        return warnings, losses(tmp_path / "runs" / name)

    warnings, compiled = run("compiled", "zero3", [])
    assert warnings == [[], []]
    ((warning,), nothing), plain = run("plain", "zero1", [1])
    assert warning.startswith("warning: model.compile: the encoder layers run uncompiled, on all ranks (rank 1: ")
    assert nothing == []
    assert len(plain) == 3
    assert compiled == pytest.approx(plain, abs=1e-5, rel=0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"attention": "varlen"}}, r"model\.attention: 'varlen' is not possible: there is no CUDA device"),
        ({"model": {"head": "liger"}}, r"model\.head: 'liger' has kernels for CUDA only"),
        ({"model": {"head": "fused"}}, r"model\.head: 'fused' is wrong; it must be one of torch, liger"),
        ({"model": {"head_chunk": 0}}, r"model\.head_chunk: 0 must be at least 1"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = save_config(tmp_path, **sections)
    with pytest.raises(UserError, match=message):
        Inputs(load(["--config", str(config)]).config, world_size=1)


def test_compiling_unpacked_rows_says_what_it_costs(tmp_path: Path) -> None:
    for packing, count in (("none", 1), ("split", 0)):
        config = save_config(tmp_path, model={"compile": True}, data={"packing": packing})
        notes = Inputs(load(["--config", str(config)]).config, world_size=1).notes
        assert sum("model.compile fills every micro-batch" in note for note in notes) == count


def test_fp16_on_a_cpu_is_said_to_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for precision, count in (("fp16", 1), ("bf16", 0)):
        config = save_config(tmp_path, train={"precision": precision})
        notes = Inputs(load(["--config", str(config)]).config, world_size=2).notes
        assert sum("most CPUs emulate fp16" in note for note in notes) == count
