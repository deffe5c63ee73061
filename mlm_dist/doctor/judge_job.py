"""Judges of what a run needs: pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Sequence

from mlm_dist.doctor.findings import Finding, Report, compare, differing, failed, group, names, spans
from mlm_dist.sizes import gib

# Below this what was read says nothing of a file system's speed.
TELLING_BYTES = 16 << 20
SLOW_READ = 5e6  # bytes/s: about what a fast GPU trains of text
LATE_S = 2.0
_HARMLESS = "one rank has nothing to partition"  # of the notes of a start


def job(report: Report) -> list[Finding]:
    """All of them."""
    return [*config(report), *shards(report), *start(report), *run_directory(report), *room(report), *wandb(report)]


def config(report: Report) -> list[Finding]:
    """Whether all ranks read the same config."""
    read = {rank: facts["config"] for rank, facts in enumerate(report.local) if facts and "config" in facts}
    mistakes = group({rank: one["error"] for rank, one in read.items() if "error" in one})
    found = [
        Finding(
            "red",
            "config",
            f"{_ranks(report, ranks)}: {cause}",
            "put the config where every host reads it, and give all ranks the same flags",
        )
        for cause, ranks in mistakes.items()
    ]
    digests = list(group({rank: one["digest"] for rank, one in read.items() if "digest" in one}).items())
    if len(digests) > 1:
        usual, *others = digests
        told = "; ".join(f"config {digest} on {_ranks(report, ranks)}" for digest, ranks in others)
        found.append(
            Finding(
                "red",
                "config",
                f"{told}; {usual[0]} on {_ranks(report, usual[1]) if len(usual[1]) < 3 else f'the other {len(usual[1])} ranks'}",
                "give all ranks the same file, the same flags and the same MLM_* variables",
            )
        )
    return found


def _ranks(report: Report, ranks: Sequence[int]) -> str:
    return f"rank {spans(ranks)} ({names(list(dict.fromkeys(map(report.host_of, ranks))))})"


def shards(report: Report) -> list[Finding]:
    """Whether the data can be read, and how fast."""
    remedy = "see that the path is the same and mounted on every host; `mlm-dist data verify` reads all of it"
    found = failed(report, "shards", "shards", remedy)
    by_host = report.by_host("shards")
    for key in dict.fromkeys(key for facts in by_host.values() for key in facts):
        of_key = {name: facts[key] for name, facts in by_host.items() if key in facts}
        for name, facts in of_key.items():
            causes = facts["causes"] + facts["failed"]
            if causes:
                told = f"{facts['bad']} of {facts['shards']} shards" if facts["bad"] else "blocks"
                # As training holds it; what it may lose it goes on without. A sample of which nothing was read stands for all.
                too_many = facts["lost"] > facts["allowed"] or not facts["allowed"] or not facts["bytes"]
                found.append(
                    Finding(
                        "red" if too_many else "yellow",
                        "shards",
                        f"{name}: {told} of {key} {facts['place']} cannot be read or are not the manifest's"
                        f"{'' if too_many else ', which data.max_bad_fraction allows'}: {'; '.join(causes)}",
                        remedy,
                    )
                )
        rates = {n: f["bytes"] / f["seconds"] for n, f in of_key.items() if f["bytes"] and f["seconds"] > 0}
        if not rates:
            continue
        telling = {name: rate for name, rate in rates.items() if of_key[name]["bytes"] >= TELLING_BYTES}
        found += compare(
            "shards",
            {name: rate / 1e6 for name, rate in telling.items()},
            f"MB/s of {key}",
            "look at that host's mount and network; data.cache_dir keeps remote shards on the node",
        )
        lowest = min(rates, key=lambda name: rates[name])
        slow = lowest in telling and rates[lowest] < SLOW_READ
        read = sum(facts["bytes"] for facts in of_key.values())
        found.append(
            Finding(
                "yellow" if slow else "green",
                "shards",
                f"{key}: {read / 1e6:.1f} MB read on {len(rates)} host{'s' * (len(rates) > 1)}, {rates[lowest] / 1e6:.0f} MB/s "
                f"{'at the slowest, ' + lowest if len(rates) > 1 else 'by one thread'} (what the page cache held is in it)",
                "copy the shards to a faster file system or to the nodes" if slow else "",
            )
        )
    return found


def start(report: Report) -> list[Finding]:
    """Tokenizer, model, DeepSpeed template, and how the batch falls on the ranks."""
    found = failed(report, "start", "start", "mend what the message names; training would end with it, too")
    by_host = report.by_host("start")
    if not by_host:
        return found
    tokenizers = {name: f"tokenizer {facts['tokenizer']}" for name, facts in by_host.items()}
    if told := differing(tokenizers):
        found.append(Finding("red", "start", told, "give all hosts the same tokenizer directory"))
    one = next(iter(by_host.values()))
    found.append(Finding("green", "start", f"tokenizer and model load; ZeRO stage {one['stage']}; {one['summary']}"))
    found += [Finding("green", "start", line) for line in one["said"]]
    for note in one["notes"]:
        if _HARMLESS in note:
            found.append(Finding("green", "start", note))
        elif note != one["fill_note"]:
            found.append(
                Finding("yellow", "start", note, "mend it, or let training go on like this; it will say the same")
            )
    if one["fill_note"]:
        found.append(
            Finding(
                "yellow",
                "batch",
                one["fill_note"],
                "start one of these numbers of ranks, with a train.micro_batch that divides the rows of a rank",
            )
        )
    else:
        found.append(Finding("green", "batch", f"{one['fill']:.0%} of the micro-batch places hold a row"))
    return found


def run_directory(report: Report) -> list[Finding]:
    """Whether the hosts share the run directory and may write there."""
    remedy = "give a --run.dir that every host mounts and may write"
    found = failed(report, "shared", "run directory", remedy)
    by_host = report.by_host("shared")
    if not by_host:
        return found
    folder = next(iter(by_host.values()))["folder"]
    blind = [name for name, facts in by_host.items() if not facts["seen"]]
    shut = [name for name, facts in by_host.items() if facts["unwritable"] and facts["seen"]]
    late = {name: facts["after"] for name, facts in by_host.items() if facts["seen"] and facts["after"] > LATE_S}
    if blind:
        message = f"{names(blind)}: a file that the first host wrote in {folder} is not there"
        found.append(Finding("red", "run directory", message, remedy))
    if shut:
        message = f"{names(shut)}: {folder} cannot be written ({by_host[shut[0]]['unwritable']})"
        found.append(Finding("red", "run directory", message, remedy))
    if late:
        message = f"{names(list(late))}: what another host writes in {folder} shows after {max(late.values()):.1f} s"
        found.append(
            Finding("yellow", "run directory", message, "mount it with shorter attribute caching (NFS: actimeo=1)")
        )
    if not found:
        found.append(
            Finding(
                "green",
                "run directory",
                f"{folder} can be written" + (" and is seen by every host" if len(by_host) > 1 else ""),
            )
        )
    return found


def room(report: Report) -> list[Finding]:
    """Space against checkpoints."""
    found = failed(report, "room", "disk", "see that the run directory's file system answers")
    for facts in report.by_host("room").values():
        free = f"{gib(facts['free'])} GiB free in {facts['folder']}"
        if "checkpoint" not in facts:
            found.append(Finding("green", "disk", free))
            continue
        need, good = facts["needed"], facts["kept_for_good"]
        free += (
            f"; a checkpoint is {gib(facts['checkpoint'])} GiB, those kept and the one being written need {gib(need)}"
        )
        free += f", those of checkpoint.keep_every {gib(good)} more" if good else ""
        level = "red" if facts["free"] < need else "yellow" if facts["free"] < max(2 * need, need + good) else "green"
        remedy = "free space, give another --run.dir, or keep fewer (--checkpoint.keep)" if level != "green" else ""
        found.append(Finding(level, "disk", free, remedy))  # type: ignore[arg-type]
    return found


def wandb(report: Report) -> list[Finding]:
    """Whether tracking reaches its server, from the one rank that tracks."""
    offline = "set track.wandb offline (or WANDB_MODE=offline), and later, on a host with a network: mlm-dist sync RUN"
    found = failed(report, "wandb", "W&B", offline, level="yellow")
    for facts in report.by_host("wandb").values():
        if facts["mode"] != "online":
            why = "" if facts["logged_in"] else "; no login was found"
            found.append(Finding("green", "W&B", f"{facts['mode']}{why if facts['mode'] == 'offline' else ''}"))
        elif facts["unreachable"] is not None:
            message = f"online, but {facts['url']} does not answer: {facts['unreachable']}; training goes on without"
            found.append(Finding("yellow", "W&B", message, offline))
        elif not facts["logged_in"]:
            message = "online, but there is no login: neither WANDB_API_KEY nor an entry in ~/.netrc"
            found.append(Finding("yellow", "W&B", message, f"wandb login; or {offline}"))
        else:
            found.append(Finding("green", "W&B", f"online; {facts['url']} answers and a login is there"))
    return found
