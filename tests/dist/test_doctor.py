"""The doctor over real ranks: hosts of other names in one machine, each with what is wrong with it."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist.distributed import Topology
from mlm_dist.doctor import command, host, network
from mlm_dist.doctor.network import bus_bandwidth
from tests.e2e.program import save_config
from tests.ranks import run_ranks

TARGET = "tests.dist.test_doctor:examine"
Content = dict[str, Any]


def fails(_device: torch.device) -> dict[str, float]:
    raise RuntimeError("CUDA out of memory")


def examine(
    config: str,
    hosts: list[str],
    own_flags: dict[int, list[str]] | None = None,
    version: int | None = None,
    clock: int | None = None,
    slow: int | None = None,
    hang: int | None = None,
    away: int | None = None,
    wait: float = 60.0,
    full: int | None = None,
    idle: float = 0.0,
) -> tuple[int, Content]:
    """Called on every rank, of which those named have another version, a clock 90 s ahead, a slow link, a link that hangs, or
    do not come at all."""
    topology = Topology.from_env()
    rank = topology.rank
    topology = replace(topology, local_rank=hosts[:rank].count(hosts[rank]))
    if rank == away:
        return 0, {}
    if rank == full:
        network.speed = fails
    if idle:  # the others have a part in what lasts longer than any operation may
        network.TIMEOUT_S = 0.75 * idle
        measured = network.links
        network.links = lambda *args: [time.sleep(idle), measured(*args)][1]
    host.name = lambda: hosts[rank]
    if rank == version:
        real = host.versions
        host.versions = lambda: real() | {"torch": "2.0.0"}
    if rank == clock:
        network.now = lambda: time.time() + 90
    exchange = network.exchange

    def late(tensor: torch.Tensor, peer: int, first: bool, group: dist.ProcessGroup) -> None:
        time.sleep(0.02 if tensor.numel() < 100 else 0.3)
        exchange(tensor, peer, first, group)

    def never(*_args: Any) -> None:
        time.sleep(4)
        raise RuntimeError("the link is dead")

    if rank == slow:
        network.exchange = late
    if rank == hang:
        network.exchange = never
    network.TIMEOUT_S = 2.0 if hang is not None else network.TIMEOUT_S
    flags = ["--deepspeed.config", "zero1", *(own_flags or {}).get(rank, [])]
    return command.diagnose(Namespace(config=config, quick=True, json=True, wait=wait), flags, topology)


def found(content: Content, check: str) -> list[dict[str, str]]:
    """Findings of a check that are not green."""
    return [f for f in content["findings"] if f["check"] == check and f["level"] != "green"]


def test_each_host_is_named_with_what_is_wrong_with_it(tmp_path: Path) -> None:
    config = save_config(tmp_path)
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "corpus", other)
    (victim,) = other.glob("*-00001.tar")
    victim.unlink()
    args = {
        "config": str(config),
        "hosts": ["a", "b", "c"],
        "own_flags": {2: ["--data.manifest", str(other / "manifest.json")]},
        "version": 1,
        "clock": 2,
        "slow": 1,
    }
    results = run_ranks(TARGET, world=3, args=args, timeout=200)
    assert [code for code, _ in results] == [1, 0, 0]
    content = results[0][1]
    assert content["level"] == "red" and content["hosts"] == {"a": [0], "b": [1], "c": [2]}
    (versions,) = found(content, "versions")
    assert versions["level"] == "red" and "torch: 2.0.0 on b" in versions["message"]
    (clocks,) = found(content, "clocks")
    assert clocks["level"] == "red" and "c is 90.0 s ahead" in clocks["message"] and "b is" not in clocks["message"]
    for check, level in (("link bandwidth (gloo)", "red"), ("link latency (gloo)", "yellow")):
        (link,) = found(content, check)
        assert link["level"] == level and "slowest is b" in link["message"] and "slow too" not in link["message"]
    (shard,) = found(content, "shards")
    assert shard["level"] == "red" and shard["message"].startswith("c: 1 of 3 shards of data.manifest")
    assert victim.name in shard["message"]
    (config_differs,) = found(content, "config")
    assert "on rank 2 (c)" in config_differs["message"]
    assert [row["group"] for row in content["collectives"]] == ["all ranks"]  # which are those across hosts
    assert found(content, "run directory") == [] and found(content, "network") == []
    assert all(f["remedy"] for f in content["findings"] if f["level"] != "green")
    assert not list(tmp_path.glob(".doctor*"))


def test_two_hosts_of_two_ranks_are_measured_within_and_across(tmp_path: Path) -> None:
    args = {"config": str(save_config(tmp_path)), "hosts": ["a", "a", "b", "b"], "idle": 8.0, "own_flags": {3: ["--train.steps", "13"]}}
    results = run_ranks(TARGET, world=4, args=args, timeout=200)
    content = results[0][1]
    # One machine stands for two hosts, so what it says of their speed may be anything; the rest is in order.
    odd = {f["check"] for f in content["findings"] if f["level"] != "green"}
    assert odd <= {"compute", "memory", "within host (gloo)", "batch", "config"}
    (ranks,) = (f["message"] for f in content["findings"] if f["check"] == "ranks")
    assert ranks == "4 on 2 hosts, 2 on each"
    (config,) = found(content, "config")
    assert config["level"] == "red" and "on rank 3 (b)" in config["message"]
    (batch,) = found(content, "batch")  # 12 rows on 4 ranks of 3 places
    assert batch["level"] == "yellow"
    groups = {(row["group"], row["host"]): row["ranks"] for row in content["collectives"]}
    assert groups == {("within host", "a"): 2, ("within host", "b"): 2, ("all ranks", None): 4, ("across hosts", None): 2}
    for row in content["collectives"]:
        assert row["latency_us"] > 0 and list(row["gb_s"]) == [str(size) for size in network.SIZES[:2]]
    measured = content["facts"]["network"][0]["collectives"]
    for one in measured:
        (row,) = (r for r in content["collectives"] if r["group"] == one["group"] and r["host"] in (None, "a"))
        assert [bus_bandwidth(size, t, one["ranks"]) / 1e9 for size, t in one["rows"][1:]] == list(row["gb_s"].values())
    (offset,) = content["facts"]["network"][0]["clock"]
    assert abs(offset["offset"]) <= offset["uncertain"] + 1e-3  # it is the same clock
    (link,) = content["facts"]["network"][0]["links"]
    assert link["ranks"] == [0, 2] and link["bandwidth"] > 0


def test_a_rank_that_does_not_come_is_named_by_the_first_and_the_others_leave_it_the_word(tmp_path: Path) -> None:
    args = {"config": str(save_config(tmp_path)), "hosts": ["a", "b", "c"], "away": 1, "wait": 5.0}
    (code, content), _, (other, nothing) = run_ranks(TARGET, world=3, args=args, timeout=120)
    assert (code, other, nothing["findings"]) == (1, 0, [])
    (finding,) = content["findings"]
    assert finding["level"] == "red" and "rank 1 of 3 did not come within 5 s; here are a (1), c (1)" in finding["message"]


def test_a_link_that_hangs_ends_the_measuring_and_not_the_doctor(tmp_path: Path) -> None:
    args = {"config": str(save_config(tmp_path)), "hosts": ["a", "b"], "hang": 1}
    results = run_ranks(TARGET, world=2, args=args, timeout=120)
    (finding,) = found(results[0][1], "network")
    assert finding["level"] == "red" and "2 of 2 ranks could not finish measuring" in finding["message"]
    assert "b at links over gloo: the link is dead" in finding["message"]
    assert found(results[0][1], "versions") == []  # what was known before is told


def test_a_rank_that_cannot_compute_ends_the_measuring_of_all_at_once_with_its_cause(tmp_path: Path) -> None:
    args = {"config": str(save_config(tmp_path)), "hosts": ["a", "b"], "full": 1}
    results = run_ranks(TARGET, world=2, args=args, timeout=60)  # less than a gate's wait
    (finding,) = found(results[0][1], "network")
    assert "2 of 2 ranks could not finish measuring: b at computing: RuntimeError: CUDA out of memory; a at" in finding["message"]
