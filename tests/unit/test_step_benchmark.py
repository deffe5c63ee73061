"""The step benchmark counts what a model is trained on, and gives true verdicts on it."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from benchmarks import step_contestants, step_report
from benchmarks.step_cases import CASES, SMALL, TARGETS
from benchmarks.turns import Counts, Turns, counts_of, is_near
from tests.corpora import documents, save_corpus, save_tokenizer

LENGTH, ROWS = 32, 4


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model and corpus."""
    root = tmp_path_factory.mktemp("step")
    texts = documents(60)
    (root / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "manifest": str(save_corpus(root / "corpus", texts)),
        "val_manifest": str(save_corpus(root / "corpus", documents(20, seed=1), shards=1, name="val.json")),
        "jsonl": [str(root / "train.jsonl")],
        "tokenizer": str(save_tokenizer(root / "tokenizer")),
        "scratch": str(root),
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": LENGTH,
        },
        "lr": 1e-3,
        "seq_len": LENGTH,
        "rows": ROWS,
        "precision": "fp32",
    }


class Orders:
    """The benchmark's side, for a contestant in this process."""

    def __init__(self, *orders: dict[str, Any]):
        self._orders: Iterator[dict[str, Any]] = iter(orders)
        self.answers: list[dict[str, Any]] = []

    def turns(self) -> Turns:
        return Turns(torch.device("cpu"), lambda: next(self._orders), self.answers.append)


def trained_batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """All inputs that stock BERT is given in training from now on."""
    from transformers import BertForMaskedLM

    seen: list[dict[str, torch.Tensor]] = []
    forward = BertForMaskedLM.forward

    @functools.wraps(forward)  # the Trainer looks at its signature
    def noting(self: Any, **batch: Any) -> Any:
        if self.training:
            seen.append({k: v for k, v in batch.items() if isinstance(v, torch.Tensor)})
        return forward(self, **batch)

    monkeypatch.setattr(BertForMaskedLM, "forward", noting)
    return seen


