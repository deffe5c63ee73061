"""The planner's cluster: speeds, traffic, what grows, the command and the page that shows it."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlm_dist import checkpoint, cli
from mlm_dist.doctor import job, network
from mlm_dist.ds_config import load_template
from mlm_dist.model.bert import ModelConfig, build, load_config
from mlm_dist.plan_cluster import (
    CLOCK_TRIPS,
    DOCTOR_BYTES,
    Cluster,
    Collective,
    checkpoint_cost,
    collectives,
    costs,
    intra_of,
    parse_speed,
    traffic,
)
from mlm_dist.plan_job import Model

ROOT = Path(__file__).resolve().parents[2]
BASE = Model(30522, 768, 12, 12, 3072, 512, 2)
LARGE = Model(30522, 1024, 24, 16, 4096, 512, 2)
CLUSTER = Cluster(64, 8, interconnect=50e9, intra=450e9, storage=5e9)
FLAGS = ["--nodes", "64", "--gpus-per-node", "8", "--interconnect", "400Gb"]


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("400Gb", 50e9),
        ("10Gb", 1.25e9),
        ("25Gbit/s", 3.125e9),
        ("50GB", 50e9),
        ("1.5 GB/s", 1.5e9),
        ("100Mbps", 12.5e6),
    ],
)
def test_bits_and_bytes_are_told_apart(text: str, speed: float) -> None:
    assert parse_speed(text) == speed


@pytest.mark.parametrize("text", ["", "400", "400gb", "fast", "-1Gb", "0Gb", "400GiB", "1e3Gb"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a speed: write 400Gb"):
        parse_speed(text)


def test_parameters_that_do_not_decay_are_those_of_the_model() -> None:
    sizes = {
        "vocab_size": 301,
        "hidden_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 70,
    }
    section = ModelConfig(config=sizes)
    bert = load_config(section, vocab_size=301, pad_token_id=0)
    built = build(section, bert, seed=0)
    bare = [p.numel() for n, p in built.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
    assert sorted(Model.of(bert).others) == sorted(bare)


def moved(template: str, model: Model = BASE, **changes: Any) -> list[Collective]:
    zero = load_template(template)["zero_optimization"]
    return collectives(model, zero, **({"ranks": 512, "micro_batches": 1, "precision": "bf16"} | changes))


def sent(template: str, model: Model = BASE, **changes: Any) -> float:
    return sum(c.sent(changes.get("ranks", 512)) for c in moved(template, model, **changes))


def test_accumulation_costs_stage_2_and_3_traffic_and_others_none() -> None:
    for template, more in (("zero0", False), ("zero1", False), ("zero2", True), ("zero3", True)):
        assert (sent(template, micro_batches=4) > 2 * sent(template)) == more, template


def test_traffic_of_a_rank_stays_however_many_there_are() -> None:
    for template in ("zero0", "zero1", "zero2", "zero3"):
        assert sent(template, ranks=4096) < 1.02 * sent(template, ranks=64)
        assert moved(template, ranks=1) == []


def test_what_stage_3_may_gather_again_is_a_bound() -> None:
    assert all(c.exact for c in moved("zero3"))
    (gather,) = (c for c in moved("zero3", LARGE) if c.kind == "all-gather")
    assert not gather.exact
    assert 2 * LARGE.parameters < gather.elements < 2.2 * LARGE.parameters
    assert all(c.exact for c in moved("zero3", LARGE) if c.kind != "all-gather")


def test_the_slower_link_decides_and_one_node_crosses_none() -> None:
    found = traffic(moved("zero0"), CLUSTER)
    assert found.seconds == found.between == pytest.approx(2 * 511 / 512 * 4 * BASE.parameters / 50e9)
    alone = traffic(moved("zero0", ranks=8), replace(CLUSTER, nodes=1))
    assert alone.between == 0 and alone.seconds == alone.within > 0
    assert traffic(moved("zero0", ranks=64), replace(CLUSTER, gpus=1)).within == 0


def test_gpus_without_nvlink_get_pcie() -> None:
    assert intra_of("NVIDIA H100 80GB HBM3") == 450e9
    assert intra_of("NVIDIA H100 PCIe") == intra_of("NVIDIA L40S") == intra_of("T4") == intra_of("V100-PCIE") == 32e9
    assert intra_of("AMD Instinct MI300X") is None


def test_a_checkpoint_is_as_the_program_writes_it(tmp_path: Path) -> None:
    import torch

    small = Model(60, 12, 1, 3, 20, 16, 2)
    tensors = {f"{k}/{i}": torch.zeros(n) for k in "pmv" for i, n in enumerate([*small.decayed, *small.others])}
    owners = checkpoint.assign({k: t.numel() for k, t in tensors.items()}, 5)
    writers = [checkpoint.Writer(tmp_path, checkpoint.CheckpointConfig(), rank, 5, 1) for rank in range(5)]
    for rank, writer in enumerate(writers):
        writer.save(1, {k: t for k, t in tensors.items() if owners[k] == rank}, owners, {}, {"step": 1})
    for writer in writers:
        writer.wait()
    found = list((tmp_path / "checkpoints" / checkpoint.name(1)).iterdir())
    cost = checkpoint_cost(small, 5)
    assert cost.files == len(found)
    assert cost.tensors == len(tensors)
    data = [path.stat().st_size for path in found if path.suffix == ".safetensors"]
    header = 120 * len(tensors)  # names, types, offsets
    assert cost.nbytes <= sum(data) <= cost.nbytes + header
    assert cost.largest <= max(data) <= cost.largest + header


def test_costs_grow_as_they_say() -> None:
    exponent = {"constant": 0, "logarithmic": 0.2, "linear": 1, "quadratic": 2, "cubic": 3}
    for now, then in zip(costs(BASE, CLUSTER, 960), costs(BASE, replace(CLUSTER, nodes=128), 960), strict=True):
        assert now.what == then.what and now.grows == then.grows
        assert 0.95 <= then.value / now.value <= 1.05 * 2 ** exponent[now.grows], now
        if exponent[now.grows] >= 1:
            assert then.value / now.value > 1.8 * 2 ** (exponent[now.grows] - 1), now


def plan(capsys: pytest.CaptureFixture[str], *flags: str, recipe: str = "bert_base") -> tuple[int, str, str]:
    code = cli.main(["plan", "--config", str(ROOT / f"recipes/{recipe}.yaml"), *flags])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*FLAGS[:4], "--interconnect", "fast"], "--interconnect: 'fast' is not a speed: write 400Gb"),
        ([*FLAGS, "--intra", "900"], "--intra: '900' is not a speed"),
        ([*FLAGS, "--storage", "0GB"], "--storage: '0GB' is not a speed"),
        ([*FLAGS, "--world-size", "8"], "--world-size: 8 contradicts --nodes 64 x --gpus-per-node 8 = 512 ranks"),
        ([*FLAGS, "--mfu", "40"], "--mfu: 40.0 must be a share"),
        ([*FLAGS, "--gpu", "abacus", "--intra", "5GB"], "--gpu: the peak of 'abacus' in bf16 is not known"),
        ([*FLAGS[:4]], "--interconnect is missing"),
        (["--nodes", "0", "--interconnect", "400Gb"], "--nodes: 0 must be at least 1"),
        (["--interconnect", "400Gb"], "--interconnect: is of a cluster; give --nodes, too"),
        (["--mfu", "0.5"], "--mfu: is of a cluster; give --nodes, too"),
        (["--storage", "5GB"], "--storage: is of a cluster; give --nodes, too"),
        (["--gpu", "A100"], "--gpu: is of a cluster; give --nodes, too"),
        ([*FLAGS, "--gpu", "MI300X"], "--intra is missing: the links of 'MI300X' are not known"),
        ([], "--device-memory is missing"),
        ([*FLAGS, "--device-memory", "80GiB"], "train.global_batch: 256 rows cannot feed 512 ranks"),
    ],
)
def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    vocabulary = ["--model.config.vocab_size", "30522"]
    code, _, err = plan(capsys, *vocabulary, *flags)
    assert code == 2
    assert said in err


def test_json_holds_the_cluster_and_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, *FLAGS, "--json")
    found = json.loads(out)["cluster"]
    assert code == 0
    assert found["cluster"]["ranks"] == 512 and found["step"]["global_batch"] == 512 * 32
    assert [t["template"] for t in found["templates"]] == [
        "zero0",
        "zero1",
        "zero2",
        "zero3",
        "zero2_offload",
        "zero3_offload",
    ]
    for t in found["templates"]:
        assert t["sent_bytes"] == sum(c["sent"] for c in t["collectives"])
        assert t["between_s"] == t["at_links_s"]["400Gb"]
        assert t["share_of_compute"] == pytest.approx(t["between_s"] / found["step"]["compute_s"])
    assert found["costs"] and any("has no row for each of 512 ranks" in note for note in found["notes"])
    both = ["--model.config.vocab_size", "30522", "--train.global_batch", "4096", "--device-memory", "80GiB"]
    code, out, _ = plan(capsys, *FLAGS, *both, "--json")
    assert code == 0
    assert json.loads(out)["choice"] and json.loads(out)["cluster"]["step"]["micro_batches"] == 1


def test_one_node_needs_no_interconnect(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--nodes", "1", "--gpus-per-node", "2")
    assert code == 0 and out.startswith("1 node x 2 GPUs = 2 ranks; each way 450 GB/s a GPU within one; storage")
    assert "between nodes" not in out
    code, out, _ = plan(capsys, "--nodes", "1", "--gpus-per-node", "1", "--gpu", "MI300X", "--json")
    found = json.loads(out)["cluster"]
    assert code == 0 and all(t["between_s"] == t["within_s"] == t["sent_bytes"] == 0 for t in found["templates"])


def test_a_tokenizer_that_is_not_there_is_told_and_no_hub_is_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlm_dist.data import tokenizer

    monkeypatch.setattr(tokenizer, "load_pretrained", lambda *_: pytest.fail("asked"))
    _, out, _ = plan(capsys, *FLAGS, "--data.tokenizer", "somebody/tokenizer")
    assert "note: data.tokenizer 'somebody/tokenizer' cannot be loaded; taken as 30522 words" in out
    _, out, _ = plan(capsys, *FLAGS, "--data.tokenizer", "bert-base-cased")
    assert "with 28996 words" in out and "cannot be loaded" not in out


def test_what_the_doctor_costs_is_counted_as_it_works() -> None:
    assert (job.READ_BYTES, network.CLOCK_TRIPS) == (DOCTOR_BYTES, CLOCK_TRIPS)


def test_the_page_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)  # where no data is
    blocks = re.findall(
        r"^    \$ mlm-dist (plan .*)\n((?:    .*\n|\n)*?)(?=\n*^[^ \n])", (ROOT / "docs/scale.md").read_text(), re.M
    )
    assert len(blocks) == 2
    for command, shown in blocks:
        assert cli.main(shlex.split(command)) == 0
        lines = [line.removeprefix("    ").rstrip() for line in shown.rstrip().splitlines()]
        assert lines == [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
