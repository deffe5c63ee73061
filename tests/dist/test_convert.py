"""A training goes from a plain DeepSpeed script to this program and back, and nothing of it is lost."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_dist import checkpoint
from mlm_dist.branch import Base
from mlm_dist.cli import main
from mlm_dist.config import load
from mlm_dist.inputs import Inputs
from mlm_dist.model import from_run
from tests.dist.deepspeed_script import KEYS, save_batches
from tests.e2e.program import Program, losses, save_config
from tests.forked import run_forked

pytestmark = pytest.mark.timeout(800)
SCRIPT = "tests.dist.deepspeed_script:run"
# The script trains so many steps before it saves.
BEFORE, STEPS = 4, 12
# (stage, precision, whether the model is wrapped) of what is taken over.
SAVED = [
    *((stage, "fp32", False) for stage in range(4)),
    (0, "bf16", False),
    (1, "bf16", False),
    (2, "bf16", False),
    (3, "bf16", True),
]
CONTINUED = (2, "fp32", False)


def name(case: tuple[int, str, bool]) -> str:
    return "-".join(map(str, case))


def rows(stream: Any, batch: Any) -> dict[str, torch.Tensor]:
    """A whole batch of the stream as the script takes it."""
    (micro,) = stream.collate(batch)
    labels = torch.full(micro["input_ids"].shape, -100)
    labels.view(-1)[micro["selected"]] = micro["labels"]
    return {**{key: micro[key] for key in ("input_ids", "position_ids", "segment_ids")}, "labels": labels}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_config(
        tmp_path_factory.mktemp("convert"),
        model={"hidden_dropout": 0.0, "attention_dropout": 0.0},
        train={"steps": STEPS, "clip": 1.0},
        optim={"schedule": "constant", "warmup": 0, "weight_decay": 0.01},
        checkpoint={"every": 1, "keep": 100},
    )


@pytest.fixture(scope="module")
def data(config: Path) -> str:
    """Batches by step: those of the stream from its start, and at the step where this program takes over the start again."""
    inputs = Inputs(load(["--config", str(config)]).config, 1)
    stream = inputs.stream(0, 1)
    stream.micro_batch = 12
    batches = {}
    for start, stop in ((0, BEFORE), (BEFORE, STEPS)):
        for step, batch in zip(range(start, stop), stream.batches(start), strict=False):
            batches[step] = rows(stream, batch)
    values = inputs.bert_config.to_diff_dict() | {"attn_implementation": "eager"}
    return save_batches(config.parent / "batches.pt", values, batches)


@pytest.fixture(scope="module")
def script(config: Path, data: str) -> dict[tuple[int, str, bool], dict[str, Any]]:
    """What the script did on 3 ranks, which cut no parameter evenly, by case, with a checkpoint of each in the folder of its name."""
    jobs = [
        {
            "data": data,
            "stage": case[0],
            "precision": case[1],
            "wrap": case[2],
            "save": str(config.parent / name(case)),
            "steps": list(range(2 * BEFORE)),
        }
        for case in SAVED
    ]
    (ranks,) = run_forked(SCRIPT, [(3, {"jobs": jobs})], timeout=380)
    return dict(zip(SAVED, ranks[0], strict=True))


def convert(config: Path, case: tuple[int, str, bool], *flags: str) -> checkpoint.Reader:
    """Takes the script's checkpoint over; the run has its name."""
    source = str(config.parent / name(case))
    words = ["checkpoint", "convert", source, "--from", "deepspeed", "--config", str(config)]
    assert main([*words, "--run.name", name(case), *flags]) == 0
    found = checkpoint.newest(config.parent / "runs" / name(case))
    assert found is not None
    return checkpoint.Reader(found)


@pytest.mark.parametrize("case", SAVED, ids=name)
def test_weights_moments_and_step_are_the_scripts(
    case: tuple[int, str, bool], config: Path, script: dict[tuple[int, str, bool], dict[str, Any]]
) -> None:
    reader = convert(config, case)
    state = dict(script[case]["state"])
    # At stage 0 the blocks for low precision begin with a step on gradients of zero, which Adam counts.
    assert (reader.step, reader.optimizer["step"]) == (BEFORE, BEFORE + (case[:2] == (0, "bf16")))
    assert [g["weight_decay"] for g in reader.optimizer["groups"]] == [0.01, 0.0]
    if not state:  # stage 0 in low precision: as near to the fp32 script as that precision is
        state = {n: v[:1] for n, v in script[0, "fp32", False]["state"].items() if n != "step"}
        assert all(torch.allclose(reader.parameter(n), v[0], atol=6e-3) for n, v in state.items())
        assert not all(torch.equal(reader.parameter(n), reader.parameter(n).bfloat16().float()) for n in state)
        return
    assert set(state.pop("step")) == {BEFORE}
    names = {their.removeprefix("inner."): their for their in state}
    assert sorted(names) == reader.names()
    for our, their in names.items():
        held = [reader.parameter(our), *(reader.state(key, our) for key in KEYS)]
        assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(held, state[their], strict=True)), our


