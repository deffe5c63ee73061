"""Every family that can be trained against its stock loss; what is refused, and where families differ."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, PreTrainedModel

import tests.varlen_cpu  # noqa: F401
from benchmarks.memory_cases import Setting, module, peaks
from mlm_dist import plan_command
from mlm_dist.autobatch import trial
from mlm_dist.config import load
from mlm_dist.errors import UserError
from mlm_dist.model import families
from mlm_dist.model.attention import choose_for, segment_mask, with_windows
from mlm_dist.model.bert import ModelConfig, build, check_fit, flops_per_token, load_config
from mlm_dist.model.compiled import compile_layers, plain_layers
from mlm_dist.model.head import MaskedLM
from mlm_dist.model.new_tokens import NewTokens, add_tokens
from mlm_dist.optim import param_groups
from mlm_dist.plan import bare
from mlm_dist.plan_job import Model
from tests.families import POSITIONS, SIZES, section, small
from tests.unit.test_attention import PACKED, SINGLE, collate, make_rows

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, PAD = 211, 1
ALL = sorted(families.FAMILIES)
WAYS = [(n, b) for n in ALL for b in ("sdpa", "eager", "varlen") if b != "varlen" or not families.FAMILIES[n].windows]
OTHERS = [name for name in ALL if name != "bert"]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModernBERT computes rotations and eager softmax in fp32 whatever the weights are: here in their dtype, so that parity shows to the last digits."""
    from transformers.models.modernbert import modeling_modernbert as stock

    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    turn = stock.rotate_half

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    monkeypatch.setattr(stock, "apply_rotary_pos_emb", rotate)


def alone(rows: Any, model: PreTrainedModel) -> Tensor:
    """The loss of the stock forward, with the logits of all tokens, each document a batch of its own."""
    labels = torch.full((len(rows.ids),), -100)
    starts = rows.lengths.cumsum() - rows.lengths
    labels[torch.from_numpy(starts.repeat(rows.selected) + rows.positions)] = torch.from_numpy(
        rows.labels.astype("int64")
    )
    ids = torch.from_numpy(rows.ids.astype("int64"))
    losses = []
    for one, wanted in zip(
        ids.split(rows.segment_lengths.tolist()), labels.split(rows.segment_lengths.tolist()), strict=True
    ):
        if count := int((wanted >= 0).sum()):
            out = model(one[None], labels=wanted[None])
            losses.append(nn.functional.cross_entropy(out.logits[0], wanted, reduction="sum"))
            # Its own loss, which ModernBERT takes in fp32.
            torch.testing.assert_close(out.loss.double() * count, losses[-1], rtol=1e-5, atol=0)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("lengths", [PACKED, SINGLE], ids=["packed", "single"])
@pytest.mark.parametrize(("model_type", "back_end"), WAYS)
@pytest.mark.usefixtures("exact")
def test_loss_and_gradients_are_those_of_the_stock_model(
    model_type: str, back_end: str, lengths: list[list[int]]
) -> None:
    theirs, model = (small(model_type, VOCABULARY, PAD).double() for _ in range(2))
    rows = make_rows(lengths)
    ours = MaskedLM(model, back_end, head_chunk=7)
    expected = alone(rows, theirs)
    loss, _ = ours(**collate(rows, back_end))
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-12)
    loss.backward(), expected.backward()
    assert [n for n, _ in ours.named_parameters()] == [f"model.{n}" for n, _ in theirs.named_parameters()]
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    for (name, one), (_, other) in zip(ours.model.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(
            one.grad, other.grad, atol=1e-10 * largest, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", OTHERS)
def test_neighbours_do_not_change_a_document_by_a_bit(model_type: str, back_end: str) -> None:
    module = MaskedLM(small(model_type, VOCABULARY, PAD).eval(), back_end)
    batch = collate(make_rows(PACKED), back_end)
    ids, first = batch["input_ids"], batch["segment_ids"] == 1
    with torch.no_grad():
        one, other = (
            module.encode(x, batch["position_ids"], batch["segment_ids"])[first]
            for x in (ids, torch.where(first, ids, (ids + 7) % VOCABULARY))
        )
    assert torch.equal(one, other)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "pure"])
@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "modernbert"])
def test_bf16_is_near_fp32(model_type: str, back_end: str, pure: bool) -> None:
    """A mask that is right in fp32 only would make infinities here, and documents see each other."""
    batch = collate(make_rows(PACKED), back_end)
    exact, _ = MaskedLM(small(model_type, VOCABULARY, PAD), back_end)(**batch)
    module = MaskedLM(small(model_type, VOCABULARY, PAD).to(torch.bfloat16 if pure else torch.float32), back_end)
    with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
        loss, _ = module(**batch)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("model_type", [name for name in ALL if families.FAMILIES[name].after_padding])
