"""The stream as transformers' Trainer and DataLoader loops see it: the run's rows, each once, in order, and the same after a stop."""

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments, set_seed

from mlm_dist.config import load
from mlm_dist.data.torch_dataset import IGNORED, MaskedLanguageDataset, masked_lm_loss
from mlm_dist.errors import UserError
from mlm_dist.inputs import DataInputs
from mlm_dist.ledger import DataLoss
from mlm_dist.model.head import MaskedLM
from tests.corpora import documents, save_corpus, save_tokenizer
from tests.ranks import ROOT, run_ranks

BATCH, STEPS, WIDTH = 8, 6, 32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run config of STEPS batches of BATCH rows over a small corpus."""
    root = tmp_path_factory.mktemp("run")
    config = {
        "data": {
            "manifest": str(save_corpus(root, documents(120))),
            "val_manifest": str(save_corpus(root, documents(20, seed=1), name="val.json")),
            "tokenizer": str(save_tokenizer(root / "tokenizer")),
            "tokenizer_backend": "hf",
            "seq_len": WIDTH,
            "lanes": 5,
            "workers": 0,
        },
        "train": {"steps": STEPS, "global_batch": BATCH, "micro_batch": BATCH},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return str(root / "run.yaml")


def epochs(number: int) -> dict[str, Any]:
    return {"train.steps": None, "train.epochs": number}


def model() -> BertForMaskedLM:
    set_seed(3)
    config = BertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=WIDTH,
        initializer_range=0.1,  # scores so large that a document seen by another would show
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def stream_rows(recipe: str, overrides: dict[str, Any], batches: int) -> list[dict[str, torch.Tensor]]:
    """The live rows of the first batches as mlm_dist's own program gets them, one dict a row."""
    flags = [f"--{key}={'null' if value is None else value}" for key, value in overrides.items()]
    stream = DataInputs(load(["--config", recipe, *flags]).config).stream(0, 1)
    found = []
    for batch, _ in zip(stream.batches(), range(batches), strict=False):
        for i in range(len(batch.rows)):
            if batch.live[i]:
                found.append(batch.rows.slice(i, i + 1).collate(0, multiple=WIDTH))
    return found