@pytest.mark.parametrize(("contestant", "layout"), [("trainer", "lines"), ("trainer", "groups"), ("plain", "padded")])
def test_counts_are_of_the_batches_that_the_model_saw(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, contestant: str, layout: str
) -> None:
    seen = trained_batches(monkeypatch)
    orders = Orders({"steps": 2}, {"tokens": 400}, {"end": True})
    turns = orders.turns()
    step_contestants.CONTESTANTS[contestant]({**spec, "layout": layout}, turns)
    _, warm_up, turn = orders.answers
    assert len(seen) == warm_up["steps"] + turn["steps"]
    for answer, batches in ((warm_up, seen[:2]), (turn, seen[2:])):
        # Not by the ids: the collator's random replacements may be [PAD].
        assert answer["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)
        assert answer["places"] == sum(b["input_ids"].numel() for b in batches)
        assert answer["selected"] == sum(int((b["labels"] != -100).sum()) for b in batches)
    per_step = turn["tokens"] / turn["steps"]
    assert abs(turns.total.tokens - 400) <= per_step
    assert (turn["tokens"] == turn["places"]) == (layout == "groups")
    if layout == "padded":
        assert {b["input_ids"].shape[1] for b in seen} == {LENGTH}


def test_ours_counts_and_parts(spec: dict[str, Any]) -> None:
    orders = Orders({"steps": 2}, {"tokens": 500}, {"end": True})
    turns = orders.turns()
    model = step_contestants.bare(spec, turns)
    _, warm_up, turn = orders.answers
    assert turns.total.tokens == warm_up["tokens"] + turn["tokens"]
    assert ROWS * 2 * turn["steps"] <= turn["tokens"] <= turn["places"] <= ROWS * LENGTH * turn["steps"]
    assert turn["tokens"] < turn["attended"] < turn["tokens"] * LENGTH
    assert turn["parts"].keys() == {"data wait", "forward", "backward", "optimizer"}
    assert sum(turn["parts"].values()) <= turn["seconds"]
    start = step_contestants.initial_model(step_contestants.run_config(spec), model.config.vocab_size)
    cpu = torch.device("cpu")
    assert step_contestants.heldout_loss(spec, model, cpu) < step_contestants.heldout_loss(spec, start, cpu)


def test_contestants_begin_with_the_same_weights(spec: dict[str, Any]) -> None:
    config = step_contestants.run_config(spec)
    one = step_contestants.initial_model(config, 100).state_dict()
    torch.rand(3)
    other = step_contestants.initial_model(config, 100).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_counts_of_a_padded_batch(spec: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(spec["tokenizer"])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)
    batch = collator([{"input_ids": [2, *[7] * n, 3], "attention_mask": [1] * (n + 2)} for n in (1, 4)])
    counts = counts_of(batch)
    assert counts == (3 + 6, 12, 9 + 36, int((batch["labels"] != -100).sum()))
    assert counts + Counts(1, 1, 1, 1) == tuple(value + 1 for value in counts)


def test_turns_end_as_near_to_their_tokens_as_steps_allow() -> None:
    assert [is_near(total, 100, 250) for total in (100, 199, 200, 300)] == [False, False, True, True]


def lines(**turns: list[tuple[float, float]]) -> str:
    """JSON lines of one setting: for each case (tokens, seconds) by round; its memory is 10 MB a letter of its name."""
    header = {
        "cpu": "x", "cores": 2, "threads": 2, "memory_gb": 1, "load": 0.0, "python": "3", "versions": {}, "source": "y", "documents": 1, "bytes": 1,
        "rounds": 2, "cuda": None, "peaks": {},
    }  # fmt: skip
    out: list[dict[str, Any]] = [header]
    for case, values in turns.items():
        place = {"setting": list(SMALL[0]), "case": case}
        for number, (tokens, seconds) in enumerate(values):
            counts = {"tokens": tokens, "places": tokens, "attended": tokens, "selected": 1, "steps": 1, "parts": {}}
            out.append({**place, "kind": "turn", "round": number, "seconds": seconds, "cpu_s": seconds, **counts})
        out.append({**place, "kind": "end", "round": 2, "memory_mb": 10 * len(case), "loss": 1.0, "tokens": 1})
    return "\n".join(map(json.dumps, out))


def test_verdicts() -> None:
    # Rates are compared within a round: the second is half as fast for all.
    text = lines(
        lines=[(100, 1), (100, 2)], groups=[(150, 1), (150, 2)], zero1=[(210, 1), (210, 2)], bare=[(215, 1), (215, 2)]
    )
    report = step_report.render(text)
    row = {line.split(" | ")[0].removeprefix("| "): line for line in report.splitlines() if line.startswith("| cpu: ")}
    assert "2.10, met" in row["cpu: ZeRO-1 against run_mlm line by line, useful tokens/s"]
    assert "1.40, **missed**" in row["cpu: ZeRO-1 against run_mlm group_texts, useful tokens/s"]
    assert "1.00, met" in row["cpu: ZeRO-1 against run_mlm line by line, memory"]
    assert "0.98, met" in row["cpu: ZeRO-1 against the plain loop with its model, useful tokens/s"]
    assert "not run" in row["cpu: ZeRO-0 against the plain loop with its model, useful tokens/s"]
    assert all("not run" in line for line in report.splitlines() if line.startswith("| cuda: "))
    assert "| 158 (105-210) |" in report  # of zero1


def test_targets_name_cases_and_bounds() -> None:
    keys = {case.key for case in CASES}
    for target in TARGETS:
        assert target.case in keys and target.against in keys | {None}
        bound = target.least or target.most
        assert bound is not None and target.is_met(bound)
        assert not target.is_met(bound * (0.9 if target.least else 1.1))


def test_mfu_is_of_the_useful_tokens() -> None:
    setting = SMALL[0]
    turn = {"tokens": 1000, "places": 4000, "attended": 64_000, "selected": 150, "seconds": 2.0}
    rate = step_report.flops_per_second(turn, setting)
    assert step_report.flops_per_second({**turn, "places": 8000}, setting) == rate  # padding is no work that counts
    assert step_report.flops_per_second({**turn, "seconds": 4.0}, setting) == pytest.approx(rate / 2)
    measured = step_report.Measured(setting, [{"case": "bare", "kind": "turn", "round": 0, **turn}], peak=2 * rate)
    assert measured.mfu("bare") == pytest.approx(0.5)
    assert step_report.Measured(setting, [], peak=None).mfu("bare") is None
