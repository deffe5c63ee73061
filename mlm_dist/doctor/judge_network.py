"""Judges of what lies between ranks, and of how fast they are: pure functions from facts to findings."""

from __future__ import annotations

import re
import statistics
from typing import Any

from mlm_dist.doctor.findings import SLOW_NETWORK, Finding, Report, compare, group, names
from mlm_dist.doctor.network import OTHERS, bus_bandwidth
from mlm_dist.lifecycle import STALE_AFTER_S

# A lock whose heartbeat seems older than STALE_AFTER_S is taken for a dead run's, so clocks must be well within that.
CLOCK_YELLOW_S, CLOCK_RED_S = 1.0, STALE_AFTER_S / 2
_ADDRESS = re.compile(r" ?\[[^\]]*\]:\d+")
_CAUSES = 4
SYNC = "turn on time synchronisation there (chronyc tracking, timedatectl)"
EXCLUDE = "exclude that host (srun --exclude) and run the doctor again; report it if it stays slow"


def network(report: Report) -> list[Finding]:
    """All of them."""
    return [*failures(report), *speed(report), *clocks(report), *links(report), *collectives(report)]


def failures(report: Report) -> list[Finding]:
    """Measurements that did not come to their end."""
    errors = {rank: facts["error"] for rank, facts in enumerate(report.network) if facts and "error" in facts}
    if not errors:
        return []
    # gloo tells each peer's port, by which the same cause would be as many.
    causes = group({rank: (error["phase"], _ADDRESS.sub("", error["cause"])) for rank, error in errors.items()})
    told = "; ".join(
        f"{names(list(dict.fromkeys(map(report.host_of, ranks))))} at {phase}: {cause}"
        for (phase, cause), ranks in sorted(causes.items(), key=lambda item: _is_consequence(item[0][1]))[:_CAUSES]
    )
    return [
        Finding(
            "red",
            "network",
            f"{len(errors)} of {report.world} ranks could not finish measuring: {told}",
            "see what the first cause names; if it is a time-out, that all hosts reach each other on all ports and that GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name the interface that connects them; NCCL_DEBUG=INFO tells more",
        )
    ]


def _is_consequence(cause: str) -> bool:
    """Whether it may follow from another rank's failing."""
    return any(sign in cause for sign in ("Timed out", "wait timeout", "Connection closed", OTHERS))


def speed(report: Report) -> list[Finding]:
    """The slowest rank by itself; of hosts without GPUs, the slowest host."""
    found = []
    for key, check, unit in (("tflops", "compute", "TFLOP/s"), ("copy_gb_s", "memory", "GB/s")):
        scores: dict[str, float] = {}
        for rank, facts in enumerate(report.network):
            if facts and "speed" in facts:
                gpu = "name" in (report.local[rank] or {}).get("device", {})
                label = (
                    f"{report.host_of(rank)} GPU {(report.local[rank] or {})['local_rank']}"
                    if gpu
                    else report.host_of(rank)
                )
                scores[label] = min(facts["speed"][key], scores.get(label, float("inf")))
        found += compare(check, scores, unit, f"see what else runs there (top, nvidia-smi); else {EXCLUDE}")
        if len(scores) == 1:
            found.append(Finding("green", check, f"{next(iter(scores.values())):.3g} {unit}"))
    return found


def clocks(report: Report) -> list[Finding]:
    """Clocks of hosts against each other, and against the one that dates files in the run directory."""
    found = []
    first = (report.network[0] or {}).get("clock") if report.network else None
    if first:
        offsets = {report.host_of(0): 0.0} | {report.host_of(int(one["rank"])): one["offset"] for one in first}
        unsure = max(one["uncertain"] for one in first)
        # Of two nobody can say which is wrong; of more, the one that is alone.
        middle = statistics.median(offsets.values()) if len(offsets) > 2 else 0.0
        off = {name: offset - middle for name, offset in offsets.items()}
        found.append(_clock(off, "the clocks of the hosts", f"(+- {1e3 * unsure:.1f} ms)"))
    ahead = {n: -f["files_ahead"] for n, f in report.by_host("shared").items() if f.get("files_ahead") is not None}
    if ahead:
        found.append(_clock(ahead, "the hosts' clocks and the run directory's", ""))
    return found


