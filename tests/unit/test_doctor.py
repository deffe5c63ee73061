"""The doctor's judges: from facts to findings, each side of each boundary; and what it prints."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlm_dist.cli import main
from mlm_dist.doctor.bounded import bounded
from mlm_dist.doctor.command import LIMITS, local_limit
from mlm_dist.doctor.findings import Finding, Report, silent, spans, worst
from mlm_dist.doctor.host import limits
from mlm_dist.doctor.judge_host import host
from mlm_dist.doctor.judge_job import job
from mlm_dist.doctor.judge_network import network, table
from mlm_dist.doctor.network import bus_bandwidth, phases
from mlm_dist.doctor.show import document
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import STALE_AFTER_S
from tests.e2e.program import save_config
from tests.ranks import ROOT

GIB = 1 << 30


def healthy(hosts: int = 4, each: int = 2, gpus: int = 0) -> Report:
    """An allocation in which all is well."""
    names = {f"node{i}": list(range(i * each, (i + 1) * each)) for i in range(hosts)}
    versions = {"python": "3.11.7", "torch": "2.13.0", "wandb": "0.31", "commit": "abc", "platform": "Linux-6"}
    versions["torch build"] = "CUDA 12.8" if gpus else "CPU"
    corpus = {"place": "m.json", "shards": 9, "bad": 0, "causes": [], "bytes": 64 << 20, "seconds": 0.5, "failed": []}
    corpus |= {"lost": 0.0, "allowed": 0.01}
    local: list[dict[str, Any] | None] = []
    measured: list[dict[str, Any] | None] = []
    for ranks in names.values():
        for i, rank in enumerate(ranks):
            facts: dict[str, Any] = {"local_rank": i, "device": {"visible": gpus}, "config": {"digest": "d"}}
            if gpus:
                facts["device"] |= {"name": "H100", "free": 79 * GIB, "total": 80 * GIB, "nccl": "2.27.5"}
            if not i:
                installed = [{"name": "H100", "memory_mib": 81559} for _ in range(gpus)]
                facts |= {
                    "versions": dict(versions),
                    "imports": {},
                    "gpus": {"installed": installed, "driver": "570.1" if gpus else None},
                    "limits": {"open_files": 65536, "memlock": -1, "infiniband": True, "shm": 64 * GIB},
                    "shards": {"data.manifest": copy.deepcopy(corpus)},
                    "start": {
                        "parameters": 110_000_000,
                        "stage": 2,
                        "tokenizer": "t",
                        "summary": "model of 110 M parameters",
                        "said": [],
                        "notes": [],
                        "fill": 1.0,
                        "fill_note": None,
                        "lanes": 64,
                    },
                    "shared": {
                        "folder": "/runs",
                        "seen": True,
                        "after": 0.01,
                        "unwritable": None,
                        "files_ahead": 0.002,
                    },
                }
            if not rank:
                facts["room"] = {
                    "folder": "/runs",
                    "free": 100 * GIB,
                    "checkpoint": GIB,
                    "needed": 3 * GIB,
                    "kept_for_good": 0,
                }
                facts["wandb"] = {
                    "mode": "online",
                    "logged_in": True,
                    "url": "https://api.wandb.ai",
                    "unreachable": None,
                }
            local.append(facts)
            measured.append({"speed": {"tflops": 1.0, "copy_gb_s": 20.0}, "links": [], "collectives": []})
    report = Report(names, local, measured)
    leaders = [ranks[0] for ranks in names.values()]
    if hosts > 1:
        of(report, 0, "network")["clock"] = [{"rank": r, "offset": 0.001, "uncertain": 1e-4} for r in leaders[1:]]
        for i, leader in enumerate(leaders if hosts > 2 else leaders[:1]):
            link = {"backend": "gloo", "ranks": [leader, leaders[(i + 1) % hosts]], "latency": 2e-5, "bandwidth": 1e9}
            of(report, leader, "network")["links"] = [link]
    for leader in leaders if each > 1 else []:
        row = {"group": "within host", "backend": "gloo", "ranks": each, "rows": [[8, 1e-5], [1 << 20, 1e-3]]}
        of(report, leader, "network")["collectives"] = [row]
    return report


def of(report: Report, rank: int, which: str = "local") -> dict[str, Any]:
    """The facts of a rank, to be changed."""
    facts = getattr(report, which)[rank]
    assert facts is not None
    return facts


def judged(report: Report) -> list[Finding]:
    """Everything that the judges say."""
    return [*silent(report), *host(report), *job(report), *network(report)]


def wrong(report: Report) -> list[Finding]:
    """What is not green; each says what to do."""
    found = [finding for finding in judged(report) if finding.level != "green"]
    assert all(finding.remedy for finding in found)
    assert not any(finding.remedy for finding in judged(report) if finding.level == "green")
    return found


@pytest.mark.parametrize(("hosts", "each", "gpus"), [(1, 1, 0), (2, 1, 0), (2, 2, 2), (3, 1, 1), (4, 2, 2), (5, 8, 8)])
def test_of_a_healthy_job_all_is_green(hosts: int, each: int, gpus: int) -> None:
    assert wrong(healthy(hosts, each, gpus)) == []


def set_in(path: str, value: Any, rank: int = 2, which: str = "local") -> Callable[[Report], None]:
    """A change of one fact: section.key of a rank (2: the first of node1)."""
    *sections, key = path.split("/")

    def change(report: Report) -> None:
        facts = of(report, rank, which)
        for section in sections:
            facts = facts[int(section)] if isinstance(facts, list) else facts[section]
        facts[key] = value  # type: ignore[index]

    return change


# A corpus of which a block could not be read, within what may be lost.
SOME_LOST: dict[str, Any] = {"place": "m.json", "shards": 9, "bad": 0, "causes": [], "bytes": 64 << 20, "seconds": 0.5}
SOME_LOST |= {"failed": ["a.tar at byte 0: gone"], "lost": 0.01, "allowed": 0.01}

# (a change of facts, the level, the check, what the message has) of a job of four hosts with two ranks each.
CASES: list[tuple[Callable[[Report], None], str, str, str]] = [
    (set_in("versions/torch", "2.12.0"), "red", "versions", "torch: 2.12.0 on node1; 2.13.0 on the other 3 hosts"),
    (set_in("versions/commit", None), "red", "versions", "commit: none on node1"),
    (set_in("versions/wandb", "0.30"), "yellow", "versions", "wandb: 0.30 on node1"),
    (set_in("versions", {"error": "no answer within 15 s"}), "red", "versions", "node1: no answer within 15 s"),
    (set_in("imports", {"error": "ImportError: libcudart.so"}), "red", "imports", "node1: ImportError"),
    (set_in("limits/open_files", 287), "yellow", "limits", "node1: at most 287 open files"),
    (set_in("limits/open_files", 71), "red", "limits", "node1: at most 71 open files"),
    (set_in("limits/memlock", 65536), "yellow", "limits", "node1: locked memory"),
    (set_in("local_rank", 0, rank=3), "red", "ranks", "node1: several of the ranks 2-3"),
    (set_in("config", {"error": "--config: cannot be read"}), "red", "config", "rank 2 (node1): --config"),
    (set_in("config/digest", "other"), "red", "config", "config other on rank 2 (node1)"),
    (set_in("config/digest", "other", rank=3), "red", "config", "config other on rank 3 (node1)"),
    (set_in("config", {"error": "train.stepz: no such key"}, rank=3), "red", "config", "rank 3 (node1): train.stepz"),
    (set_in("shards/data.manifest", SOME_LOST), "yellow", "shards", "node1: blocks of data.manifest"),
    (
        set_in("shards/data.manifest", SOME_LOST | {"causes": ["b.tar: gone"], "bad": 1}),
        "yellow",
        "shards",
        "1 of 9 shards",
    ),
    (set_in("shards/data.manifest", SOME_LOST | {"lost": 0.011}), "red", "shards", "a.tar at byte 0: gone"),
    (set_in("shards/data.manifest", SOME_LOST | {"allowed": 0.0}), "red", "shards", "a.tar at byte 0: gone"),
    (set_in("shards/data.manifest", SOME_LOST | {"bytes": 0}), "red", "shards", "a.tar at byte 0: gone"),
    (set_in("start/notes", ["most CPUs emulate fp16"], rank=0), "yellow", "start", "emulate fp16"),
    (set_in("shards/data.manifest/seconds", 1.0), "yellow", "shards", "slowest is node1: 67.1 MB/s"),
    (set_in("shards", {"error": "no answer within 90 s"}), "red", "shards", "node1: no answer"),
    (set_in("start", {"error": "data.tokenizer: gone"}), "red", "start", "node1: data.tokenizer"),
    (set_in("start/tokenizer", "u"), "red", "start", "tokenizer u on node1"),
    (set_in("start/fill_note", "60% of the places hold a row", rank=0), "yellow", "batch", "60%"),
    (
        set_in("shared/seen", False),
        "red",
        "run directory",
        "node1: a file that the first host wrote in /runs is not there",
    ),
    (set_in("shared/unwritable", "Read-only file system"), "red", "run directory", "node1: /runs cannot be written"),
    (set_in("shared/after", 3.0), "yellow", "run directory", "node1: what another host writes"),
    (set_in("shared/files_ahead", 2.0), "yellow", "clocks", "node1 is 2.0 s behind"),
    (set_in("room/free", 3 * GIB - 1, rank=0), "red", "disk", "need 3.00"),
    (set_in("room/free", 6 * GIB - 1, rank=0), "yellow", "disk", "need 3.00"),
    (set_in("room/kept_for_good", 98 * GIB, rank=0), "yellow", "disk", "98.00 more"),
    (set_in("wandb/unreachable", "timed out", rank=0), "yellow", "W&B", "does not answer: timed out"),
    (set_in("wandb/logged_in", False, rank=0), "yellow", "W&B", "there is no login"),
    (set_in("wandb", {"error": "no answer within 8 s"}, rank=0), "yellow", "W&B", "no answer"),
    (set_in("speed/tflops", 0.66, which="network"), "yellow", "compute", "slowest is node1"),
    (set_in("speed/tflops", 0.25, which="network"), "red", "compute", "slowest is node1"),
    (set_in("speed/copy_gb_s", 10.0, rank=3, which="network"), "yellow", "memory", "slowest is node1"),
    (set_in("clock/0/offset", 1.1, rank=0, which="network"), "yellow", "clocks", "node1 is 1.1 s ahead"),
    (set_in("clock/0/offset", -31.0, rank=0, which="network"), "red", "clocks", "node1 is 31.0 s behind"),
    (set_in("links/0/bandwidth", 1e8, which="network"), "yellow", "link bandwidth (gloo)", "node1 - node2"),
    (set_in("links/0/latency", 1e-3, which="network"), "yellow", "link latency (gloo)", "node1 - node2"),
    (
        set_in("collectives/0/rows", [[8, 1e-5], [1 << 20, 3e-3]], which="network"),
        "yellow",
        "within host (gloo)",
        "node1",
    ),
    (
        set_in("error", {"phase": "clocks", "cause": "timed out"}, which="network"),
        "red",
        "network",
        "1 of 8 ranks could not finish measuring: node1 at clocks: timed out",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[3][:40])
def test_one_wrong_fact_gives_one_finding_that_names_the_host(
    case: tuple[Callable[[Report], None], str, str, str],
) -> None:
    change, level, check, said = case
    report = healthy()
    change(report)
    (finding,) = wrong(report)
    assert (finding.level, finding.check) == (level, check)
    assert said in finding.message
    assert "node3" not in finding.message


# The same facts just within the bounds.
INSIDE = [
    set_in("limits/open_files", 288),
    set_in("start/notes", ["one rank has nothing to partition, so zero1 runs as stage 0"], rank=0),
    set_in("start/said", ["lanes are 97% full in the last tenth of the run"], rank=0),
    set_in("shards/data.manifest/seconds", 0.74),
    set_in("speed/tflops", 0.67, which="network"),
    set_in("clock/0/offset", 0.99, rank=0, which="network"),
    set_in("shared/after", 2.0),
    set_in("room/free", 6 * GIB, rank=0),
    set_in("links/0/bandwidth", 5.1e8, which="network"),
    set_in("wandb", {"mode": "offline", "logged_in": False, "url": ""}, rank=0),
    set_in("imports", None),
]


@pytest.mark.parametrize("change", INSIDE)
def test_within_the_bounds_all_stays_green(change: Callable[[Report], None]) -> None:
    report = healthy()
    change(report)
    assert wrong(report) == []


@pytest.mark.parametrize("hosts", [3, 4, 5, 8])
def test_of_a_ring_the_slow_host_is_named_and_not_its_neighbours(hosts: int) -> None:
    for slow in range(hosts):
        report = healthy(hosts, 1)
        for rank in (slow, (slow - 1) % hosts):  # a link is measured by the former of its ends
            of(report, rank, "network")["links"][0]["bandwidth"] = 1e8
        (finding,) = wrong(report)
        assert (finding.level, finding.check) == ("red", "link bandwidth (gloo)")
        assert f"slowest is node{slow}: 0.1 GB/s" in finding.message and "slow too" not in finding.message


@pytest.mark.parametrize("n", range(2, 12))
def test_a_ring_takes_at_most_three_phases_with_each_link_once(n: int) -> None:
    links = phases(n)
    assert len(links) <= 3
    assert all(len({end for link in phase for end in link}) == 2 * len(phase) for phase in links)
    expected = {frozenset((i, (i + 1) % n)) for i in range(n)}
    assert sorted(map(sorted, (link for phase in links for link in phase))) == sorted(map(sorted, expected))


def test_a_clock_that_is_alone_is_named_also_when_it_is_the_first() -> None:
    report = healthy()
    for one in of(report, 0, "network")["clock"]:
        one["offset"] = -STALE_AFTER_S
    (finding,) = wrong(report)
    assert finding.level == "red" and "node0 is 60.0 s ahead" in finding.message and "node1" not in finding.message


def gpu_cases() -> list[tuple[Callable[[Report], None], str, str]]:
    one = [{"name": "H100", "memory_mib": 81559}]
    return [
        (set_in("gpus/installed", one), "yellow", "1 GPUs on node1; 2 GPUs on the other 3 hosts"),
        (set_in("gpus/installed", 2 * [{"name": "A100", "memory_mib": 1}]), "yellow", "A100 on node1"),
        (set_in("gpus/driver", "560"), "yellow", "driver 560 on node1"),
        (set_in("gpus", {"error": "nvidia-smi fails"}), "red", "node1: nvidia-smi fails"),
        (
            set_in("device", {"visible": 1}, rank=3),
            "red",
            "rank 3 on node1: no GPU of its own (LOCAL_RANK 1, 1 visible)",
        ),
        (set_in("device/free", 70 * GIB, rank=3), "yellow", "rank 3 on node1: 10.0 GiB of its GPU are taken"),
        (set_in("device/nccl", "2.21", rank=3), "red", "NCCL 2.21 on rank 3 (node1)"),
        (set_in("device", {"error": "CUDA error: ECC"}, rank=3), "red", "rank 3 on node1: CUDA error: ECC"),
        (set_in("limits/shm", 64 << 20), "yellow", "node1: 64 MiB free in /dev/shm"),
    ]


@pytest.mark.parametrize("case", gpu_cases(), ids=lambda case: case[2][:40])
def test_of_gpus_one_wrong_fact_gives_one_finding(case: tuple[Callable[[Report], None], str, str]) -> None:
    change, level, said = case
    report = healthy(4, 2, 2)
    change(report)
    (finding,) = wrong(report)
    assert finding.level == level and said in finding.message


def test_gpus_that_nobody_uses_and_a_torch_that_cannot_use_them() -> None:
    report = healthy(4, 1, 2)
    assert [(f.level, f.check) for f in wrong(report)] == [("yellow", "GPUs")]
    report = healthy(4, 2, 2)
    for rank, facts in enumerate(report.local):
        assert facts is not None
        facts["device"] = {"visible": 0}
        if rank % 2 == 0:
            facts["versions"]["torch build"] = "CPU"
    found = wrong(report)
    assert [f.level for f in found] == ["red", "yellow"]
    assert "torch is a build for CPUs" in found[0].message


def test_a_rank_that_stops_answering_is_named_and_nothing_breaks() -> None:
    report = healthy()
    report.local[2] = None
    report.network = [{} for _ in report.local]
    (finding,) = wrong(report)
    assert finding.level == "red" and "rank 2 on node1 came, but did not answer after its checks" in finding.message
    report = healthy()
    report.network[3] = None
    (finding,) = wrong(report)
    assert "rank 3 on node1" in finding.message and "measurements" in finding.message


def test_a_cause_is_told_once_and_before_what_follows_from_it() -> None:
    report = healthy(8, 1)
    for rank in range(8):
        cause = f"Connection closed by peer [127.0.0.1]:{40000 + rank}"
        of(report, rank, "network")["error"] = {"phase": "clocks", "cause": cause}
    of(report, 6, "network")["error"] = {"phase": "computing", "cause": "CUDA out of memory"}
    (finding,) = wrong(report)
    assert "node6 at computing: CUDA out of memory; node0, node1" in finding.message
    assert finding.message.count("Connection closed by peer") == 1 and "40000" not in finding.message


def test_what_is_waited_for_is_what_the_checks_may_take() -> None:
    assert local_limit(quick=False, with_config=True) == sum(LIMITS.values())
    assert local_limit(quick=True, with_config=True) == sum(LIMITS.values()) - LIMITS["imports"]
    assert local_limit(quick=False, with_config=False) == sum(LIMITS.values()) - LIMITS["shards"] - LIMITS["start"]


@pytest.mark.parametrize("text", ["nan", "inf", "-3", "0", "soon"])
def test_a_wait_is_a_number_of_seconds(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--wait", text])
    assert end.value.code == 2 and "--wait" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_ended_leaves_nothing_behind(tmp_path: Path, signum: int, code: int) -> None:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mlm_dist.doctor", "--config", str(save_config(tmp_path)), "--local_rank", "0"]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 100
    while not list(tmp_path.glob(".doctor*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "run.yaml", "tokenizer"]


def test_the_document_is_plain_json_with_the_worst_level() -> None:
    report = healthy()
    findings = judged(report)
    content = json.loads(json.dumps(document(findings, report)))
    assert (content["schema"], content["level"], content["hosts"]) == (1, "green", report.hosts)
    assert all(set(f) == {"level", "check", "message", "remedy"} for f in content["findings"])
    assert len(content["collectives"]) == 4 and content["facts"]["local"] == report.local
    assert worst([Finding("yellow", "", ""), Finding("red", "", ""), Finding("green", "", "")]) == "red"


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert bus_bandwidth(1e9, 1.0, 2) == 1e9
    assert bus_bandwidth(1e9, 2.0, 8) == pytest.approx(1e9 / 2 * 14 / 8)
    (row, *_) = table(healthy())
    assert row["latency_us"] == pytest.approx(10) and row["gb_s"] == {
        str(1 << 20): pytest.approx((1 << 20) / 1e-3 / 1e9)
    }


def test_numbers_in_short() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_a_check_that_hangs_or_fails_is_a_fact() -> None:
    def fails() -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    def mistaken() -> dict[str, Any]:
        raise UserError("data.tokenizer: gone")

    def hangs() -> dict[str, Any]:
        time.sleep(5)
        return {}

    assert bounded(lambda: {"a": 1}, 5) == {"a": 1}
    assert bounded(fails, 5) == {"error": "OSError: [Errno 5] Input/output error"}
    assert bounded(mistaken, 5) == {"error": "data.tokenizer: gone"}
    assert bounded(hangs, 0.05) == {"error": "no answer within 0 s"}


LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_MODE")


def test_one_process_on_a_config_answers_in_json_and_tells_no_secret(tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": "k3y-of-wandb-0123456789", "HF_TOKEN": "hf_t0ken-of-the-hub-01"}
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES} | secrets
    env |= {"WANDB_BASE_URL": "http://somebody:hunter2-hunter2@127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mlm_dist.doctor", "--config", str(save_config(tmp_path)), "--json"]
    command += ["--track.wandb", "online", "--data.cache_dir", str(tmp_path / "cache")]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["level"] == "yellow"
    by_check = {finding["check"]: finding for finding in content["findings"]}
    assert {c: f["level"] for c, f in by_check.items() if f["level"] != "green"} == {"W&B": "yellow"}
    assert "track.wandb offline" in by_check["W&B"]["remedy"]
    assert {"versions", "GPUs", "shards", "start", "batch", "run directory", "disk", "compute", "clocks"} <= set(
        by_check
    )
    facts = content["facts"]["local"][0]
    assert facts["shards"]["data.manifest"]["bytes"] > 0
    assert facts["room"]["checkpoint"] == 12 * facts["start"]["parameters"]
    for secret in (*secrets.values(), "hunter2"):
        assert secret not in done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "run.yaml", "tokenizer"]  # nothing is left behind


def test_a_missing_shard_is_red_and_a_wrong_key_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    config = save_config(tmp_path, data={"cache_dir": "$NOWHERE/cache"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    assert limits()["open_files"] in (hard, sys.maxsize)  # which training allows itself, too
    victim = sorted((tmp_path / "corpus").glob("*.tar"))[0]
    victim.unlink()
    assert main(["doctor", "--config", str(config), "--quick"]) == 1
    said = capfd.readouterr().out
    assert victim.name in said and "data verify" in said and "\x1b" not in said
    assert "names a variable that is not set here" in said
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 512 or hard == 512
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert main(["doctor", "--config", str(config), "--train.stepz", "3"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "train.steps" in err
    assert main(["doctor", "--train.steps", "3"]) == 2
