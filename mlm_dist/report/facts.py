"""What the tables of a report say of a run."""

import contextlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlm_dist.report.run import Record, Run, account, moment, number, series, spans, stalls, whole
from mlm_dist.report.words import duration, meaning, plural, rest, short, when

Rows = list[tuple[str, str]]
# A model's sizes, by the names that configs have for them.
_SIZES = (
    ("model_type",),
    ("num_hidden_layers", "n_layers"),
    ("hidden_size", "dim"),
    ("num_attention_heads", "n_heads"),
    ("vocab_size",),
)
# Lines of a table that could be without end, the newest of each kind of event, and of all kinds.
MOST_LOSSES, MOST_OF_A_KIND, MOST_EVENTS = 50, 40, 300


def headline(run: Run) -> str:
    """One line of what matters most."""
    found = dict(facts(run))
    words = {
        "Steps": "{} steps" if found["Steps"] != "1" else "{} step",
        "Useful tokens": "{} tokens",
        "Ranks": "{} ranks" if found.get("Ranks") != "1" else "{} rank",
        "Best validation loss": "best validation loss {}",
    }
    parts = [form.format(found[key]) for key, form in words.items() if key in found]
    if run.restarts:
        parts.append(plural(len(run.restarts), "restart"))
    return "   ·   ".join(parts)


def scored(run: Run) -> list[Record]:
    """The validations that have a loss."""
    return [r for r in run.val if number(r.get("loss")) is not None]


def best(run: Run) -> Record | None:
    """The validation with the lowest loss."""
    return min(scored(run), key=lambda r: float(r["loss"]), default=None)


def facts(run: Run) -> Rows:
    """What came of the run; what it did not record is left out."""
    last_train, last_val = (run.train or [{}])[-1], (run.val or [{}])[-1]
    out: Rows = []

    def add(label: str, value: Any, form: str = "{}") -> None:
        if value is not None and value != "":
            out.append((label, form.format(value)))

    if run.status.get("state"):
        reason = f" ({run.status['reason']})" if run.status.get("reason") else ""
        add("State", _one_line(f"{run.status['state']}{reason}"))
    add("Steps", max(r["step"] for r in (*run.train, *run.val)), "{:,}")
    if run.restarts:
        add("Restarts at steps", ", ".join(map(str, run.restarts[:20])) + ", …" * (len(run.restarts) > 20))
    add("Epoch", number(last_train.get("epoch")), "{:.3g}")
    tokens = number(last_train.get("tokens"))
    add("Useful tokens", None if tokens is None else short(tokens))
    add("Ranks", whole(last_train.get("world_size")))
    if (lowest := best(run)) is not None:
        add("Best validation loss", f"{lowest['loss']:.3f} at step {lowest['step']:,}")
    for key, form in (("loss", "{:.3f}"), ("perplexity", "{:.2f}"), ("accuracy", "{:.1%}")):
        add(f"Last validation {key}", number(last_val.get(key)), form)
    add("Unigram entropy", run.unigram_entropy, "{:.3f} nats")
    add("Last training loss", number(last_train.get("loss")), "{:.3f}")
    if speeds := series(run.train, "tokens_per_s")[1]:
        add("Median throughput", f"{short(statistics.median(speeds))} useful tokens/s")
    if uses := series(run.train, "mfu")[1]:
        add("Median MFU", statistics.median(uses), "{:.1%} of the devices' dense peak, over useful tokens")
    add("A step's time", ", ".join(f"{name} {share:.0%}" for name, share in shares_of_a_step(run.train).items()))
    if memory := series(run.train, "memory_gib")[1]:
        add("Peak memory of rank 0", max(memory), "{:.2f} GiB")
    add("Skipped steps", whole(last_train.get("skipped")) or None)  # a count since the start of the run
    times = [t for r in run.records if (t := moment(r)) is not None]
    if times:
        add("First and last record", f"{when(min(times))} to {when(max(times))}")
    return out


