"""The planner's arithmetic and its command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlm_dist import choice, cli
from mlm_dist.choice import Option, Way
from mlm_dist.config import load
from mlm_dist.ds_config import load_template
from mlm_dist.model.bert import ModelConfig, build, load_config
from mlm_dist.plan import Prediction, bare, predict
from mlm_dist.plan_job import Job, Model

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": 301,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 70,
    "max_position_embeddings": 40,
}


def model() -> Model:
    return Model.of(load_config(ModelConfig(config=SIZES), vocab_size=301, pad_token_id=0))


def job(template: str = "zero0", **changes: Any) -> Job:
    base = Model(30522, 768, 12, 12, 3072, 512, 2)
    zero = load_template(template)["zero_optimization"]
    return replace(Job(base, zero, 8, 8, 512, 0.15), **changes)


def needs(template: str = "zero0", **changes: Any) -> int:
    return predict(job(template, **changes)).total


def test_parameters_are_those_of_the_model() -> None:
    section = ModelConfig(config=SIZES)
    built = build(section, load_config(section, vocab_size=301, pad_token_id=0), seed=0)
    sizes = {name: p.numel() for name, p in built.named_parameters()}
    assert model().parameters == sum(sizes.values())
    assert model().largest == max(sizes.values())
    decayed = [n for name, n in sizes.items() if not name.endswith("bias") and "LayerNorm" not in name]
    assert model().decayed == decayed


@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_a_partition_is_the_parameters_that_it_cuts(world: int) -> None:
    decayed = model().decayed
    size = -(-sum(decayed) // world)
    starts = [sum(decayed[:i]) for i in range(len(decayed))]
    most = max(
        sum(n for start, n in zip(starts, decayed, strict=True) if start < (r + 1) * size and start + n > r * size)
        for r in range(world)
    )
    assert model().in_partition(world) == most + -(-(model().parameters - sum(decayed)) // world)


@pytest.mark.parametrize("template", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_more_rows_need_more_and_more_ranks_or_recomputation_never_do(template: str) -> None:
    rows = [needs(template, micro_batch=n) for n in (1, 2, 8, 64)]
    assert rows == sorted(rows)
    assert rows[-1] > rows[0]
    ranks = [needs(template, world_size=n) for n in (2, 8, 64)]
    assert ranks == sorted(ranks, reverse=True)
    assert needs(template, micro_batch=64, checkpoint_activations=True) < needs(template, micro_batch=64) / 2


def test_what_a_template_is_for_shows() -> None:
    zero0, zero1, zero2 = (needs(t, world_size=64) for t in ("zero0", "zero1", "zero2"))
    assert zero0 > zero1 > needs("zero3", world_size=64)
    assert zero2 < zero0
    offloaded = predict(job("zero2_offload", world_size=1))
    assert offloaded.total < needs("zero2", world_size=1)
    assert offloaded.total_host > 14 * job().model.parameters
    assert predict(job("zero2")).total_host == 0


def test_the_head_in_chunks_does_not_grow_with_the_labels() -> None:
    chunked = [needs(micro_batch=64, selected=share, head_chunk=1024) for share in (0.15, 1.0)]
    assert chunked[1] < 1.02 * chunked[0]
    assert needs(micro_batch=64, selected=1.0, head_chunk=1 << 20) > chunked[1] + 10 * 64 * 512 * 30522


def plan(capsys: pytest.CaptureFixture[str], *flags: str, recipe: str = "bert_base") -> tuple[int, str]:
    code = cli.main(["plan", "--config", str(ROOT / f"recipes/{recipe}.yaml"), *flags])
    return code, capsys.readouterr().out


def test_the_command_needs_no_data_and_names_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.config.vocab_size", "30522", "--world-size", "8", "--json"]
    code, out = plan(capsys, "--device-memory", "80GiB", *flags)
    wide = json.loads(out)["choice"]
    assert code == 0
    assert (wide["template"], wide["checkpoint_activations"], wide["micro_batch"]) == ("zero0", False, 32)
    found = json.loads(plan(capsys, "--device-memory", "4GiB", *flags)[1])
    choice = found["choice"]
    room = found["device_memory"] - found["reserve"]
    assert choice["device_bytes"] == sum(choice["device"].values()) <= room / 1.1
    # Nothing before it in the order fits with 4,096 tokens.
    way = choice["template"], choice["checkpoint_activations"]
    ways = [(option["template"], option["checkpoint_activations"]) for option in found["options"]]
    before = [option for option in found["options"][: ways.index(way)] if option["micro_batch"] >= 8]
    assert choice["micro_batch"] >= 8 and before
    assert all(option["device_bytes"] > room / 1.1 for option in before)


def option(way: Way, micro_batch: int, nbytes: int) -> Option:
    return Option(way, micro_batch, Prediction("step", {"activations": nbytes}, {}))


def test_a_way_with_enough_tokens_goes_before_an_earlier_one_with_few() -> None:
    first, second = Way("zero0", False), Way("zero1", True)
    options = [option(first, 1, 60), option(first, 8, 200), option(second, 1, 30), option(second, 8, 90)]
    found = choice.choose(options, 100, "cuda", enough=8)
    assert found is not None and (found.way, found.micro_batch) == (second, 8)
    # The first is good enough where it has the rows, and where no way has.
    for memory, enough, rows in ((300, 8, 8), (100, 1, 1), (80, 8, 1)):
        found = choice.choose(options, memory, "cuda", enough=enough)
        assert found is not None and (found.way, found.micro_batch) == (first, rows)
    assert choice.choose(options, 30, "cuda", enough=8) is None


def test_enough_is_4096_tokens_or_the_whole_share() -> None:
    config = load(["--config", str(ROOT / "recipes/bert_base.yaml")]).config
    assert choice.enough(config, 8) == 8
    assert choice.enough(config, 64) == 4


def test_a_trial_of_what_offload_is_for_holds_no_gradients() -> None:
    large = Model(30522, 1024, 24, 16, 4096, 512, 2)
    shape: dict[str, Any] = {"model": large, "micro_batch": 1, "attention": "varlen"}
    for template in ("zero2", "zero2_offload", "zero3_offload"):
        found = bare(job(template, **shape))
        assert found < 4 * large.parameters * 2 <= bare(job("zero0", **shape))
    assert bare(job("zero2_offload", checkpoint_activations=True, **shape)) < needs(
        "zero2_offload", checkpoint_activations=True, **shape
    )


def test_the_command_says_by_how_much_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = plan(capsys, "--device-memory", "1GiB", "--reserve", "900MiB", recipe="two_gib")
    assert code == 1
    assert "nothing fits: zero3_offload + checkpointing with micro-batches of 1 needs" in " ".join(out.split())


def test_the_2_gib_recipe_is_what_the_planner_names_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = plan(capsys, "--device-memory", "2GiB", "--json", recipe="two_gib")
    choice = json.loads(out)["choice"]
    assert code == 0
    assert (choice["template"], choice["checkpoint_activations"], choice["micro_batch"]) == ("zero2_offload", True, 1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device-memory", "lots"], "--device-memory: 'lots' is not a size"),
        (["--device-memory", "2GiB", "--world-size", "0"], "--world-size: 0"),
        (["--device-memory", "2GiB", "--world-size", "2"], r"train.global_batch: 1 rows cannot feed 2 ranks"),
        (["--device-memory", "512MiB"], "--device-memory: 512MiB leaves nothing beside --reserve, 0.62 GiB"),
        (
            ["--device-memory", "2GiB", "--train.precision", "bf16_pure", "--optim.name", "lamb"],
            "no deepspeed.config goes with train.precision bf16_pure and optim.name lamb: optim.name: lamb scales",
        ),
        (
            ["--device-memory", "2GiB", "--model.init", "run", "--model.name_or_path", "runs/none"],
            "model.name_or_path: runs/none is no run",
        ),
    ],
)
def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert cli.main(["plan", "--config", str(ROOT / "recipes/two_gib.yaml"), *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_notes_say_what_the_table_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device-memory", "16GiB", "--model.config.vocab_size", "30522"]
    alone = plan(capsys, *flags)[1]
    assert "zero1, zero2, zero3 run as ZeRO stage 0" in alone
    assert "dealt evenly" not in alone and "liger" not in alone
    (dealt, head) = json.loads(plan(capsys, *flags, "--world-size", "2", "--model.head", "liger", "--json")[1])["notes"]
    assert "dealt evenly" in dealt and "liger" in head
    # There stages 1 to 3 are what they are.
    assert "run as ZeRO stage 0" not in plan(capsys, *flags, "--train.precision", "bf16_pure")[1]
