"""The run config: where a value may come from and who wins, and mistakes answered with the key that was meant."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlm_dist.config import GUARDED, Config, known_keys, load
from mlm_dist.errors import UserError

BASE: dict[str, dict[str, Any]] = {
    "data": {"manifest": "corpus/manifest.json", "tokenizer": "corpus/tokenizer"},
    "train": {"steps": 12},
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("MLM_")]:
        monkeypatch.delenv(name)


def save(folder: Path, text: str | None = None, **sections: dict[str, Any]) -> str:
    path = folder / "tiny.yaml"
    tree = {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in {**BASE, **sections}}
    path.write_text(yaml.safe_dump(tree) if text is None else text)
    return str(path)


def read(path: str, *flags: str) -> Config:
    return load(["--config", path, *flags]).config


def refused(path: str, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load(["--config", path, *flags])
    return str(caught.value)


def test_flag_over_environment_over_yaml_over_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without, path = save(tmp_path), tmp_path / "tiny.yaml"
    assert read(without).train.global_batch == 32
    save(tmp_path, train={"global_batch": 40})
    assert read(str(path)).train.global_batch == 40
    monkeypatch.setenv("MLM_TRAIN__GLOBAL_BATCH", "50")
    assert read(str(path)).train.global_batch == 50
    assert read(str(path), "--train.global_batch", "60").train.global_batch == 60
    assert read(str(path), "--train.global_batch=70").train.global_batch == 70
    assert read(str(path)).train.steps == 12  # the rest stays


@pytest.mark.parametrize("flag_first", [True, False])
def test_config_may_stand_anywhere_and_the_last_one_counts(tmp_path: Path, flag_first: bool) -> None:
    path = save(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**BASE, "train": {"steps": 99}}))
    words = ["--config", path, f"--config={other}", "--train.micro_batch", "2"]
    config = load(words[3:] + words[:3] if flag_first else words).config
    assert (config.train.steps, config.train.micro_batch, config.run.name) == (99, 2, "other")


def test_environment_gives_every_kind_of_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("RUN__NAME", "20240131"),
        ("TRAIN__PRECISION", "fp32"),
        ("TRAIN__DETERMINISTIC", "true"),
        ("OPTIM__LR", "1e-3"),
        ("OPTIM__BETAS", "[0.9, 0.98]"),
        ("MASK__SPLIT", "[0.5, 0.25, 0.25]"),
        ("DATA__LANES", "null"),
        ("MODEL__CONFIG", "{hidden_size: 64}"),
    ):
        monkeypatch.setenv(f"MLM_{name}", value)
    config = read(save(tmp_path, data={"lanes": 4}))
    assert (config.run.name, config.train.precision, config.train.deterministic) == ("20240131", "fp32", True)
    assert (config.optim.lr, config.optim.betas) == (1e-3, (0.9, 0.98))
    assert (config.mask.split, config.data.lanes) == ((0.5, 0.25, 0.25), None)
    assert config.model.config == {"hidden_size": 64}


def test_numbers_as_people_write_them_in_yaml(tmp_path: Path) -> None:
    text = yaml.safe_dump({k: BASE[k] for k in ("data", "train")}) + "optim: {lr: 5e-5, betas: [0.9, 0.98]}\n"
    assert read(save(tmp_path, text)).optim.lr == 5e-5  # plain YAML reads 5e-5 as text


def test_a_size_of_the_model_by_flag(tmp_path: Path) -> None:
    path = save(tmp_path, model={"config": {"hidden_size": 64, "num_hidden_layers": 2}})
    config = read(path, "--model.config.hidden_size", "128")
    assert config.model.config == {"hidden_size": 128, "num_hidden_layers": 2}


def test_the_runs_name_comes_from_the_file(tmp_path: Path) -> None:
    assert read(save(tmp_path)).run.path() == Path("runs/tiny")
    assert read(save(tmp_path), "--run.name", "mine", "--run.dir", "/x").run.path() == Path("/x/mine")


@pytest.mark.parametrize(
    ("section", "content", "near"),
    [
        ("train", {"global_bach": 3}, "train.global_batch"),
        ("optim", {"learning_rate": 3}, "optim."),
        ("trian", {"steps": 3}, "train"),
        ("checkpoint", {"evry": 3}, "checkpoint.every"),
    ],
)
def test_unknown_key_in_yaml(tmp_path: Path, section: str, content: dict[str, int], near: str) -> None:
    path = save(tmp_path, **{section: content})
    message = refused(path)
    assert path in message and f"Did you mean '{near}" in message
    assert repr(section if section == "trian" else f"{section}.{next(iter(content))}") in message


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--train.global_bach", "--train.global_batch"),
        ("--trian.steps", "--train.steps"),
        ("--steps", "--train.steps"),
        ("--data.seqlen", "--data.seq_len"),
        ("--allow_changes", "--allow_change"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_unknown_flag(tmp_path: Path, flag: str, near: str, joined: bool) -> None:
    message = refused(save(tmp_path), *([f"{flag}=3"] if joined else [flag, "3"]))
    assert f"unknown key {flag!r}" in message and f"Did you mean {near!r}" in message


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("MLM_TRAIN__STPES", "MLM_TRAIN__STEPS"),
        ("MLM_TRIAN__STEPS", "MLM_TRAIN__STEPS"),
        ("MLM_TRAIN_STEPS", "MLM_TRAIN__STEPS"),
    ],
)
def test_unknown_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    monkeypatch.setenv(name, "3")
    message = refused(save(tmp_path))
    assert f"unknown key {name!r}" in message and f"Did you mean {near!r}" in message


def test_variables_that_are_no_keys_are_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLM_JOB_ID", "77")
    monkeypatch.setenv("MLM_HOME", "/opt/other")
    assert read(save(tmp_path)).train.steps == 12


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("train.steps", "many", "a whole number or null"),
        ("train.global_batch", "1.5", "a whole number"),
        ("train.precision", "fp8", "one of fp32, bf16, bf16_pure, fp16"),
        ("optim.lr", "fast", "a number"),
        ("train.deterministic", "maybe", "true or false"),
        ("mask.split", "[0.5, 0.5]", "a list of 3 numbers"),
        ("model.config", "[1]", "keys with their values or null"),
    ],
)
@pytest.mark.parametrize("by", ["flag", "environment", "yaml"])
def test_wrong_type_names_key_value_and_what_would_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, right: str, by: str
) -> None:
    section, name = key.split(".")
    flags: list[str] = []
    if by == "flag":
        flags = [f"--{key}", value]
    elif by == "environment":
        monkeypatch.setenv(f"MLM_{section.upper()}__{name.upper()}", value)
    sections = {section: {name: yaml.safe_load(value)}} if by == "yaml" else {}
    assert refused(save(tmp_path, **sections), *flags) == f"{key}: {value!r} is wrong; it must be {right}."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", "0"),
        ("train.global_batch", "0"),
        ("train.micro_batch", "-1"),
        ("train.clip", "-1"),
        ("train.clip", ".nan"),
        ("train.timeout", "0"),
        ("train.timeout", ".nan"),
        ("train.timeout", "864001"),
        ("data.seq_len", "2"),
        ("data.workers", "-1"),
        ("data.lanes", "0"),
        ("data.max_bad_fraction", "1.5"),
        ("data.manifest", ""),
        ("mask.rate", "1.5"),
        ("optim.lr", "-1"),
        ("optim.warmup", "2.5"),
        ("checkpoint.keep", "0"),
        ("eval.every", "0"),
        ("run.name", "a/b"),
    ],
)
def test_out_of_range_names_the_key(tmp_path: Path, key: str, value: str) -> None:
    assert refused(save(tmp_path), f"--{key}", value).startswith(f"{key}: ")


def test_missing_and_unreadable_configs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--config: missing"):
        load(["--train.steps", "3"])
    assert "No such file" in refused(str(tmp_path / "absent.yaml"))
    assert "Is a directory" in refused(str(tmp_path))
    for text, why in (
        ("a: [1", "is not YAML"),
        ("- 1\n", "must hold sections"),
        ("train: 3\n", "'train' must hold keys"),
    ):
        assert why in refused(save(tmp_path, text))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in refused(str(binary))


def test_exactly_one_of_steps_and_epochs(tmp_path: Path) -> None:
    path = save(tmp_path)
    assert "give exactly one" in refused(path, "--train.epochs", "2")
    assert "give exactly one" in refused(path, "--train.steps", "null")
    config = read(path, "--train.steps", "null", "--train.epochs", "2")
    assert (config.train.steps, config.train.epochs) == (None, 2)


def test_dump_is_read_back_the_same(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    config = read(
        save(
            tmp_path,
            run={"name": "2024", "dir": "a: b #c"},
            model={"config": sizes},
            optim={"lr": 1e-5, "betas": [0.9, 0.95]},
        )
    )
    again = tmp_path / "again.yaml"
    again.write_text(config.dump())
    assert read(str(again)) == config
    assert sorted(config.flat()) == sorted(known_keys())


def changed(base: Config, **by_key: Any) -> Config:
    tree = yaml.safe_load(base.dump())
    for key, value in by_key.items():
        section, name = key.split("__")
        tree[section][name] = value
    path = Path(base.run.dir) / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read(str(path))


def test_identity_is_what_the_data_and_the_weights_depend_on(tmp_path: Path) -> None:
    base = read(save(tmp_path, run={"dir": str(tmp_path)}))
    mine = base.identity("manifest-print", "tokenizer-print")
    assert mine["data.manifest"] == "manifest-print" and mine["data.tokenizer"] == "tokenizer-print"
    for key, value in (
        ("run__seed", 5),
        ("data__seq_len", 64),
        ("data__packing", "none"),
        ("data__long_documents", "truncate"),
        ("data__lanes", 3),
        ("mask__rate", 0.3),
        ("mask__strategy", "mask_only"),
        ("mask__labels", "all"),
        ("train__global_batch", 64),
        ("optim__weight_decay", 0.1),
        ("optim__betas", [0.8, 0.9]),
        ("model__config", {"hidden_size": 64}),
    ):
        other = changed(base, **{key: value})
        differs = {k for k, v in other.identity("manifest-print", "tokenizer-print").items() if v != mine[k]}
        assert differs == {key.replace("__", ".")}
        assert other.guarded() == base.guarded()
    growing = changed(base, train__batch_start=1, train__batch_warmup_tokens=1000, run__branch_from="runs/base")
    differs = {k for k, v in growing.identity("manifest-print", "tokenizer-print").items() if v != mine[k]}
    assert differs == {"train.batch_start", "train.batch_warmup_tokens", "run.branch_from"}


def test_what_may_change_freely_is_neither_identity_nor_guarded(tmp_path: Path) -> None:
    base = read(save(tmp_path, run={"dir": str(tmp_path)}))
    other = changed(
        base,
        data__workers=7,
        data__manifest="elsewhere/manifest.json",
        data__tokenizer="elsewhere",
        data__max_bad_fraction=0.5,
        train__micro_batch=1,
        train__precision="fp32",
        deepspeed__config="zero3",
        checkpoint__every=7,
        eval__batch=3,
        track__wandb="disabled",
        model__checkpoint_activations=True,
    )
    assert other.identity("m", "t") == base.identity("m", "t")
    assert other.guarded() == base.guarded()


def test_guarded_keys(tmp_path: Path) -> None:
    base = read(save(tmp_path, run={"dir": str(tmp_path)}))
    other = changed(
        base,
        optim__lr=0.5,
        train__steps=99,
        optim__schedule="wsd",
        optim__warmup=0.5,
        optim__decay=0.2,
        optim__decay_shape="sqrt",
        optim__final=0.1,
    )
    assert {k for k, v in other.guarded().items() if v != base.guarded()[k]} == {
        "optim.lr",
        "train.steps",
        "optim.schedule",
        "optim.warmup",
        "optim.decay",
        "optim.decay_shape",
        "optim.final",
    }


def test_allow_change(tmp_path: Path) -> None:
    path = save(tmp_path)
    call = load(["--config", path, "--allow_change", "optim.lr", "--allow-change", "train.steps"])
    assert call.allow_change == ["optim.lr", "train.steps"]
    assert load(["--config", path]).allow_change == []
    for key in ("mask.rate", "train.micro_batch", "nonsense"):
        message = refused(path, "--allow_change", key)
        assert repr(key) in message and all(k in message for k in GUARDED)


def test_recipes_are_read(tmp_path: Path) -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    for recipe in recipes:
        config = read(str(recipe), "--data.manifest", "m", "--data.tokenizer", "t")
        assert config.run.path().name == recipe.stem