def shares_of_a_step(train: Sequence[Record]) -> dict[str, float]:
    """Share of the step time by what rank 0 did in it, largest first; medians over the records that have it."""
    timed = [r for r in train if number(r.get("step_time")) and number(r.get("data_wait")) is not None]
    names = {"data_wait": "waiting for data"} | {
        k: k.removeprefix("time_") for r in timed for k in r if k.startswith("time_")
    }
    shares = {
        name: statistics.median((number(r.get(key)) or 0.0) / r["step_time"] for r in timed)
        for key, name in names.items()
        if timed
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def recipe(run: Run) -> Rows:
    """What the run is: model, data, batch, optimizer, machine."""
    section = {
        name: value if isinstance(value := run.config.get(name), dict) else {}
        for name in ("data", "mask", "model", "train", "optim", "deepspeed")
    }
    data, mask, train, optim = section["data"], section["mask"], section["train"], section["optim"]
    out: Rows = []

    def add(label: str, form: str, values: Mapping[str, Any]) -> None:
        with contextlib.suppress(KeyError, ValueError, TypeError):  # not recorded
            out.append((label, form.format(**values)))

    model = {name: next((run.model[k] for k in (name, *others) if k in run.model), None) for name, *others in _SIZES}
    sizes = "{num_hidden_layers} layers, hidden {hidden_size}, {num_attention_heads} heads, vocabulary {vocab_size:,}"
    add("Model", "{model_type}, " + sizes, model)
    add(
        "Begins from",
        "{init}" + (" ({name_or_path})" if section["model"].get("name_or_path") else ""),
        section["model"],
    )
    add("Data", "{manifest}" if data.get("manifest") else "{sources}", data)
    fingerprint = run.identity.get("data.manifest", run.identity.get("data.sources"))
    if fingerprint:
        out.append(("Fingerprint of the data", str(fingerprint)))
    add("Rows", "{seq_len} tokens, packing {packing}", data)
    add("Masks", "{strategy}, rate {rate}", mask)
    add("Batch", "{global_batch} rows a step, micro-batch {micro_batch}, {precision}", train)
    add("Optimizer", "{name}, learning rate {lr}, {schedule}, warm-up {warmup}, weight decay {weight_decay}", optim)
    add("DeepSpeed", "{config}", section["deepspeed"])
    environment = run.environment
    add("Commit", "{commit}", environment if environment.get("commit") else {})
    packages = environment.get("packages")
    if isinstance(packages, dict) and packages:
        out.append(("Software", ", ".join(f"{k} {v}" for k, v in packages.items())))
    others = {k: v for k, v in environment.items() if k not in ("packages", "commit") and v not in (None, "", [], {})}
    out.extend((k.replace("_", " ").capitalize(), rest({k: v}).partition(": ")[2]) for k, v in others.items())
    return out


def attempts(run: Run) -> list[list[str]]:
    """A line for each attempt: number, ranks, steps, start, length, pause before it, how it ended, what was lost."""
    out, before = [], None
    for a in run.attempts:
        ended = f"{a.ended}: {_one_line(a.reason)}" if a.reason else a.ended
        pause = "" if before is None else duration(max(0.0, a.begin - before))
        steps = f"{a.first + 1:,} to {a.last:,}" if a.last > a.first else "none"
        back = [_taken_back(e) for e in run.events if e["kind"] == "rollback" and (e.get("attempt") or 1) == a.number]
        lost = [f"{plural(a.repeated, 'step')} taken again"] if a.repeated else []
        lost += [f"{plural(sum(back), 'step')} rolled back"] if back else []
        ranks = "" if a.ranks is None else str(a.ranks)
        out.append(
            [str(a.number), ranks, steps, when(a.begin), duration(a.end - a.begin), pause, ended, "; ".join(lost)]
        )
        before = a.end
    return out


def _taken_back(rollback: Record) -> int:
    return max(0, (whole(rollback.get("step")) or 0) - (whole(rollback.get("to")) or 0))


def jobs(run: Run) -> list[list[str]]:
    """A line for each event of a SLURM job."""
    shown = ("event", "time", "job", "lineage")
    return [
        [when(moment(j)), str(j.get("job", j.get("lineage", ""))), str(j["event"]),
         rest({k: v for k, v in j.items() if k not in shown})]
        for j in run.jobs[-MOST_LOSSES:]
    ]  # fmt: skip


def _one_line(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def time_account(run: Run) -> Rows:
    """Where the wall-clock time went, and what stalls cost."""
    parts = account(run)
    if not parts:
        return []
    wall = parts["wall"]

    def share(seconds: float) -> str:
        return f"{duration(seconds)} ({seconds / wall:.1%})" if wall else duration(seconds)

    out = [
        ("From first to last sign of life", duration(wall)),
        ("Steps that count", share(parts["kept"])),
        ("Steps taken again after a restart or roll-back", share(parts["repeated"])),
        ("Between attempts", share(parts["gaps"])),
        ("The rest: starts, validation, checkpoints, ends", share(parts["rest"])),
    ]
    found = spans(run)
    for cause, label in (("data", "Stalls waiting for data"), ("slow", "Stalls in other slow steps")):
        lost = [s for s in stalls(found) if s.cause == cause]
        if found:
            text = f"{plural(len(lost), 'time')}, {duration(sum(s.seconds for s in lost))} lost" if lost else "none"
            out.append((label, text))
    return out


def data_lost(run: Run) -> list[Record]:
    """The losses of training documents."""
    return [e for e in run.events if e["kind"] == "data_loss"]


def data(run: Run) -> Rows:
    """What was read and what was lost."""
    last: Record = (run.train or [{}])[-1]
    out: Rows = []
    if (tokens := number(last.get("tokens"))) is not None:
        out.append(("Useful tokens trained on", f"{tokens:,.0f}"))
    if (epoch := number(last.get("epoch"))) is not None:
        out.append(("Epochs", f"{epoch:.3g}"))
    lost = data_lost(run)
    documents = sum(whole(e.get("documents")) or 0 for e in lost)
    shards = len({str(e.get("shard")) for e in lost})
    where = f", in {plural(len(lost), 'place')} of {plural(shards, 'shard')}" if lost else ""
    out.append(("Documents lost to faults", f"{documents:,}{where}"))
    start = next(
        (e for e in reversed(run.events) if e["kind"] == "attempt" and isinstance(e.get("documents"), list)), {}
    )
    allowed = number((run.config.get("data") or {}).get("max_bad_fraction"))
    shares: Counter[tuple[int, int]] = Counter()
    for e in lost:
        shares[whole(e.get("source")) or 0, whole(e.get("epoch")) or 0] += whole(e.get("documents")) or 0
    sizes = start.get("documents", [])
    worst = [
        (n / sizes[s], n, sizes[s], epoch)
        for (s, epoch), n in shares.items()
        if 0 <= s < len(sizes) and whole(sizes[s])
    ]
    if worst and allowed is not None:
        share, n, of, epoch = max(worst)
        out.append(
            ("Most in one epoch", f"{n:,} of {of:,} documents, {share:.2%} (epoch {epoch}; {allowed:.2%} allowed)")
        )
    unread = sum(whole(e.get("documents")) or 0 for e in run.events if e["kind"] == "val_data_loss")
    if unread:
        out.append(("Validation documents not read", f"{unread:,} in all validations"))
    rollbacks = [e for e in run.events if e["kind"] == "rollback" and isinstance(e.get("skip"), list)]
    if rollbacks:
        skipped = ", ".join(f"{e['skip'][0]} to {e['skip'][-1]}" for e in rollbacks[:20] if e["skip"])
        out.append(("Batches left out since roll-backs", skipped))
    return out


def _at_steps(events: Sequence[Record]) -> str:
    steps = [s for e in events if (s := whole(e.get("step"))) is not None]
    return "" if not steps else f"{min(steps):,}" + (f" to {max(steps):,}" if max(steps) > min(steps) else "")


def losses(run: Run) -> list[list[str]]:
    """Lost documents by shard and cause, the largest first: shard, cause, places, documents, steps."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for e in data_lost(run):
        groups.setdefault((str(e.get("shard")), str(e.get("cause"))), []).append(e)
    rows = []
    for (shard, cause), found in groups.items():
        rows.append((sum(whole(e.get("documents")) or 0 for e in found), shard, cause, len(found), _at_steps(found)))
    rows.sort(key=lambda r: (-r[0], r[1:]))
    return [
        [shard, _one_line(cause), f"{places:,}", f"{n:,}", span] for n, shard, cause, places, span in rows[:MOST_LOSSES]
    ]


def kinds(run: Run) -> list[list[str]]:
    """How often each kind of event happened: kind, meaning, count, first and last step."""
    found: dict[str, list[Record]] = {}
    for event in run.events:
        found.setdefault(event["kind"], []).append(event)
    return [[kind, meaning(kind), f"{len(events):,}", _at_steps(events)] for kind, events in found.items()]


def events(run: Run) -> tuple[list[list[str]], int]:
    """The newest events, oldest first (time, attempt, step, kind, what), and how many older ones are left out."""
    seen: Counter[str] = Counter()
    shown: list[Record] = []
    for event in reversed(run.events):
        seen[event["kind"]] += 1
        if seen[event["kind"]] <= MOST_OF_A_KIND and len(shown) < MOST_EVENTS:
            shown.append(event)
    rows = [
        [when(moment(e)), *(str(e.get(k, "")) for k in ("attempt", "step", "kind")), rest(e)] for e in reversed(shown)
    ]
    return rows, len(run.events) - len(shown)


def compared(runs: Sequence[Run]) -> list[list[str]]:
    """A line for each measure, a column for each run."""
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        found = dict(facts(run))
        parts = account(run)
        lost = sum(whole(e.get("documents")) or 0 for e in data_lost(run))
        picked = {
            **{k: found.get(k, "") for k in ("State", "Steps", "Epoch", "Useful tokens", "Ranks")},
            "Best validation loss": found.get("Best validation loss", ""),
            **{k: found.get(k, "") for k in ("Last validation loss", "Last validation accuracy", "Last training loss")},
            "Median throughput": found.get("Median throughput", ""),
            "Median MFU": found.get("Median MFU", "").partition(" ")[0],
            "Peak memory of rank 0": found.get("Peak memory of rank 0", ""),
            "Wall-clock time": duration(parts["wall"]) if parts else "",
            "of it steps that count": f"{parts['kept'] / parts['wall']:.1%}" if parts and parts["wall"] else "",
            "Restarts": str(len(run.restarts)),
            "Skipped steps": found.get("Skipped steps", "0"),
            "Lost documents": f"{lost:,}",
            "Commit": str(run.environment.get("commit") or "")[:12],
        }
        for label, value in picked.items():
            rows.setdefault(label, [""] * len(runs))[i] = value
    return [[label, *values] for label, values in rows.items() if any(values)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return out


def differing(runs: Sequence[Run]) -> list[list[str]]:
    """The config keys in which the runs differ: key, and the value of each run."""
    flats = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    missing = object()
    return [
        [key, *("not set" if key not in flat else "null" if flat[key] is None else str(flat[key]) for flat in flats)]
        for key in keys
        if any(flat.get(key, missing) != flats[0].get(key, missing) for flat in flats)
    ]