def test_labels_on_padding_see_stock_positions(model_type: str) -> None:
    """`mask.labels: all_with_padding` is the loss of stock on a padded batch: there a [PAD] has a position of its own."""
    theirs, ours = small(model_type, VOCABULARY, PAD), MaskedLM(small(model_type, VOCABULARY, PAD), "sdpa")
    ids = torch.tensor([[0, 9, 8, 7, 2, PAD, PAD], [0, 5, 6, 5, 9, 4, 2]])
    real = ids != PAD
    expected = theirs(ids, attention_mask=real.long(), labels=ids).loss * ids.numel()
    positions = torch.arange(7).expand(2, -1)
    loss, _ = ours(ids, positions, torch.arange(14), ids.flatten(), torch.where(real, 1, -1))
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "modernbert"])
def test_checkpointed_and_compiled_layers_are_the_plain_ones(model_type: str) -> None:
    batch, losses = collate(make_rows(PACKED), "sdpa", filled=True), []
    for how in ("plain", "checkpointed", "compiled"):
        model = build(section(model_type, checkpoint_activations=how == "checkpointed"), config(model_type), seed=0)
        module = MaskedLM(model, "sdpa")
        if how == "compiled":
            assert compile_layers(module, batch, autocast=None, backend="aot_eager") is None
        loss, _ = module(**batch)
        loss.backward()
        losses.append((loss.detach(), model.get_input_embeddings().weight.grad))
        plain_layers(module)
    for loss, gradient in losses[1:]:
        torch.testing.assert_close(loss, losses[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, losses[0][1], rtol=1e-4, atol=1e-6)


# ---- configuration ----


def config(model_type: str, **values: Any) -> Any:
    cfg = section(model_type)
    cfg.config = {**(cfg.config or {}), **values}
    return load_config(cfg, vocab_size=VOCABULARY, pad_token_id=PAD)


@pytest.mark.parametrize("model_type", ALL)
def test_rows_as_long_as_the_positions_go_and_no_longer(model_type: str) -> None:
    sizes = config(model_type)
    longest = POSITIONS - (PAD + 1 if families.FAMILIES[model_type].after_padding else 0)
    check_fit(sizes, vocab_size=VOCABULARY, seq_len=longest)
    with pytest.raises(UserError, match=rf"data\.seq_len {longest + 1} is longer .* at most {longest}"):
        check_fit(sizes, vocab_size=VOCABULARY, seq_len=longest + 1)
    module = MaskedLM(families.new(sizes))
    place = torch.arange(longest)[None]
    assert module.encode(torch.full_like(place, 5), place, torch.ones_like(place)).isfinite().all()


def test_a_padding_token_past_the_table_of_positions_is_named() -> None:
    sizes = load_config(section("roberta"), vocab_size=VOCABULARY, pad_token_id=200)
    with pytest.raises(
        UserError, match=r"^pad_token_id 200 leaves no position .* a RoBERTa .* at least 217"
    ) as refused:
        check_fit(sizes, vocab_size=VOCABULARY, seq_len=16)
    assert "-1" not in str(refused.value)
    enough = config("roberta", max_position_embeddings=217)
    enough.pad_token_id = 200
    check_fit(enough, vocab_size=VOCABULARY, seq_len=16)


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("t5", {}, r"model\.config\.model_type is a model of type 't5'.*an encoder with a decoder"),
        ("deberta-v2", {}, r"its attention is its own"),
        ("albert", {}, r"share their weights"),
        ("new-and-unheard-of", {}, r"must be one of bert, roberta, .*modernbert"),
        ("distilbert", {"hidden_dim": 0}, r"hidden_dim 0 is not a size"),
        ("distilbert", {"dropout": 0.1}, r"dropout is set by model\.hidden_dropout; move 0\.1 there"),
        ("distilbert", {"attention_dropout": 0.1}, r"set by model\.attention_dropout"),
        ("distilbert", {"type_vocab_size": 2}, r"type_vocab_size .* is unknown"),
        ("modernbert", {"mlp_dropout": 0.1}, r"set by model\.hidden_dropout"),
        ("modernbert", {"hidden_activation": "jelu"}, r"hidden_activation 'jelu' is unknown; ModernBERT's is gelu"),
        ("modernbert", {"norm_bias": "perhaps"}, r"ModernBertConfig refuses .*norm_bias"),
        ("electra", {"embedding_size": -1}, r"embedding_size -1 is not a size"),
        ("distilbert", {"n_heads": 5}, r"n_heads 5 does not divide dim 768"),
        (
            "modernbert",
            {"hidden_size": 36, "num_attention_heads": 4},
            r"hidden_size 36 over num_attention_heads 4 makes heads of size 9; .* even",
        ),
    ],
)
def test_what_no_model_can_have_is_named(model_type: str, values: dict[str, Any], message: str) -> None:
    cfg = ModelConfig(config={"model_type": model_type, "max_position_embeddings": 40, **values})
    with pytest.raises(UserError, match=message):
        load_config(cfg, vocab_size=99, pad_token_id=0)


