"""``mlm-dist eval`` held against loops that do one thing at a time with stock transformers."""

import hashlib
import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

from mlm_dist import cli, eval_pseudo, eval_scores, eval_words
from mlm_dist.data.block import BlockMaker
from mlm_dist.data.manifest import Manifest
from mlm_dist.data.masking import MaskConfig
from mlm_dist.data.members import TokenIds
from mlm_dist.data.stream import DataConfig, open_stream
from mlm_dist.data.tokenizer import from_pretrained, load
from mlm_dist.errors import UserError
from mlm_dist.eval_models import Scorer
from mlm_dist.eval_rows import EvalData, Settings
from mlm_dist.eval_scores import Alone, Device, judge, measure, take_census
from mlm_dist.storage.store import Store
from tests.berts import small_bert
from tests.corpora import WORDS, documents, save_corpus, save_tokenizer

SEQ = 24
# Numbers, words of several tokens, of which some are more frequent than others: words of rank above 100 come of them.
NUMBERS = [str(1000 + i) for i in range(130) for _ in range(1 + i // 10)]
TEXTS = documents(60) + [" ".join(NUMBERS[i : i + 7]) for i in range(0, len(NUMBERS), 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and two models of other weights with one tokenizer."""
    path = tmp_path_factory.mktemp("eval")
    save_tokenizer(path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    save_corpus(path / "corpus", TEXTS)
    for name, scale in (("one", 1.0), ("two", 2.0)):
        model = small_bert(len(tokenizer))
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(scale)
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    return path


def evaluate(folder: Path, *words: str, out: Path) -> list[dict[str, Any]]:
    """What the command writes as JSON of each model."""
    argv = ["eval", *words, "--data", str(folder / "corpus/manifest.json"), "--json", str(out), "--seq-len", str(SEQ)]
    assert cli.main([*argv, "--batch", "3", "--device", "cpu"]) == 0
    found: list[dict[str, Any]] = json.loads(out.read_text())["models"]
    return found


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    """The numbers of both models, split packing, and of seven documents the pseudo-perplexity."""
    names = [str(folder / "one"), str(folder / "two")]
    return evaluate(folder, *names, "--pseudo-perplexity", "7", out=folder / "both.json")


def masked_segments(folder: Path, packing: Any, seed: int = 1234) -> Iterator[tuple[Any, Any, Any]]:
    """(ids, places, labels) of every segment, as the validation of a run gives them to its model."""
    manifest = Manifest.read(folder / "corpus/manifest.json")
    config = DataConfig(seq_len=SEQ, workers=0, packing=packing)
    tokenizer = load(str(folder / "tokenizer"))
    maker = BlockMaker(
        manifest, Store(manifest.root), tokenizer, SEQ, packing, "chunk", MaskConfig(), seed, shuffle=False
    )
    stream = open_stream(
        config, [maker], global_batch=8, micro_batch=8, rank=0, world_size=1, epochs=1, validation=True
    )
    for batch in stream.batches():
        if not batch.live.any():
            return
        for micro in stream.collate(batch):
            labels = torch.full_like(micro["input_ids"], -100).flatten()
            labels[micro["selected"]] = micro["labels"]
            for row, ids in enumerate(micro["input_ids"]):
                segments = micro["segment_ids"][row]
                for number in range(1, int(segments.max()) + 1):
                    mine = segments == number
                    yield ids[mine], labels.view_as(micro["input_ids"])[row][mine], number


def by_the_loop(folder: Path, name: str, packing: str) -> dict[str, float]:
    """Stock forward of one segment at a time, scores of every token."""
    model = AutoModelForMaskedLM.from_pretrained(folder / name).eval()
    loss, right, top, count = 0.0, 0, 0, 0
    with torch.no_grad():
        for ids, labels, _ in masked_segments(folder, packing):
            scores = model(input_ids=ids[None]).logits[0]
            loss += float(F.cross_entropy(scores, labels, reduction="sum")) if (labels >= 0).any() else 0.0
            for place in (labels >= 0).nonzero()[:, 0]:
                best = scores[place].topk(5).indices.tolist()
                right, top, count = (
                    right + (best[0] == labels[place]),
                    top + (int(labels[place]) in best),
                    count + 1,
                )
    return {
        "loss": loss / count,
        "accuracy": float(right) / count,
        "top5_accuracy": top / count,
        "selected": count,
        "perplexity": math.exp(loss / count),
    }


def test_the_numbers_of_a_stock_loop(folder: Path, both: list[dict[str, Any]]) -> None:
    for name, result in zip(("one", "two"), both, strict=True):
        wanted = by_the_loop(folder, name, "split")
        assert {key: result[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    assert both[0]["selected"] == both[1]["selected"] > 500 and both[0]["loss"] != both[1]["loss"]


def test_another_packing_and_seed_are_other_masks(folder: Path, both: list[dict[str, Any]], tmp_path: Path) -> None:
    (packed,) = evaluate(folder, str(folder / "one"), "--packing", "best_fit", out=tmp_path / "out.json")
    wanted = by_the_loop(folder, "one", "best_fit")
    assert {key: packed[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
    (seeded,) = evaluate(folder, str(folder / "one"), "--seed", "7", out=tmp_path / "out.json")
    assert seeded["selected"] != both[0]["selected"] and seeded["unigram_entropy"] == both[0]["unigram_entropy"]


def test_half_precision_is_close_and_not_the_same(folder: Path, both: list[dict[str, Any]], tmp_path: Path) -> None:
    (half,) = evaluate(folder, str(folder / "one"), "--precision", "bf16", out=tmp_path / "out.json")
    assert half["loss"] == pytest.approx(both[0]["loss"], rel=0.02) and half["loss"] != both[0]["loss"]
    assert half["selected"] == both[0]["selected"]


def test_the_same_masks_for_every_model(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}
    score = Scorer.__call__

    def record(self: Scorer, input_ids: Any, attention_mask: Any, places: Any) -> Any:
        seen.setdefault(self.name, []).append([t.tolist() for t in (input_ids, attention_mask, places)])
        return score(self, input_ids, attention_mask, places)

    monkeypatch.setattr(Scorer, "__call__", record)
    evaluate(folder, str(folder / "one"), str(folder / "two"), out=tmp_path / "out.json")
    one, two = seen.values()
    assert one == two and len(one) > 20


def test_pseudo_perplexity_of_a_loop_over_tokens(folder: Path, both: list[dict[str, Any]]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(folder / "one").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "one")
    chosen = sorted(TEXTS, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:7]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for text in chosen:
            content = tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(0, len(content), SEQ - 2):
                piece = [tokenizer.cls_token_id, *content[start : start + SEQ - 2], tokenizer.sep_token_id]
                for place in range(1, len(piece) - 1):
                    masked = [*piece]
                    masked[place] = tokenizer.mask_token_id
                    scores = model(input_ids=torch.tensor([masked])).logits[0, place]
                    total += float(scores.log_softmax(-1)[piece[place]])
                    tokens += 1
    result = both[0]["pseudo"]
    assert (result["documents"], result["tokens"], result["unknown"]) == (7, tokens, 0)
    assert result["words"] == sum(len(text.split()) for text in chosen)
    assert result["bytes"] == sum(len(text.encode()) for text in chosen)
    wanted = {
        "pseudo_log_likelihood": total,
        "pseudo_perplexity": math.exp(-total / tokens),
        "nats_per_token": -total / tokens,
        "nats_per_word": -total / result["words"],
        "bits_per_byte": -total / math.log(2) / result["bytes"],
    }
    assert {key: result[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)


def test_bins_add_up_to_the_whole(both: list[dict[str, Any]]) -> None:
    for result in both:
        bins = [row for row in result["by_frequency"] if row["selected"]]
        assert [row["ranks"] for row in bins] == ["1-100", "101-1,000"]
        assert sum(row["selected"] for row in bins) == result["selected"]
        for key in ("loss", "accuracy", "top5_accuracy"):
            total = sum(row["selected"] * row[key] for row in bins)
            assert total == pytest.approx(result["selected"] * result[key], rel=1e-12)
        assert [row["loss"] for row in result["by_frequency"] if not row["selected"]] == [None, None]


def test_words_are_counted_whole(folder: Path, tmp_path: Path) -> None:
    """Where no row cuts a word, the words are those of the text, and their bins those of its frequencies."""
    texts = TEXTS[60:]
    save_corpus(tmp_path / "corpus", texts)
    counts = Counter(word for text in texts for word in text.split())
    ranks = {word: 1 + sum(other > n for other in counts.values()) for word, n in counts.items()}
    wanted = [sum(1 for rank in ranks.values() if low < rank <= high) for low, high in ((0, 100), (100, 1000))]
    assert min(wanted) > 10
    argv = ["eval", str(folder / "one"), "--data", str(tmp_path / "corpus/manifest.json"), "--packing", "none"]
    assert cli.main([*argv, "--rate", "0.5", "--seq-len", "40", "--json", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["models"]
    assert [row["words"] for row in result["by_frequency"]] == [*wanted, 0, 0]


def test_frequencies_of_another_data_set(folder: Path, both: list[dict[str, Any]], tmp_path: Path) -> None:
    """There no number is ever seen and every other word is, so the numbers come last, behind more than 54 words."""
    other = save_corpus(tmp_path / "corpus", [" ".join(WORDS[: i + 1]) for i in range(len(WORDS))] * 2)
    argv = [str(folder / "one"), "--frequencies", str(other)]
    (result,) = evaluate(folder, *argv, out=tmp_path / "out.json")
    first, *rest = result["by_frequency"]
    assert first["words"] == sum(row["words"] for row in both[0]["by_frequency"]) and not any(r["words"] for r in rest)
    assert (
        (first["selected"], first["loss"])
        == (result["selected"], result["loss"])
        == (
            both[0]["selected"],
            pytest.approx(both[0]["loss"], rel=1e-12),
        )
    )


def test_frequencies_are_read_by_their_own_field(
    folder: Path, both: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_corpus(tmp_path / "corpus", TEXTS, field="body")
    manifest = Manifest.read(path)
    argv = ["eval", str(folder / "one"), "--data", str(folder / "corpus/manifest.json"), "--seq-len", str(SEQ)]
    argv += ["--batch", "3", "--frequencies", str(path), "--json", str(tmp_path / "out.json")]
    assert cli.main(argv) == 2  # nothing says which field
    said = capsys.readouterr().err
    assert f"--frequencies: none of its {len(TEXTS)} documents can be read" in said and "'text'" in said
    shard, info = manifest.shards[0], {"tool": "mlm-dist index", "options": {"field": "body"}}
    Manifest(manifest.root, manifest.shards, info).write(path)
    assert cli.main(argv) == 0
    assert json.loads((tmp_path / "out.json").read_text())["models"][0]["by_frequency"] == both[0]["by_frequency"]
    assert "note:" not in capsys.readouterr().out
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(int(shard.offsets[2]) + 600)
        file.write(b"\xff\xff")
    assert cli.main(argv) == 0
    assert f"note: {shard.documents[2]} documents of {path} cannot be read" in capsys.readouterr().out
    ids = TokenIds("0" * 64, 100, 3, (0, 2, 4))
    Manifest(manifest.root, manifest.shards, info, token_ids=ids).write(path)
    assert cli.main(argv) == 2
    assert "--frequencies: the manifest holds token ids of a tokenizer with the finger" in capsys.readouterr().err


def test_equally_frequent_words_share_a_bin() -> None:
    counts = Counter({f"often{i}".encode(): 5 for i in range(99)} | {f"seldom{i}".encode(): 2 for i in range(3)})
    assert set(eval_words.bins(counts, counts).values()) == {0}  # ranks 1 and 100
    counts[b"between"] = 3
    found = eval_words.bins([*counts, b"never"], counts)
    assert found[b"between"] == 0 and {found[f"seldom{i}".encode()] for i in range(3)} == {1} == {found[b"never"]}


def test_every_token_is_a_word_where_the_vocabulary_does_not_show_words() -> None:
    tokenizer = from_pretrained(roberta_tokenizer())
    ids = np.asarray([tokenizer.cls_id, 6, 7, 6, tokenizer.sep_id], np.uint16)
    assert sorted(eval_words.count(ids, tokenizer).values()) == [1, 2]


@pytest.mark.parametrize("batch", [1000, 2])
def test_any_number_of_ranks(folder: Path, batch: int) -> None:
    """One part for all ranks, or many."""
    manifest, tokenizer = Manifest.read(folder / "corpus/manifest.json"), load(str(folder / "tokenizer"))
    data = EvalData(manifest, Store(manifest.root), tokenizer, Settings(seq_len=SEQ), batch)
    assert (data.num_parts == 1) == (batch == 1000) and data.num_parts < 100

    models = [AutoModelForMaskedLM.from_pretrained(folder / "one").eval() for _ in range(2)]
    scorers = [Scorer(model, tokenizer, SEQ, "one") for model in models]

    def rank(group: Any) -> Any:
        scorer = scorers[group.rank]
        texts = eval_pseudo.choose(data.maker, 2, group)
        census, device = take_census(data, group), Device(torch.device("cpu"))
        return measure(data, census, scorer, group, device), eval_pseudo.measure(data, texts, scorer, group, device)

    alone = rank(Alone())
    assert in_threads(2, rank) == [alone, ({}, {})]


def in_threads(world: int, function: Callable[[Any], Any]) -> list[Any]:
    """What the function gives to each rank of a group of threads."""
    gate, slots = threading.Barrier(world, timeout=60), [None] * world

    class Member:
        def __init__(self, rank: int) -> None:
            self.rank, self.world_size = rank, world

        def _all(self, value: Any) -> list[Any]:
            slots[self.rank] = value
            gate.wait()
            out = list(slots)
            gate.wait()
            return out

        def gather(self, obj: Any) -> list[Any] | None:
            out = self._all(obj)
            return out if self.rank == 0 else None

        def broadcast(self, obj: Any) -> Any:
            return self._all(obj)[0]

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: function(Member(rank)), range(world)))


def test_lost_documents_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.read(save_corpus(tmp_path / "corpus", TEXTS[:60], shards=1))
    shard = manifest.shards[0]
    with manifest.shard_path(0).open("r+b") as file:
        file.seek(int(shard.offsets[2]) + 600)
        file.write(b"\xff\xff")
    (result,) = evaluate(tmp_path, str(folder / "one"), out=tmp_path / "out.json")
    assert result["lost_documents"] == shard.documents[2]
    assert f"note: {shard.documents[2]} of 60 documents cannot be read" in capsys.readouterr().out


def test_nothing_to_predict_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_corpus(tmp_path / "corpus", ["zebra quagga"] * 4)  # [UNK], which is never masked
    (result,) = evaluate(tmp_path, str(folder / "one"), out=tmp_path / "out.json")
    assert (result["selected"], result["loss"], result["perplexity"]) == (0, None, None)
    assert "note: the data set holds no text to predict" in capsys.readouterr().out


def test_a_nan_is_neither_right_nor_among_the_first() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0, -2.0], [math.nan] * 6])
    losses, right, top = judge(scores, torch.tensor([1, 0]))
    assert right.tolist() == top.tolist() == [True, False] and losses[1].isnan()


# ---- other families ----


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens of other names and places, [PAD] not 0."""
    names = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    vocab = {token: i for i, token in enumerate([*names.values(), *WORDS, *"0123456789"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{n}_token": t for n, t in names.items()})


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SIZES, "max_position_embeddings": SEQ}),
    # Its first two positions are not for tokens.
    "roberta": ("Roberta", {**SIZES, "max_position_embeddings": SEQ + 2, "pad_token_id": 1}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": SEQ}),
    "electra": ("Electra", {**SIZES, "embedding_size": 16, "max_position_embeddings": SEQ}),
    "albert": ("Albert", {**SIZES, "embedding_size": 16, "max_position_embeddings": SEQ}),
    "modernbert": ("ModernBert", {**SIZES, "max_position_embeddings": SEQ, "pad_token_id": 1}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_by_their_stock_forward(folder: Path, family: str, tmp_path: Path) -> None:
    name, sizes = FAMILIES[family]
    tokenizer = roberta_tokenizer()
    special = {f"{key}_token_id": None for key in ("bos", "eos", "cls", "sep")} if family == "modernbert" else {}
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **{**special, **sizes})
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    text_tokenizer = from_pretrained(tokenizer)
    manifest = Manifest.read(folder / "corpus/manifest.json")
    data = EvalData(manifest, Store(manifest.root), text_tokenizer, Settings(seq_len=SEQ), batch=4)
    rows = data.part(0).rows
    batch = next(data.batches(rows.take(np.flatnonzero(rows.selected))))
    micro = batch.collate(text_tokenizer.pad_id, data.multiple)
    inputs = {"input_ids": micro["input_ids"], "attention_mask": (micro["segment_ids"] != 0).long()}
    with torch.no_grad():
        full = model(**inputs).logits.flatten(0, 1)[micro["selected"]]
    scorer = Scorer(model, text_tokenizer, SEQ, family)
    assert scorer.sparse
    torch.testing.assert_close(scorer(*inputs.values(), micro["selected"]), full, rtol=1e-5, atol=1e-5)
    assert len(batch) > 1 and int(batch.lengths.min()) < micro["input_ids"].shape[1]  # padded
    if family != "modernbert":  # whose positions are computed
        with pytest.raises(UserError, match=f"--seq-len {SEQ + 1}: {family} does not read rows of so many tokens"):
            Scorer(model, text_tokenizer, SEQ + 1, family)


def test_a_head_that_looks_at_other_places_gets_them(folder: Path) -> None:
    tokenizer = load(str(folder / "tokenizer"))
    model = small_bert(tokenizer.vocab_size).eval()

    def mixed(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(1, keepdim=True)

    model.cls.register_forward_hook(mixed)
    ids = torch.randint(6, tokenizer.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.flatten(0, 1)[[3, 11]]
    scorer = Scorer(model, tokenizer, SEQ, "mixed")
    assert not scorer.sparse
    torch.testing.assert_close(scorer(ids, torch.ones_like(ids), torch.tensor([3, 11])), full)


# ---- what is printed, and mistakes ----


def test_markdown_and_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(folder / "one"), "--data", str(folder / "corpus/manifest.json"), "--seq-len", str(SEQ)]
    assert cli.main([*argv, "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["documents"] == len(TEXTS) and facts["settings"]["seq_len"] == SEQ
    for path in (folder / "nodir/out.json", folder):
        assert cli.main([*argv, "--json", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"--json {path}: cannot be written" in said and "accuracy" not in said  # nothing was measured
    assert cli.main([*argv, "--markdown"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith(f"| {folder / 'one'} |"))
    assert f"{facts['models'][0]['loss']:.4f}" in row and f"| {facts['models'][0]['selected']:,} |" in row


def test_tokenizers_that_differ_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = roberta_tokenizer()
    small_bert(len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    argv = ["eval", str(folder / "one"), str(tmp_path / "other"), "--data", str(folder / "corpus/manifest.json")]
    assert cli.main([*argv, "--seq-len", "24"]) == 0
    assert "tokenizers differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--pseudo-perplexity", "-1"], "--pseudo-perplexity -1: must be at least 0"),
        (["--seq-len", "7"], "--seq-len 7: too short"),
        (["--seq-len", "49"], "--seq-len 49: {one} does not read rows of so many tokens"),
        (["--rate", "1.0"], "--rate 1.0: not a probability"),
        (["--steps", "1,2"], "--steps, --checkpoints, --best: {one} is no run"),
        (["--best"], "is no run"),
        (["--checkpoints", "all"], "is no run"),
        (["--data", "none.json"], "manifest none.json: No such file or directory"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: cannot be written"),
    ],
)
def test_mistakes(folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", str(folder / "one"), "--data", str(folder / "corpus/manifest.json"), "--seq-len", "24", *flags]
    assert cli.main(argv) == 2
    assert message.format(one=folder / "one") in capsys.readouterr().err


def test_models_that_are_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    bodies = {"headless": small_bert(len(tokenizer)).bert, "small": small_bert(len(tokenizer) - 5)}
    for name, model in bodies.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name, message in {
        "headless": "lacks 6 weights that AutoModelForMaskedLM needs, cls.predictions.bias first",
        "small": f"its tokenizer has {len(tokenizer)} tokens, the model {len(tokenizer) - 5}",
        "empty": "holds no whole checkpoint",
        "gone": "no such directory",
    }.items():
        argv = ["eval", str(tmp_path / name), "--data", str(folder / "corpus/manifest.json"), "--seq-len", "24"]
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_every_model_is_looked_at_before_one_is_measured(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folder / "two", tmp_path / "other")
    (other / name).write_text("{")
    argv = ["eval", str(folder / "one"), str(other), "--data", str(folder / "corpus/manifest.json")]
    assert cli.main([*argv, "--seq-len", "24"]) == 2
    said = capsys.readouterr().err
    assert f"{other}" in said and "be loaded" in said and "accuracy" not in said


def test_a_later_model_that_fails_leaves_the_numbers_of_the_others(
    folder: Path, both: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = shutil.copytree(folder / "two", tmp_path / "other"), tmp_path / "out.json"
    (other / "model.safetensors").write_bytes(b"{")
    argv = ["eval", str(folder / "one"), str(other), "--data", str(folder / "corpus/manifest.json"), "--batch", "3"]
    assert cli.main([*argv, "--seq-len", str(SEQ), "--json", str(out)]) == 2
    said = capsys.readouterr()
    assert f"{other}: cannot be loaded by AutoModelForMaskedLM" in said.err and "unigram entropy" in said.out
    assert [m["loss"] for m in json.loads(out.read_text())["models"]] == [both[0]["loss"]]


def test_no_text_for_pseudo_perplexity_is_seen_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BlockMaker, "texts", lambda *_: [])  # as of a data set of token ids
    monkeypatch.setattr(eval_scores, "measure", lambda *_: pytest.fail("measured for nothing"))
    argv = ["eval", str(folder / "one"), "--data", str(folder / "corpus/manifest.json"), "--seq-len", "24"]
    assert cli.main([*argv, "--pseudo-perplexity"]) == 2
    assert "--pseudo-perplexity: the data set holds no text" in capsys.readouterr().err


def test_data_that_is_not_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(folder / "one")]) == 2
    assert "--data: missing" in capsys.readouterr().err
    manifest = Manifest.read(save_corpus(tmp_path / "corpus", TEXTS[:60]))
    manifest.shard_path(1).unlink()
    assert cli.main(["eval", str(folder / "one"), "--data", str(tmp_path / "corpus/manifest.json")]) == 2
    assert "1 of 3 shards, with 20 of 60 documents, cannot be read" in capsys.readouterr().err
