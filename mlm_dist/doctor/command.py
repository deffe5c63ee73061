"""``mlm-dist doctor``, as one rank: look, measure, tell rank 0; which judges and prints."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlm_dist.config import Config, load
from mlm_dist.distributed import Topology, allow_open_files
from mlm_dist.doctor import host, job, network
from mlm_dist.doctor.bounded import bounded
from mlm_dist.doctor.findings import Finding, Report, silent, spans, worst
from mlm_dist.doctor.judge_host import host as judge_host
from mlm_dist.doctor.judge_job import job as judge_job
from mlm_dist.doctor.judge_network import network as judge_network
from mlm_dist.doctor.meeting import GRACE_S, Meeting, Unreachable
from mlm_dist.doctor.show import document, show, show_json
from mlm_dist.errors import UserError
from mlm_dist.lifecycle import EXIT_FAILED, EXIT_FINISHED, EXIT_USER_ERROR
from mlm_dist.redact import redact

WAIT_S = 60
# Seconds that each check may take before the doctor goes on without.
LIMITS = {"versions": 15, "imports": 60, "gpus": 25, "device": 30, "limits": 5, "shards": 90, "start": 150, "probe": 20}
LIMITS |= {"shared": 40, "room": 10, "wandb": 8}
# After the first rank's measuring has ended the others' does, at the latest with their stage.
NETWORK_S = network.STAGE_S + network.TIMEOUT_S


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``mlm-dist doctor``; what they do not know goes to the run config."""
    parser.add_argument("--config", help="run config to check for; any of its keys can follow as a flag")
    parser.add_argument("--json", action="store_true", help="print one JSON document, with all facts")
    parser.add_argument("--quick", action="store_true", help="read less, measure small messages, load no weights")
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=WAIT_S,
        metavar="S",
        help=f"seconds that all ranks have to come (default {WAIT_S})",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Exit code: 0 for green and yellow, 1 for red, 2 for the user's mistake; all of the first rank, and others end with 0, so that
    no launcher ends the first one before it has printed. A rank that cannot reach the first ends with 1, a little later."""
    topology = Topology.from_env()
    try:
        code, content = diagnose(args, overrides, topology)
    except UserError:
        if topology.rank == 0:
            raise
        return EXIT_FINISHED  # the first rank tells it, once
    if topology.rank == 0:
        (show_json if args.json else show)(content)
    if dist.is_initialized():
        # Without the interpreter's tidying, which a thread of gloo can abort and which would wait for ranks that hang.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def diagnose(args: argparse.Namespace, overrides: list[str], topology: Topology) -> tuple[int, dict[str, Any]]:
    """(exit code of this rank, what there is to print, which matters on rank 0)."""
    with _stdout_is_stderr():
        findings, report = _examine(args, overrides, topology)
    code = EXIT_FAILED if worst(findings) == "red" else EXIT_FINISHED
    return code, redact(document(findings, report))


def _examine(args: argparse.Namespace, overrides: list[str], topology: Topology) -> tuple[list[Finding], Report | None]:
    """Findings, on rank 0 or of a rank that cannot reach it; the report is None where the ranks did not meet."""
    allow_open_files()  # as training does; a rank has a connection to each other one
    config, mistake = _load(args.config, overrides)
    card = {"host": host.name(), "mistake": mistake, "limit": local_limit(args.quick, config is not None)}
    try:
        meeting = Meeting(topology, args.wait)
        cards, absent = meeting.introduce(card)
        here = [rank for rank in range(topology.world_size) if rank not in absent]
        with contextlib.ExitStack() as stack:
            stack.callback(meeting.leave, [rank for rank in here if rank != 0])
            if absent:
                return [_absent(absent, cards, args.wait)] if topology.rank == 0 else [], None
            if mistake and all(one["mistake"] for one in cards):
                raise UserError(mistake)
            report = Report(_hosts(cards), [])
            limit = max(one["limit"] for one in cards)
            _look_and_measure(args.quick, config, mistake, meeting, report, limit)
    except Unreachable as error:
        return [_unreachable(error, topology)], None
    if topology.rank != 0:
        return [], report
    return [*silent(report), *judge_host(report), *judge_job(report), *judge_network(report)], report


def _look_and_measure(
    quick: bool, config: Config | None, mistake: str | None, meeting: Meeting, report: Report, limit: float
) -> None:
    """Fill the report, on rank 0; ``limit``: seconds that the local checks of a rank may take."""
    topology = meeting.topology
    first = topology.rank == 0
    with contextlib.ExitStack() as leftovers:
        meeting.tell("local", redact(_look(quick, config, mistake, meeting, report, limit, leftovers)))
        if first:
            report.local = meeting.collect("local", limit)
    if first:
        # What the first rank decides for all: whether to measure, whether each has a GPU, and how much.
        answered = [one for one in report.local if one is not None]
        plan = {
            "measure": len(answered) == topology.world_size,
            "cuda": all("name" in one["device"] for one in answered),
            "quick": quick,
        }
        meeting.publish("plan", plan)
    else:
        plan = meeting.read("plan", 2 * limit)
    if not plan["measure"]:
        report.network = [{} for _ in report.local]
        return
    device = torch.device("cuda", topology.local_rank) if plan["cuda"] else torch.device("cpu")
    store, ranks = dist.PrefixStore("groups", meeting.store), list(report.hosts.values())
    meeting.tell("network", network.measure(store, topology.rank, ranks, device, quick=plan["quick"]))
    if first:
        report.network = meeting.collect("network", NETWORK_S)


def local_limit(quick: bool, with_config: bool) -> float:
    """Seconds that the local checks of a rank may take, all together."""
    left_out = [*(["imports"] if quick else []), *([] if with_config else ["shards", "start"])]
    return sum(seconds for name, seconds in LIMITS.items() if name not in left_out)


def _look(
    quick: bool,
    config: Config | None,
    mistake: str | None,
    meeting: Meeting,
    report: Report,
    limit: float,
    leftovers: contextlib.ExitStack,
) -> dict[str, Any]:
    """Local facts: every rank's own config and device, and of each host what its first rank sees. ``leftovers`` takes away what
    the others look for."""
    topology = meeting.topology
    facts: dict[str, Any] = {"local_rank": topology.local_rank}
    facts["config"] = {"error": mistake} if mistake else {"digest": job.digest(config) if config else "none"}
    place = config.run.path() if config else Path.cwd()

    def check(name: str, work: Callable[[], dict[str, Any]]) -> None:
        facts[name] = bounded(work, LIMITS[name])

    if topology.rank == 0:
        token = secrets.token_hex(4)
        leftovers.enter_context(_exits_on_term())
        written: list[Path] = []
        leftovers.callback(job.remove, written)
        check("probe", lambda: {"path": str(job.probe(place, token, written)), "token": token})
        meeting.publish("probe", facts["probe"])
    check("device", lambda: host.device(topology.local_rank))
    number = [ranks[0] for ranks in report.hosts.values()]
    if topology.rank not in number:
        return facts
    check("versions", host.versions)
    check("gpus", host.gpus)
    check("limits", host.limits)
    if not quick:
        check("imports", host.imports)
    if config is not None:
        mine = number.index(topology.rank)
        check("shards", lambda: job.shards(config, mine, len(number), quick))
        check("start", lambda: job.start(config, topology.world_size, quick))
    probe = meeting.read("probe", LIMITS["probe"] + limit)
    if "error" in probe:
        facts["shared"] = {"error": probe["error"]} if topology.rank == 0 else None
    else:
        check("shared", lambda: job.shared(Path(probe["path"]), probe["token"]))
    if topology.rank == 0:
        parameters = facts.get("start", {}).get("parameters")
        check("room", lambda: job.room(place, config, parameters))
        check("wandb", lambda: host.wandb(config.track.wandb if config else "auto"))
    return facts


def _load(path: str | None, overrides: list[str]) -> tuple[Config | None, str | None]:
    """The config or, for all ranks to hear of, what is wrong with it."""
    if path is None:
        if overrides:
            return None, f"{overrides[0]}: keys of a run config need --config."
        return None, None
    try:
        return load(["--config", path, *overrides], prog="mlm-dist doctor").config, None
    except UserError as error:
        return None, str(error)


def _hosts(cards: list[dict[str, Any]]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for rank, card in enumerate(cards):
        hosts.setdefault(card["host"], []).append(rank)
    return hosts


def _absent(absent: list[int], cards: list[dict[str, Any]], wait: float) -> Finding:
    came = ", ".join(f"{name} ({len(ranks)})" for name, ranks in _hosts(cards).items())
    return Finding(
        "red",
        "ranks",
        f"rank {spans(absent)} of {len(absent) + len(cards)} did not come within {wait:.0f} s; here are {came}",
        f"look at their output: their host may not reach MASTER_ADDR={os.environ.get('MASTER_ADDR')} (a loopback name is another host to each), "
        "may not start Python, or is slow to (--wait gives more time)",
    )


def _unreachable(error: Unreachable, topology: Topology) -> Finding:
    if topology.rank != 0:  # nobody else can be told
        print(f"doctor: rank {topology.rank} on {host.name()}: {error}", file=sys.stderr, flush=True)
        time.sleep(GRACE_S)
    return Finding(
        "red",
        "ranks",
        f"rank {topology.rank} on {host.name()}: {error}",
        "see that MASTER_ADDR is the first host's name on the network that connects the hosts, and that MASTER_PORT is free and not blocked",
    )


@contextlib.contextmanager
def _exits_on_term() -> Iterator[None]:
    """Within it, what is to be tidied up is when a launcher ends this process."""

    def leave(signum: int, _frame: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Whatever libraries print, NCCL in C among them, stdout is the answer's alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def main(argv: Sequence[str] | None = None) -> int:
    """The program of a rank."""
    parser = argparse.ArgumentParser(
        prog="mlm-dist doctor", description="Does this host, or this allocation, have what a run needs?"
    )
    add_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # that some launchers add
    args, overrides = parser.parse_known_args(argv)
    try:
        return run(args, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