def test_names_that_transformers_takes_for_all_are_taken_for_distilbert() -> None:
    cfg = ModelConfig(
        config={"model_type": "distilbert", "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    )
    made = load_config(cfg, vocab_size=99, pad_token_id=0)
    assert (made.dim, made.n_heads, made.n_layers) == (64, 2, 3)


def test_dropout_goes_where_the_family_has_it() -> None:
    for model_type, keys in (("distilbert", ["dropout"]), ("modernbert", ["embedding_dropout", "mlp_dropout"])):
        cfg = section(model_type)
        cfg.hidden_dropout, cfg.attention_dropout = 0.25, 0.5
        made = load_config(cfg, vocab_size=99, pad_token_id=0)
        assert [getattr(made, key) for key in keys] == [0.25] * len(keys) and made.attention_dropout == 0.5
        assert families.of(made).dropouts(made) == (0.5, 0.25)


def test_what_windows_cannot_do_is_refused() -> None:
    made = config("modernbert")
    on_gpu: dict[str, Any] = {"capability": (9, 0), "precision": "bf16"}
    name, note = choose_for("auto", made, labels="masked", **on_gpu)
    assert name == "auto" and note is not None and "some layers of this model see a window only" in note
    with pytest.raises(UserError, match=r"model\.attention: 'varlen' is not possible: some layers"):
        choose_for("varlen", made, labels="masked", **on_gpu)
    with pytest.raises(UserError, match=r"mask\.labels: all_with_padding is not possible with a modernbert"):
        choose_for("auto", made, labels="all_with_padding", **on_gpu)
    assert choose_for("auto", config("roberta", hidden_size=64), labels="masked", **on_gpu) == ("varlen", None)


# ---- checkpoints ----


def save(model_type: str, path: Path) -> tuple[PreTrainedModel, ModelConfig]:
    model = small(model_type, VOCABULARY, PAD)
    model.save_pretrained(path)
    return model, ModelConfig(init="pretrained", name_or_path=str(path), hidden_dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize("model_type", OTHERS)
def test_checkpoints_load_to_the_bit(model_type: str, tmp_path: Path) -> None:
    model, cfg = save(model_type, tmp_path)
    loaded = build(cfg, load_config(cfg, vocab_size=None, pad_token_id=PAD), seed=3)
    assert type(loaded) is type(model) is type(AutoModelForMaskedLM.from_pretrained(tmp_path))
    for (name, one), (_, other) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# What the config.json of well-known checkpoints hold beside sizes; layers and widths are smaller.
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "roberta": {"bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-05, "type_vocab_size": 1},
    "xlm-roberta": {"output_past": True, "position_embedding_type": "absolute", "use_cache": True},
    "distilbert": {"tie_weights_": True, "sinusoidal_pos_embds": False, "seq_classif_dropout": 0.2, "qa_dropout": 0.1},
    "electra": {"summary_activation": "gelu", "summary_last_dropout": 0.1, "summary_type": "first", "hidden_size": 64},
    "modernbert": {
        "classifier_pooling": "mean",
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "layer_norm_eps": 1e-05,
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
        "torch_dtype": "float32",
        "transformers_version": "4.47.0.dev0",
    },
}


@pytest.mark.parametrize("model_type", AS_PUBLISHED)
def test_published_checkpoints_load_with_what_else_they_hold(model_type: str, tmp_path: Path) -> None:
    """Older ones hold a table of positions' numbers and a pooler, too."""
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "pad_token_id": PAD}
    values = {"model_type": model_type, **sizes, **SIZES[model_type], **AS_PUBLISHED[model_type]}
    kind = families.config_class(model_type)
    model = families.new(kind.from_dict({key: value for key, value in values.items() if key != "model_type"}))
    base = model.base_model_prefix
    extra = {
        f"{base}.embeddings.position_ids": torch.arange(POSITIONS)[None],
        f"{base}.pooler.dense.bias": torch.ones(32),
    }
    tied = set(model._tied_weights_keys)
    weights = {name: value.clone() for name, value in model.state_dict().items() if name not in tied}
    save_file(
        weights | (extra if model_type in ("roberta", "xlm-roberta") else {}),
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(values))
    cfg = ModelConfig(init="pretrained", name_or_path=str(tmp_path))
    loaded = build(cfg, load_config(cfg, vocab_size=None, pad_token_id=PAD), seed=0)
    for (name, one), (_, other) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("model_type", OTHERS)
def test_an_encoder_alone_gets_a_new_head_and_half_an_encoder_is_refused(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, cfg = save(model_type, tmp_path / "whole")
    cfg.name_or_path = str(tmp_path / "encoder")
    model.base_model.save_pretrained(cfg.name_or_path)
    sizes = load_config(cfg, vocab_size=None, pad_token_id=PAD)
    with caplog.at_level(logging.WARNING):
        loaded = build(cfg, sizes, seed=3)
    assert "has no masked-LM head, new from the seed" in caplog.text
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    del families.layers(model)[-1]
    model.base_model.save_pretrained(cfg.name_or_path)
    (tmp_path / "encoder/config.json").write_text((tmp_path / "whole/config.json").read_text())
    with pytest.raises(UserError, match=r"lacks .* weights of the encoder"):
        build(cfg, sizes, seed=3)


@pytest.mark.parametrize(
    ("model_type", "values"), [*((name, {}) for name in OTHERS), ("modernbert", {"decoder_bias": False})]
)
def test_new_tokens_score_as_the_mean_of_their_pieces(model_type: str, values: dict[str, Any]) -> None:
    model = small(model_type, VOCABULARY, PAD, **values).eval()
    ids = torch.tensor([[5, 9, 20, 31]])
    with torch.no_grad():
        before = model(ids).logits
        add_tokens(model, NewTokens(VOCABULARY, ((7, 8), (9, 10, 11))))
        after = model(ids).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before)
    means = torch.stack([before[..., [7, 8]].mean(-1), before[..., [9, 10, 11]].mean(-1)], -1)
    torch.testing.assert_close(after[..., VOCABULARY:], means)
    decoder = model.get_output_embeddings()
    assert model.config.vocab_size == len(decoder.weight) == VOCABULARY + 2
    assert decoder.bias is None if values else len(decoder.bias) == VOCABULARY + 2


ROTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "proportional": {"partial_rotary_factor": 0.5},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 12,
    },
}


