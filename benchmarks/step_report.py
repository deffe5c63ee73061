"""The step benchmark's JSON lines as Markdown."""

import json
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.report import spread
from benchmarks.step_cases import CASES, MODELS, TARGETS, Setting, Target

Result = dict[str, Any]


class Measured:
    """The measurements of one setting."""

    def __init__(self, setting: Setting, results: list[Result], peak: float | None):
        self.setting, self._results, self._peak = setting, results, peak

    def turns(self, case: str) -> dict[int, Result]:
        """By round."""
        return {r["round"]: r for r in self._results if (r["case"], r["kind"]) == (case, "turn") and "error" not in r}

    def end(self, case: str) -> Result | None:
        """What was measured once."""
        ends = [r for r in self._results if (r["case"], r["kind"]) == (case, "end") and "error" not in r]
        return ends[0] if ends else None

    def errors(self) -> list[tuple[str, str]]:
        """(case, why it was not measured)."""
        return [(r["case"], r["error"]) for r in self._results if "error" in r]

    def mfu(self, case: str) -> float | None:
        """Model FLOP/s over useful tokens, as a share of the device's dense peak."""
        turns = list(self.turns(case).values())
        if self._peak is None or not turns:
            return None
        return statistics.median(flops_per_second(turn, self.setting) for turn in turns) / self._peak

    def value(self, target: Target) -> float | None:
        """What the target is about; None if it was not measured. Rates are compared within a round."""
        if target.what == "mfu":
            return self.mfu(target.case)
        assert target.against is not None
        if target.what == "memory":
            one, other = self.end(target.case), self.end(target.against)
            return one["memory_mb"] / other["memory_mb"] if one and other else None
        ones, others = self.turns(target.case), self.turns(target.against)
        ratios = [rate(ones[k]) / rate(others[k]) for k in sorted(ones.keys() & others.keys())]
        return statistics.median(ratios) if ratios else None


def rate(turn: Result) -> float:
    """Useful tokens per second."""
    return turn["tokens"] / turn["seconds"]


def flops_per_second(turn: Result, setting: Setting) -> float:
    """Floating-point operations per second that the useful tokens need: the encoder for each, attention over what they see, the head on selected ones."""
    from transformers import BertConfig

    from mlm_dist.model.bert import flops_per_token

    needed = flops_per_token(
        BertConfig(**MODELS[setting.model].sizes),
        attended=turn["attended"] / turn["tokens"],
        selected=turn["selected"] / turn["tokens"],
    )
    return needed * rate(turn)


def render(lines: str) -> str:
    """A paragraph on the machine, a table for each setting, and the targets."""
    header, *results = map(json.loads, lines.splitlines())
    settings = list(dict.fromkeys(Setting(*r["setting"]) for r in results))
    measured = [
        Measured(s, [r for r in results if Setting(*r["setting"]) == s], header["peaks"].get(s.precision))
        for s in settings
    ]
    parts = [_machine(header)]
    for one in measured:
        parts += [_table(one), _parts(one)]
        parts += [f"{one.setting.title}, {case}: not measured: {why}" for case, why in one.errors()]
    parts.append(targets(measured, "cuda" if header["cuda"] else "cpu"))
    return "\n\n".join(part for part in parts if part)


def _machine(header: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    device = f"{header['cuda']}; " if header["cuda"] else ""
    return (
        f"{device}{header['cpu']}, {header['cores']} cores, {header['threads']} threads, {header['memory_gb']} GB, load {header['load']:.1f} at the start; "
        f"Python {header['python']}, {versions}. Text: {header['source']}, {header['documents']:,} documents, {header['bytes'] / 1e6:.1f} MB. "
        f"Median (least-most) of {header['rounds']} rounds."
    )


def _table(measured: Measured) -> str:
    columns: list[tuple[str, Callable[[list[Result], Result, str], str]]] = [
        ("useful tokens/s", lambda turns, end, case: spread([rate(t) for t in turns], 0)),
        ("step, ms", lambda turns, end, case: spread([1000 * t["seconds"] / t["steps"] for t in turns], 0)),
        ("CPU, ms", lambda turns, end, case: spread([1000 * t["cpu_s"] / t["steps"] for t in turns], 0)),
        ("useful", lambda turns, end, case: f"{100 * _sum(turns, 'tokens') / _sum(turns, 'places'):.1f}%"),
        ("memory, MB", lambda turns, end, case: f"{end['memory_mb']:.0f}" if end else "-"),
        ("held-out loss", lambda turns, end, case: f"{end['loss']:.3f}" if end else "-"),
        ("after tokens", lambda turns, end, case: f"{end['tokens']:,}" if end else "-"),
    ]
    if any(measured.mfu(case.key) is not None for case in CASES):
        columns.append(("MFU", lambda turns, end, case: f"{measured.mfu(case) or 0.0:.1%}"))
    lines = [
        " | ".join([measured.setting.title, *(name for name, _ in columns)]),
        " | ".join(["---"] * (len(columns) + 1)),
    ]
    for case in CASES:
        if turns := list(measured.turns(case.key).values()):
            end = measured.end(case.key) or {}
            lines.append(" | ".join([case.label, *(cell(turns, end, case.key) for _, cell in columns)]))
    return "\n".join(f"| {line} |" for line in lines)


def _sum(turns: list[Result], key: str) -> float:
    return sum(turn[key] for turn in turns)


def _parts(measured: Measured) -> str:
    """Where the time goes, for the contestants that tell."""
    lines = []
    for case in CASES:
        turns = list(measured.turns(case.key).values())
        names = dict.fromkeys(name for turn in turns for name in turn["parts"])
        if not names:
            continue
        total = _sum(turns, "seconds")
        shares = {name: sum(turn["parts"].get(name, 0.0) for turn in turns) / total for name in names}
        shares["rest"] = 1.0 - sum(shares.values())
        lines.append(f"- {case.label}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    return "\n".join(["Where the time goes:", *lines]) if lines else ""


def targets(measured: list[Measured], device: str) -> str:
    """What was wanted, and for every setting what was found and the verdict."""
    by_setting = {one.setting: one for one in measured}
    settings = list(dict.fromkeys(s for target in TARGETS for s in target.settings))
    settings = [s for s in settings if s in by_setting] or settings
    lines = [
        " | ".join(["target", "wanted", *(s.title for s in settings)]),
        " | ".join(["---"] * (len(settings) + 2)),
    ]
    for target in TARGETS:
        bound = f"at least {target.least:.3g}" if target.least is not None else f"at most {target.most:.3g}"
        cells = [
            _verdict(target, by_setting.get(s) if target.device == device else None) if s in target.settings else "-"
            for s in settings
        ]
        if target.device != device:
            cells = ["not run"] * len(cells)
        lines.append(" | ".join([f"{target.device}: {target.label}", bound, *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _verdict(target: Target, measured: Measured | None) -> str:
    value = measured.value(target) if measured else None
    if value is None:
        return "not run"
    return f"{value:.2f}, {'met' if target.is_met(value) else '**missed**'}"
