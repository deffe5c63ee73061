"""The whole program with every family: trained on two ranks, resumed, exported as a stock model, asked for a word."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlm_dist import checkpoint, distributed, export, fill_mask, train
from mlm_dist.checkpoint import Reader
from mlm_dist.config import load
from mlm_dist.inputs import Inputs
from mlm_dist.model.bert import build
from tests.e2e.program import losses, save_config
from tests.families import POSITIONS, SIZES, save_tokenizer_for
from tests.ranks import free_port, run_ranks

FAMILIES = ["roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]
AT_STAGE_3 = ["roberta", "modernbert"]
STEPS = 4


def save(folder: Path, model_type: str) -> Path:
    """A run config of a tiny model of that type with the kind of tokenizer that it has."""
    folder.mkdir()
    return save_config(
        folder,
        data={
            "tokenizer": str(save_tokenizer_for(model_type, folder / "its-tokenizer")),
            "packing": "best_fit",
            "workers": 0,
        },
        model={
            "config": {"model_type": model_type, "max_position_embeddings": POSITIONS, **SIZES[model_type]},
            "head_chunk": 16,  # the head is computed twice
        },
        mask={"strategy": "whole_word"},
        train={"steps": STEPS},
        checkpoint={"every": STEPS // 2},
        deepspeed={"config": "zero2"},
    )


def start(config: str, ports: list[int], *flags: str) -> None:
    """The program on this rank. Starts of one process save most of what a start takes."""
    os.environ["MASTER_PORT"] = str(ports.pop())
    assert train.main(["--config", config, *flags]) == 0
    if dist.is_initialized():
        distributed.shutdown()


def programs(configs: dict[str, str], ports: list[int]) -> dict[str, bool]:
    """On one rank: each run from its start to its end, then again from the checkpoint before the last. On rank 0, whether the two ended in the same weights."""
    same = {}
    for name, config in configs.items():
        start(config, ports)
        last = Path(config).parent / "runs/run/checkpoints" / checkpoint.name(STEPS)
        if os.environ["RANK"] != "0":
            start(config, ports)
            continue
        first = weights(last)
        shutil.rmtree(last)
        (last.parents[1] / "status.json").unlink()  # as if it had died
        start(config, ports)
        again = weights(last)
        same[name] = first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    for name in AT_STAGE_3:
        start(configs[name], ports, "--run.name", "stage3", "--deepspeed.config", "zero3")
    return same


def weights(path: Path) -> dict[str, torch.Tensor]:
    reader = Reader(path)
    return {name: reader.parameter(name) for name in reader.names()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    folder = tmp_path_factory.mktemp("families")
    configs = {name: str(save(folder / name, name)) for name in FAMILIES}
    ports = [free_port() for _ in range(2 * len(FAMILIES) + len(AT_STAGE_3))]
    same, _ = run_ranks("tests.e2e.test_families:programs", 2, {"configs": configs, "ports": ports}, timeout=300)
    return folder, same


def test_a_resumed_run_ends_in_the_same_weights(trained: tuple[Path, dict[str, bool]]) -> None:
    folder, same = trained
    assert same == dict.fromkeys(FAMILIES, True)
    for name in FAMILIES:
        assert sorted(losses(folder / name / "runs/run")) == list(range(1, STEPS + 1))


def test_stage_3_is_stage_2(trained: tuple[Path, dict[str, bool]]) -> None:
    for name in AT_STAGE_3:
        two, three = (losses(trained[0] / name / "runs" / run) for run in ("run", "stage3"))
        assert len(two) == STEPS and three == pytest.approx(two, abs=1e-5, rel=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_export_is_the_stock_model_to_the_bit(model_type: str, trained: tuple[Path, dict[str, bool]]) -> None:
    run = trained[0] / model_type / "runs/run"
    path = export.export(run)
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    assert model.config.model_type == model_type
    stored = dict(model.named_parameters())
    for name, value in weights(run / "checkpoints" / checkpoint.name(STEPS)).items():
        assert torch.equal(stored.pop(name), value), name
    assert not stored
    for init, place in (("pretrained", path), ("run", run)):
        config = ["--config", str(run.parents[1] / "run.yaml"), "--run.name", "more", "--model.config", "null"]
        inputs = Inputs(load([*config, "--model.init", init, "--model.name_or_path", str(place)]).config, 1)
        begun = dict(build(inputs.config.model, inputs.bert_config, seed=1).named_parameters())
        assert all(torch.equal(begun[name], value) for name, value in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = f"the {tokenizer.mask_token} of"
    (answers,) = fill_mask.fill(*fill_mask.load(str(path)), text, top=3)
    ids = tokenizer(text, return_tensors="pt")
    place = int((ids["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    best = model(**ids).logits[0, place, : len(tokenizer)].softmax(-1).topk(3)
    assert [word for word, _ in answers] == [tokenizer.decode([i]) for i in best.indices]
    assert [p for _, p in answers] == pytest.approx(best.values.tolist())