def _clock(off: dict[str, float], what: str, unsure: str) -> Finding:
    furthest = max(off.values(), key=abs)
    level = "red" if abs(furthest) > CLOCK_RED_S else "yellow" if abs(furthest) > CLOCK_YELLOW_S else "green"
    if level == "green":
        return Finding("green", "clocks", f"{what} differ by at most {1e3 * abs(furthest):.1f} ms {unsure}".rstrip())
    wrong = {name: value for name, value in off.items() if abs(value) > CLOCK_YELLOW_S}
    told = ", ".join(
        f"{name} is {abs(v):.1f} s {'ahead' if v > 0 else 'behind'}" for name, v in list(wrong.items())[:8]
    )
    return Finding(
        level,  # type: ignore[arg-type]
        "clocks",
        f"{what} differ: {told}",
        f"{SYNC}; a run whose clock is off by {STALE_AFTER_S:.0f} s is taken for dead",
    )


def links(report: Report) -> list[Finding]:
    """Each host by the better of its two links in the ring, so that a slow host is named and its neighbours are not."""
    found = []
    for backend, measured in _links(report).items():
        ends = [(report.host_of(link["ranks"][0]), report.host_of(link["ranks"][1])) for link in measured]
        bandwidth = dict(zip(ends, (link["bandwidth"] / 1e9 for link in measured), strict=True))
        latency = dict(zip(ends, (link["latency"] * 1e6 for link in measured), strict=True))
        if len(ends) < 3:
            told = [f"{a} - {b}: {latency[a, b]:.0f} us, {bandwidth[a, b]:.3g} GB/s" for a, b in ends]
            found.append(Finding("green", f"links ({backend})", ", ".join(told)))
            continue
        found += _ring(f"link bandwidth ({backend})", bandwidth, "GB/s", lower=False)
        found += _ring(f"link latency ({backend})", latency, "us", lower=True)
    return found


def _ring(check: str, values: dict[tuple[str, str], float], unit: str, lower: bool) -> list[Finding]:
    better = min if lower else max
    best: dict[str, float] = {}
    for pair, value in values.items():
        for end in pair:
            best[end] = better(value, best.get(end, value))
    found = compare(check, best, unit, EXCLUDE, lower=lower, slow=SLOW_NETWORK, most="yellow" if lower else "red")
    usual = statistics.median(best.values())

    def slow(value: float) -> bool:
        return (value / usual if lower else usual / value) >= SLOW_NETWORK

    lone = [
        f"{a} - {b} ({value:.3g} {unit})"
        for (a, b), value in values.items()
        if slow(value) and not slow(best[a]) and not slow(best[b])
    ]
    if lone:
        message = f"slow between hosts that are not slow to others: {names(lone)}; the median is {usual:.3g}"
        found.append(
            Finding("yellow", check, message, "run the doctor again, and report the pair: a cable or a switch")
        )
    return found


def _links(report: Report) -> dict[str, list[dict[str, Any]]]:
    by_backend: dict[str, list[dict[str, Any]]] = {}
    for facts in report.network:
        for link in (facts or {}).get("links", []):
            by_backend.setdefault(link["backend"], []).append(link)
    return by_backend


def collectives(report: Report) -> list[Finding]:
    """All-reduces within each host, compared between hosts, at the largest size that all have."""
    found = []
    tables = table(report)
    for backend in dict.fromkeys(row["backend"] for row in tables):
        inner = [row for row in tables if row["backend"] == backend and row["group"] == "within host"]
        common = set.intersection(*(set(row["gb_s"]) for row in inner)) if inner else set()
        if common:
            size = max(common, key=int)
            scores = {row["host"]: row["gb_s"][size] for row in inner}
            found += compare(f"within host ({backend})", scores, "GB/s", EXCLUDE, slow=SLOW_NETWORK)
    return found


def table(report: Report) -> list[dict[str, Any]]:
    """One row for each group that was measured: {group, host (of those within one), backend, ranks, latency_us, gb_s: {bytes: bus bandwidth}}."""
    rows = []
    for rank, facts in enumerate(report.network):
        for one in (facts or {}).get("collectives", []):
            (_, tiny), *larger = one["rows"]
            rows.append(
                {
                    "group": one["group"],
                    "host": report.host_of(rank) if one["group"] == "within host" else None,
                    "backend": one["backend"],
                    "ranks": one["ranks"],
                    "latency_us": 1e6 * tiny,
                    "gb_s": {str(int(size)): bus_bandwidth(size, t, one["ranks"]) / 1e9 for size, t in larger},
                }
            )
    return rows