@pytest.mark.parametrize("rope_type", ROTATIONS)
def test_no_document_turns_another_further(rope_type: str, tmp_path: Path) -> None:
    """Beside a document past the length that the frequencies were scaled from, a short one is what it is alone, or the model is refused."""
    _, cfg = save("modernbert", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for rotation in values["rope_parameters"].values():
        rotation |= {"rope_type": rope_type, **ROTATIONS[rope_type]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if rope_type in ("dynamic", "longrope"):
        with pytest.raises(UserError, match=rf"full_attention\.rope_type '{rope_type}' cannot be trained here"):
            load_config(cfg, vocab_size=None, pad_token_id=PAD)
        return
    sizes = load_config(cfg, vocab_size=None, pad_token_id=PAD)
    module = MaskedLM(build(cfg, sizes, seed=0).eval(), "eager")
    places = torch.cat([torch.arange(8), torch.arange(POSITIONS - 8)])[None]
    documents = torch.tensor([[1] * 8 + [2] * (POSITIONS - 8)])
    ids = torch.arange(POSITIONS)[None] + 5
    with torch.no_grad():
        beside = module.encode(ids, places, documents)[:, :8]
        alone = module.encode(ids[:, :8], places[:, :8], documents[:, :8])
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)


def test_another_padding_token_would_move_robertas_positions(tmp_path: Path) -> None:
    _, cfg = save("roberta", tmp_path)
    assert load_config(cfg, vocab_size=None, pad_token_id=None).pad_token_id == PAD
    with pytest.raises(
        UserError, match=r"data\.tokenizer: its padding token is 0, that of .* is 1, and a RoBERTa counts"
    ):
        load_config(cfg, vocab_size=None, pad_token_id=0)


def test_other_architectures_are_refused_before_their_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    for model_type, reason in (
        ("bart", "encoder with a decoder"),
        ("deberta", "its attention is its own"),
        ("x", "nobody has shown"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UserError, match=rf"type '{model_type}', which cannot be trained here: .*{reason}"):
            load_config(ModelConfig(init="pretrained", name_or_path=str(tmp_path)), vocab_size=None, pad_token_id=0)


# ---- planning ----


@pytest.mark.parametrize("model_type", ALL)
def test_flops_are_those_of_the_products_that_run(model_type: str) -> None:
    """Against torch's own counter, with windows that see the whole row: masked products are computed too."""
    sizes = config(model_type, **({"local_attention": 64} if model_type == "modernbert" else {}))
    module = MaskedLM(families.new(sizes), "eager")
    rows, length, selected = 3, 16, 12
    ids, chosen = torch.full((rows, length), 5), torch.arange(selected)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(ids, torch.arange(length).expand(rows, -1), chosen, chosen, torch.ones_like(ids))
        loss.backward()
    expected = counter.get_total_flops() / (rows * length)
    assert flops_per_token(sizes, attended=length, selected=selected / (rows * length)) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("length", [1, 3, 4, 5, 20])
def test_windows_count_what_they_let_see(length: int) -> None:
    sizes = config("modernbert")
    masks = with_windows(segment_mask(torch.ones(1, length, dtype=torch.int64), torch.float32), sizes)
    pairs = sum(int((masks[kind] == 0).sum()) for kind in sizes.layer_types)
    without = flops_per_token(sizes, attended=0, selected=0.0)
    here = flops_per_token(sizes, attended=length, selected=0.0)
    assert here - without == pytest.approx(3 * 4 * sizes.hidden_size * pairs / length)


@pytest.mark.parametrize(("longest", "most"), [(512, 0.012), (8192, 0.02)])
def test_the_mean_of_mixed_lengths_is_a_near_upper_bound(longest: int, most: float) -> None:
    """What a token sees is concave in the length of its segment, so no mixture is worse than one of the shortest and the longest."""
    sizes = families.config_class("modernbert")()
    short, long = (flops_per_token(sizes, attended=length, selected=0.15) for length in (1, longest))
    over = []
    for share in (n / 1000 for n in range(1001)):
        exact = share * long + (1 - share) * short
        over.append(flops_per_token(sizes, attended=share * longest + 1 - share, selected=0.15) / exact - 1)
    assert min(over) > -1e-12 and 0.8 * most < max(over) < most


@pytest.mark.parametrize(
    ("model_type", "values"), [*((name, {}) for name in ALL), ("modernbert", {"decoder_bias": False})]
)
def test_the_planner_counts_the_parameters_that_are(model_type: str, values: dict[str, Any]) -> None:
    sizes = config(model_type, **values)
    built = families.new(sizes)
    groups = {group["name"]: group["params"] for group in param_groups(built, 0.1)}
    planned = Model.of(sizes)
    assert planned.parameters == sum(p.numel() for p in built.parameters())
    in_order, found = planned.decayed, [p.numel() for p in groups["decay"]]
    assert sorted(in_order) == sorted(found) if families.FAMILIES[model_type].after_padding else in_order == found
    assert sum(planned.others) == sum(p.numel() for p in groups["no_decay"])
    assert planned.products == sum(p.numel() for p in families.layers(built)[0].parameters() if p.ndim == 2)
    assert planned.largest == max(p.numel() for p in built.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra", "modernbert"])
def test_a_trial_takes_what_the_planner_predicts(model_type: str, precision: str) -> None:
    """Other settings are measured by `benchmarks.memory`."""
    setting = Setting(model_type=model_type, precision=precision, micro_batch=8, vocab=2048, hidden_dropout=0.0)
    job = setting.job()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        assert trial(lambda: module(setting), job, 0, torch.device("cpu"))
    assert bare(job) == pytest.approx(peaks(profiler)["peak"], rel=0.1)


def test_the_planner_knows_the_sizes_of_the_usual_checkpoints() -> None:
    """Without a hub. The numbers are those of the model cards: 125 M, 66 M (67 with the head), 149 M."""
    sizes = {}
    for name in ("FacebookAI/roberta-base", "distilbert-base-uncased", "answerdotai/ModernBERT-base"):
        flags = ["--model.init", "pretrained", "--model.name_or_path", name, "--model.config", "null"]
        read = load(["--config", str(ROOT / "recipes/smoke.yaml"), *flags, "--data.tokenizer", name]).config
        sizes[name] = round(Model.of(plan_command.sizes(read)).parameters / 1e6)
    assert list(sizes.values()) == [125, 67, 150]