def test_the_program_goes_on_as_the_script_and_the_script_as_the_program(
    config: Path, data: str, script: dict[tuple[int, str, bool], dict[str, Any]]
) -> None:
    run = config.parent / "runs" / name(CONTINUED)
    if not run.exists():
        convert(config, CONTINUED)
    Program(config, 2, ["--run.name", run.name, "--deepspeed.config", "zero3"]).start().finish(300)
    ours = losses(run)
    assert sorted(ours) == list(range(BEFORE + 1, STEPS + 1))
    theirs = script[CONTINUED]["losses"]
    assert [ours[BEFORE + 1 + i] for i in range(BEFORE)] == pytest.approx(theirs, abs=1e-5, rel=0)

    back = 2 * BEFORE
    source, dest = run / "checkpoints" / checkpoint.name(back), config.parent / "universal"
    assert main(["checkpoint", "convert", str(source), str(dest), "--to", "deepspeed"]) == 0
    wrapped = str(config.parent / "universal-wrapped")
    assert main(["checkpoint", "convert", str(source), wrapped, "--to", "deepspeed", "--prefix", "inner."]) == 0
    jobs: list[dict[str, Any]] = [{"stage": 1, "load": str(dest)}, {"stage": 2, "load": wrapped, "wrap": True}]
    jobs = [{"data": data, "steps": list(range(back, STEPS)), **job} for job in [*jobs, {"stage": 3, "load": str(dest)}]]
    (ranks,) = run_forked(SCRIPT, [(2, {"jobs": jobs})], timeout=300)
    reader = checkpoint.Reader(source)
    for stage, result in zip((1, 2, 3), ranks[0], strict=True):
        assert set(result["state"].pop("step")) == {back}
        state = {n.removeprefix("inner."): values for n, values in result["state"].items()}
        assert sorted(state) == reader.names()
        for n, values in state.items():
            held = [reader.parameter(n), *(reader.state(key, n) for key in KEYS)]
            assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(held, values, strict=True)), (stage, n)
        got = [ours[step + 1] for step in range(back, STEPS)]
        assert result["losses"] == pytest.approx(got, abs=1e-5, rel=0), stage


def test_other_runs_branch_off_and_take_the_weights(
    config: Path, script: dict[tuple[int, str, bool], dict[str, Any]], tmp_path: Path
) -> None:
    case = (3, "fp32", False)
    reader = convert(config, case, "--run.dir", str(tmp_path))
    run = str(tmp_path / name(case))
    branched = load(["--config", str(config), "--run.branch_from", run]).config
    inputs = Inputs(branched, 1)
    base = Base(run, print)
    base.check_identity(
        json.loads(json.dumps(branched.identity(inputs.fingerprints(), inputs.tokenizer.fingerprint)))
    )
    base.check_rate(BEFORE / STEPS, branched.optim.lr, branched.optim, [])
    model = from_run.load(run, inputs.bert_config)
    assert all(torch.equal(value, reader.parameter(n)) for n, value in model.named_parameters())


def test_refused_with_what_is_wrong(
    config: Path,
    script: dict[tuple[int, str, bool], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    case, new = str(config.parent / name(CONTINUED)), ["--run.dir", str(tmp_path / "runs")]
    words = ["checkpoint", "convert", case, "--from", "deepspeed", "--config", str(config)]

    def refused(*flags: str) -> str:
        assert main([*words, *new, *flags]) == 2
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().err

    assert "train.steps: 3 are over at step 4" in refused("--train.steps", "3")
    sizes = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "max_position_embeddings": 32}'
    assert "bert.encoder.layer.1.attention.self.query.weight" in refused("--model.config", sizes)
    assert "it has global_step4" in refused("--tag", "other")
    assert "optim.name" in refused("--optim.name", "lamb", "--deepspeed.config", "zero0")


class Executed:
    """A pickle that does something when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_what_a_file_says_is_not_executed(
    config: Path,
    script: dict[tuple[int, str, bool], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    folder = tmp_path / "global_step4"
    folder.mkdir()
    for path in (config.parent / name(CONTINUED) / "global_step4").glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    target, mark = folder / "mp_rank_00_model_states.pt", tmp_path / "executed"
    content = torch.load(target)
    # What a script in fp16 saves, which no CPU trains.
    optim = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    scaled = torch.load(optim, weights_only=False)
    scaled["optimizer_state_dict"]["loss_scaler"] = DynamicLossScaler(2.0**16, 1000, 1, 1, False)
    torch.save(scaled, optim)
    words = ["checkpoint", "convert", str(folder), "--from", "deepspeed", "--config", str(config)]
    assert main([*words, "--run.dir", str(tmp_path / "scaled")]) == 0
    words += ["--run.dir", str(tmp_path / "runs")]
    torch.save({**content, "client": Executed(mark)}, target)
    assert main(words) == 2
    assert "--trust-pickle" in capsys.readouterr().err
    assert not mark.exists()
    target.write_bytes(pickle.dumps(Executed(mark)))
    assert main(words) == 2 and not mark.exists()
    torch.save({**content, "client": Executed(mark)}, target)
    assert main([*words, "--trust-pickle", "--step", "2"]) == 0
    assert mark.exists()
    found = checkpoint.newest(tmp_path / "runs" / "run")
    assert found is not None and (checkpoint.Reader(found).step, checkpoint.Reader(found).optimizer["step"]) == (2, 4)
    assert main([*words, "--trust-pickle"]) == 2
    assert "is a run already" in capsys.readouterr().err
