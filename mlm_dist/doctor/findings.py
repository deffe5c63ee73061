"""What the doctor concludes, and how it compares hosts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Level = Literal["green", "yellow", "red"]
LEVELS: tuple[Level, ...] = ("green", "yellow", "red")
# How many times slower than the median a host may be before it is told of (measurements of networks scatter more), and before
# it is not worth its place.
SLOW, SLOW_NETWORK, VERY_SLOW = 1.5, 2.0, 4.0
_NAMED = 8
K = TypeVar("K", str, int)


@dataclass(frozen=True)
class Finding:
    """One conclusion.

    Attributes:
        level: green: as it should be; yellow: the run works but is slower, or something is near its limit; red: the run fails, or
            is not the run that was meant.
        check: what was looked at.
        message: what was found, on which host.
        remedy: what to do; empty when green.
    """

    level: Level
    check: str
    message: str
    remedy: str = ""


@dataclass
class Report:
    """The facts that rank 0 judges.

    Attributes:
        hosts: name -> its ranks, ascending; in the order of their first ranks.
        local: of each rank what `host` and `job` found; None of a rank that did not answer.
        network: of each rank what `network` found, likewise.
    """

    hosts: dict[str, list[int]]
    local: list[dict[str, Any] | None]
    network: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return sum(map(len, self.hosts.values()))

    def host_of(self, rank: int) -> str:
        """The host of a rank."""
        return next(name for name, ranks in self.hosts.items() if rank in ranks)

    def by_host(self, section: str) -> dict[str, dict[str, Any]]:
        """host -> what its first rank found in a section, where it looked and found something."""
        return {host: facts for host, facts in self._first(section).items() if "error" not in facts}

    def failures(self, section: str) -> dict[str, str]:
        """host -> why its first rank could not look."""
        return {host: facts["error"] for host, facts in self._first(section).items() if "error" in facts}

    def _first(self, section: str) -> dict[str, dict[str, Any]]:
        found = {host: (self.local[ranks[0]] or {}).get(section) for host, ranks in self.hosts.items()}
        return {host: facts for host, facts in found.items() if facts is not None}


def worst(findings: Sequence[Finding]) -> Level:
    """The worst of their levels."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="green")


def failed(report: Report, section: str, check: str, remedy: str, level: Level = "red") -> list[Finding]:
    """A finding for each cause for which hosts could not look at a section."""
    return [
        Finding(level, check, f"{names(hosts)}: {cause}", remedy)
        for cause, hosts in group(report.failures(section)).items()
    ]


def spans(ranks: Sequence[int]) -> str:
    """``0-3, 5``, of ascending numbers."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def names(hosts: Sequence[str]) -> str:
    """Hosts in a sentence."""
    more = f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else ""
    return ", ".join(hosts[:_NAMED]) + more


def group(values: Mapping[K, Any]) -> dict[Any, list[K]]:
    """value -> the keys that have it, the most common first."""
    groups: dict[Any, list[K]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def differing(values: Mapping[str, Any]) -> str | None:
    """Which hosts have another value than most, in words; None when all are equal."""
    groups = list(group(values).items())
    if len(groups) < 2:
        return None
    (usual, hosts), *others = groups
    told = "; ".join(f"{value} on {names(those)}" for value, those in others)
    common = names(hosts) if len(hosts) <= 2 else f"the other {len(hosts)} hosts"
    return f"{told}; {usual} on {common}"


def compare(
    check: str,
    values: Mapping[str, float],
    unit: str,
    remedy: str,
    *,
    lower: bool = False,
    slow: float = SLOW,
    most: Level = "red",
) -> list[Finding]:
    """The slowest named, and every other that is slow; nothing when there is nothing to compare.

    Args:
        check: what was looked at.
        values: of each host, the higher the better, or with ``lower`` the lower.
        unit: of the values.
        remedy: what to do about a slow one.
        slow: how many times worse than the median is slow. Of two the better one counts as the median.
        most: the worst level that it may be.
    """
    if len(values) < 2:
        return []
    median = (statistics.median_low if lower else statistics.median_high)(values.values())
    ratios = {name: value / median if lower else median / value for name, value in values.items()}
    slowest = max(ratios, key=lambda name: ratios[name])
    ratio = ratios[slowest]
    message = f"slowest is {slowest}: {values[slowest]:.3g} {unit}, the median is {median:.3g}"
    if ratio < slow:
        return [Finding("green", check, message)]
    also = [name for name in values if name != slowest and ratios[name] >= slow]
    message += f": {ratio:.1f} times slower" + (f"; slow too: {names(also)}" if also else "")
    return [Finding(most if ratio >= VERY_SLOW else "yellow", check, message, remedy)]


def silent(report: Report) -> list[Finding]:
    """Ranks that came and then said no more."""
    found = []
    for what, facts in (("its checks", report.local), ("its measurements", report.network)):
        lost = [rank for rank, one in enumerate(facts) if one is None]
        if lost:
            hosts = list(dict.fromkeys(map(report.host_of, lost)))
            found.append(
                Finding(
                    "red",
                    "ranks",
                    f"rank {spans(lost)} on {names(hosts)} came, but did not answer after {what}",
                    "look at the output of that rank: it was killed, or its host hangs",
                )
            )
            break
    return found