def same(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """A row [S] of the dataset is the row [1, S] of the stream."""
    labels = torch.full((WIDTH,), IGNORED)
    labels[wanted["selected"]] = wanted["labels"]
    assert torch.equal(given["labels"], labels)
    assert torch.equal(given["input_ids"], wanted["input_ids"][0])
    assert torch.equal(given["position_ids"], wanted["position_ids"][0])
    segments = wanted["segment_ids"][0]
    if given["attention_mask"].dim() == 1:
        assert torch.equal(given["attention_mask"], (segments > 0).long())
    else:
        assert torch.equal(given["attention_mask"][0] == 0, segments[:, None] == segments[None, :])


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("packing", ["none", "split", "best_fit"])
@pytest.mark.parametrize(("loader_workers", "data_workers"), [(0, 0), (1, 3), (0, 2)])
def test_a_loader_gives_the_rows_of_the_run_in_order(
    recipe: str, packing: str, loader_workers: int, data_workers: int
) -> None:
    overrides = {"data.packing": packing, "data.workers": data_workers, **epochs(2)}
    dataset = MaskedLanguageDataset.from_config(recipe, overrides)
    loader = DataLoader(dataset, batch_size=7, num_workers=loader_workers)
    given = [{key: part[i] for key, part in batch.items()} for batch in loader for i in range(len(batch["labels"]))]
    wanted = stream_rows(recipe, overrides | {"data.workers": 0}, 1000)
    assert len(given) == len(wanted) > 300
    for one, other in zip(given, wanted, strict=True):
        same(one, other)


def test_a_run_of_steps_has_a_length_and_one_of_epochs_has_none(recipe: str) -> None:
    dataset = MaskedLanguageDataset.from_config(recipe)
    assert len(dataset) == STEPS * BATCH == len(list(dataset))
    assert len(DataLoader(dataset, batch_size=BATCH)) == STEPS
    with pytest.raises(TypeError, match="no length"):
        len(MaskedLanguageDataset.from_config(recipe, epochs(1)))


def originals(rows: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    """The token ids of each row before masking."""
    return [torch.where(row["labels"] == IGNORED, row["input_ids"], row["labels"]).tolist() for row in rows]


def test_the_next_iteration_goes_on(recipe: str) -> None:
    twice = list(MaskedLanguageDataset.from_config(recipe, {"train.steps": 2 * STEPS}))
    dataset = MaskedLanguageDataset.from_config(recipe)
    next(iter(dataset))  # a look, given up: the next begins at the beginning
    parts = list(dataset), list(dataset)
    assert [len(part) for part in parts] == [STEPS * BATCH] * 2
    assert all(map(equal, parts[0] + parts[1], twice))
    thrice = list(MaskedLanguageDataset.from_config(recipe, {"train.steps": 3 * STEPS}))
    fresh = MaskedLanguageDataset.from_config(recipe)
    fresh.load_state_dict(dataset.state_dict())
    assert all(map(equal, list(fresh), thrice[2 * STEPS * BATCH :]))


def test_the_next_iteration_of_epochs_is_further_epochs(recipe: str) -> None:
    dataset = MaskedLanguageDataset.from_config(recipe, epochs(1) | {"data.packing": "none"})
    first, second = list(dataset), list(dataset)
    assert sorted(originals(first)) == sorted(originals(second)) and originals(first) != originals(second)
    masks = [
        {
            (*one, *row["labels"].tolist())
            for one, row in zip(originals(part), part, strict=True)
            if (row["labels"] != IGNORED).sum() > 3  # of fewer places, the same may be masked by chance
        }
        for part in (first, second)
    ]
    assert not masks[0] & masks[1]


def refused(loader: DataLoader, match: str) -> None:
    """The loader's workers raise a UserError."""
    rows = iter(loader)
    with pytest.raises(UserError, match=match):
        next(rows)
    for process in rows._workers:
        process.kill()  # torch waits 5 s for each that has raised
    with contextlib.suppress(RuntimeError):  # it may say that they were killed
        rows._shutdown_workers()


def test_an_iteration_that_would_repeat_rows_is_refused(recipe: str) -> None:
    behind_a_worker = DataLoader(MaskedLanguageDataset.from_config(recipe), batch_size=BATCH, num_workers=1)
    assert len(list(behind_a_worker)) == STEPS
    refused(behind_a_worker, r"iteration 1 .* train\.steps")
    later = MaskedLanguageDataset.from_config(recipe)
    later.set_epoch(2)  # as a trainer does that goes on in its third epoch
    with pytest.raises(UserError, match="iteration 2"):
        next(iter(later))


def test_validation_rows_are_the_same_each_time(recipe: str) -> None:
    dataset = MaskedLanguageDataset.from_config(recipe, validation=True)
    once = list(dataset)
    assert [row["input_ids"].tolist() for row in once] != [
        row["input_ids"].tolist() for row in MaskedLanguageDataset.from_config(recipe)
    ]
    for workers in (0, 0, 1, 1):
        dataset.set_epoch(3)
        again = list(DataLoader(dataset, batch_size=None, num_workers=workers))
        assert len(once) == len(again) > 20 and all(map(equal, once, again))


@pytest.mark.parametrize("overrides", [{}, epochs(1), {"data.packing": "none", "data.workers": 2}])
def test_a_state_goes_on_at_any_row(recipe: str, overrides: dict[str, Any]) -> None:
    whole = list(MaskedLanguageDataset.from_config(recipe, overrides))
    dataset = MaskedLanguageDataset.from_config(recipe, overrides)
    states, rows = [dataset.state_dict()], iter(dataset)
    for _ in whole:
        next(rows)
        states.append(dataset.state_dict())
    fresh = MaskedLanguageDataset.from_config(recipe, overrides | {"data.workers": 0})
    for cut in (0, 1, 7, 8, 9, 30, len(whole) - 1, len(whole)):
        fresh.load_state_dict(yaml.safe_load(yaml.safe_dump(states[cut])))
        assert fresh.state_dict() == states[cut]
        rest = list(fresh)
        assert len(rest) == len(whole) - cut and all(map(equal, rest, whole[cut:]))


def test_a_state_goes_on_behind_a_worker_once(recipe: str) -> None:
    whole = list(MaskedLanguageDataset.from_config(recipe))
    dataset = MaskedLanguageDataset.from_config(recipe)
    rows = iter(dataset)
    for _ in range(20):
        next(rows)
    fresh = MaskedLanguageDataset.from_config(recipe)
    fresh.load_state_dict(dataset.state_dict())
    rest = list(DataLoader(fresh, batch_size=None, num_workers=1))
    assert len(rest) == len(whole) - 20 and all(map(equal, rest, whole[20:]))
    with pytest.raises(UserError, match="a worker of a DataLoader reads"):
        fresh.state_dict()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [({"run.seed": 9}, "run.seed"), ({"data.packing": "none"}, "data.packing"), ({"mask.rate": 0.2}, "mask.rate")],
)
def test_a_state_of_other_rows_is_refused(recipe: str, overrides: dict[str, Any], key: str) -> None:
    state = MaskedLanguageDataset.from_config(recipe, overrides).state_dict()
    with pytest.raises(UserError, match=re.escape(key)):
        MaskedLanguageDataset.from_config(recipe).load_state_dict(state)


def test_several_workers_of_a_loader_are_refused(recipe: str) -> None:
    refused(DataLoader(MaskedLanguageDataset.from_config(recipe), batch_size=BATCH, num_workers=2), r"data\.workers")


def test_what_is_lost_is_told_and_stays_lost(recipe: str, tmp_path: Path) -> None:
    manifest = save_corpus(tmp_path, documents(40), shards=1)
    shard = tmp_path / "manifest-00000.tar"
    good = shard.read_bytes()
    shard.write_bytes(good[:600] + b"\xff" + good[601:])
    overrides = {"data.manifest": str(manifest), "data.lanes": 2, "data.max_bad_fraction": 0.5, **epochs(1)}
    dataset = MaskedLanguageDataset.from_config(recipe, overrides)
    with pytest.warns(UserWarning, match=r"4 document\(s\) lost in manifest-00000\.tar at byte 0"):
        damaged = list(dataset)
    state = dataset.state_dict()
    assert [fault["documents"] for fault in state["lost"]] == [4]
    shard.write_bytes(good)
    assert len(list(MaskedLanguageDataset.from_config(recipe, overrides))) > len(damaged)
    fresh = MaskedLanguageDataset.from_config(recipe, overrides)
    fresh.load_state_dict(state | {"step": 0, "row": 0, "given": 0, "ended": False, "cursors": [[0, 0, 0]] * 2})
    assert len(list(fresh)) == len(damaged)
    shard.write_bytes(good[:600] + b"\xff" + good[601:])
    with pytest.raises(DataLoss, match="4 of 40"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(MaskedLanguageDataset.from_config(recipe, overrides | {"data.max_bad_fraction": 0.05}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"data.packing": "none"},
        {"data.packing": "split"},
        {"data.packing": "best_fit"},
        {"data.packing": "none", "mask.labels": "all_with_padding"},
    ],
)
def test_stock_bert_gives_the_loss_of_the_library(recipe: str, overrides: dict[str, Any], attention: str) -> None:
    bert = model().eval()
    bert.set_attn_implementation(attention)
    batch = next(iter(DataLoader(MaskedLanguageDataset.from_config(recipe, overrides), batch_size=BATCH)))
    stream = DataInputs(
        load(["--config", recipe, *[f"--{key}={value}" for key, value in overrides.items()]]).config
    ).stream(0, 1)
    own = next(stream.batches())
    (micro,) = stream.collate(own)
    with torch.no_grad():
        total, _ = MaskedLM(bert, attention=attention)(**micro)
        bert.set_attn_implementation(attention)
        stock = bert(**batch)
    assert stock.loss.item() == pytest.approx(total.item() / own.selected, abs=1e-5)
    assert masked_lm_loss(stock, batch["labels"]).item() == pytest.approx(stock.loss.item(), abs=1e-6)
    if overrides["data.packing"] != "none":
        # What would be so if documents saw each other: another loss.
        with torch.no_grad():
            leaking = bert(**{**batch, "attention_mask": (batch["input_ids"] != 0).long()})
        assert abs(leaking.loss.item() - stock.loss.item()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mask_hides_in_narrow_types(recipe: str, dtype: torch.dtype) -> None:
    bert = model().eval().to(dtype)
    batch = next(iter(DataLoader(MaskedLanguageDataset.from_config(recipe), batch_size=BATCH)))
    mask = batch["attention_mask"].to(dtype)
    assert torch.isfinite(mask).all()
    other = batch["input_ids"].clone()
    row = int((batch["position_ids"][:, 1:] == 0).any(1).nonzero()[0])
    second = int((batch["position_ids"][row, 1:] == 0).nonzero()[0]) + 1
    other[row, second:] = 7
    with torch.no_grad():
        outputs = [
            bert(input_ids=ids, position_ids=batch["position_ids"], attention_mask=mask).logits[row]
            for ids in (batch["input_ids"], other)
        ]
    assert torch.equal(outputs[0][:second], outputs[1][:second])
    assert not torch.equal(outputs[0][second:], outputs[1][second:])


def trainer(
    recipe: str, output: Path, steps: int, overrides: dict[str, Any] | None = None, **arguments: Any
) -> Trainer:
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=arguments.pop("rows", BATCH),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    dataset = MaskedLanguageDataset.from_config(recipe, overrides)
    return Trainer(model(), args, train_dataset=dataset, compute_loss_func=masked_lm_loss)


def losses(trained: Trainer) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in trained.state.log_history if "loss" in line}


@pytest.mark.parametrize("packing", ["none", "split"])
def test_trainer_goes_on_after_a_stop_as_if_there_was_none(recipe: str, tmp_path: Path, packing: str) -> None:
    overrides = {"data.packing": packing}
    whole = trainer(recipe, tmp_path / "whole", STEPS, overrides)
    whole.train()
    trainer(recipe, tmp_path / "parts", 3, overrides).train()
    rest = trainer(recipe, tmp_path / "parts", STEPS, overrides)
    rest.train(resume_from_checkpoint=True)
    wanted, given = losses(whole), losses(rest)
    assert list(wanted) == list(given) == list(range(1, STEPS + 1))
    assert len({round(loss, 4) for loss in wanted.values()}) == STEPS
    assert [given[step] for step in (4, 5, 6)] == pytest.approx([wanted[step] for step in (4, 5, 6)], abs=1e-6)


def test_trainer_evaluates_on_validation_rows(recipe: str, tmp_path: Path) -> None:
    trained = trainer(recipe, tmp_path, 1)
    rows = MaskedLanguageDataset.from_config(recipe, validation=True)
    first, again = trained.evaluate(rows)["eval_loss"], trained.evaluate(rows)["eval_loss"]
    assert first == again == pytest.approx(4.85, abs=0.5)  # log of the vocabulary


def on_a_rank(recipe: str, output: str) -> dict[str, Any]:
    """Called on both ranks: the token ids of the rank's batches when Accelerate dispatches them and when it does not; losses of a Trainer that accumulates."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    found: dict[str, Any] = {}
    for dispatch in (True, False):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
        loader = accelerator.prepare(DataLoader(MaskedLanguageDataset.from_config(recipe), batch_size=BATCH // 2))
        found[f"rows {dispatch}"] = [batch["input_ids"].tolist() for batch in loader]
    trained = trainer(recipe, Path(output), STEPS, rows=BATCH // 4, gradient_accumulation_steps=2)
    trained.train()
    return found | {"losses": losses(trained)}


def test_ranks_share_the_rows_and_have_the_losses_of_one(recipe: str, tmp_path: Path) -> None:
    rows = [row["input_ids"].tolist() for row in MaskedLanguageDataset.from_config(recipe)]
    alone = trainer(recipe, tmp_path / "alone", STEPS)
    alone.train()
    args = {"recipe": recipe, "output": str(tmp_path / "ranks")}
    first, second = run_ranks("tests.unit.test_torch_dataset:on_a_rank", 2, args)
    for how in ("rows True", "rows False"):
        parts = zip(first[how], second[how], strict=True)
        assert [row for part in parts for rank in part for row in rank] == rows
    assert first["losses"] == pytest.approx(losses(alone), abs=1e-4)


def test_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/interop.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    save_corpus(tmp_path / "data/demo", documents(200))
    save_corpus(tmp_path / "data/demo", documents(10, seed=1), name="val.json")
    save_tokenizer(tmp_path / "data/demo/tokenizer")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLM_TRAIN__STEPS", "2")
    set_seed(0)
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["trainer"].state.global_step == 2
    exec(blocks[1], names)
    state = torch.load("state.pt", weights_only=True)["data"]
    assert state["given"] == 20 * 16
    MaskedLanguageDataset.from_config("recipes/demo.yaml", {"train.steps": 20}).load_state_dict(state)
