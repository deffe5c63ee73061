"""What the planner predicts against what a counting allocator sees. The table goes into docs/memory.md.

python -m benchmarks.memory            # about 20 settings, each in processes of its own, and the 2 GiB job at BERT-base's size
python -m benchmarks.memory --only zero3
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.memory_cases import Setting
from mlm_dist.plan import predict
from tests.ranks import run_ranks

DOCS = Path(__file__).resolve().parent.parent / "docs/memory.md"
TIMEOUT_S = 900.0
FLAT: dict[str, Any] = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
PARTS: dict[str, Any] = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
# Of the decoder alone, 8192 x 256 elements, so that buckets are smaller and larger than parameters.
SETTINGS = (
    Setting(),
    Setting(precision="bf16", micro_batches=1),
    Setting(precision="bf16", attention_dropout=0.1, seq_len=256, micro_batch=2),
    Setting(hidden_dropout=0.0, hidden=128, layers=6, micro_batch=16),
    Setting(checkpoint=True, hidden=512, layers=3, micro_batch=8),
    Setting(selected=1.0, head_chunk=256, vocab=4096),
    Setting(template="zero1", zero=FLAT, precision="bf16"),
    Setting(template="zero1", zero=FLAT, world=2, micro_batches=1),
    Setting(template="zero1", zero=FLAT, world=2, precision="bf16_pure"),
    Setting(template="zero2", micro_batch=8),
    Setting(template="zero2", zero=FLAT, world=2, precision="bf16"),
    Setting(template="zero2", zero=FLAT, world=2, hidden=512, layers=3, checkpoint=True, micro_batches=1),
    Setting(template="zero2", zero=FLAT, precision="bf16_pure"),
    Setting(template="zero2_offload", zero=FLAT, micro_batches=1),
    Setting(template="zero2_offload", zero=FLAT, world=2, precision="bf16"),
    Setting(template="zero3", zero=PARTS),
    Setting(template="zero3", zero=PARTS, world=2, precision="bf16", hidden=384),
    Setting(template="zero3", zero=PARTS, world=2, precision="bf16_pure"),
    Setting(template="zero3_offload", zero=PARTS, checkpoint=True),
    Setting(template="zero3_offload", zero=PARTS, world=2, micro_batches=1),
)
BASE = {"hidden": 768, "layers": 12, "vocab": 30522, "seq_len": 512}
# recipes/two_gib.yaml: every token carries a label, as in the tutorial.
TWO_GIB = Setting(
    template="zero2_offload",
    micro_batch=1,
    micro_batches=1,
    selected=1.0,
    checkpoint=True,
    attention_dropout=0.1,
    **BASE,  # type: ignore[arg-type]
)


def compare(setting: Setting) -> tuple[int, int, dict[str, int]]:
    """(predicted, measured, measured by phase) bytes of the rank that needs most; device and host together, which on a CPU are one."""
    ranks = run_ranks(
        "benchmarks.memory_cases:measure",
        setting.world,
        {"setting": setting},
        timeout=TIMEOUT_S,
        env={"DS_ACCELERATOR": "cpu"},
    )
    most = max(ranks, key=lambda found: found["peak"])
    prediction = predict(setting.job())
    return prediction.total + prediction.total_host, most["peak"], most


def describe(setting: Setting) -> list[str]:
    """The setting's cells."""
    attention = "eager" if setting.attention_dropout else "sdpa"
    buckets = "1 M" if setting.zero else ("own" if setting.template != "zero0" else "-")
    labels = f"{setting.selected:.0%}" + (f" by {setting.head_chunk}" if setting.selected == 1 else "")
    return [
        setting.template,
        str(setting.world),
        setting.precision,
        f"{setting.layers} x {setting.hidden}",
        f"{setting.micro_batch} x {setting.seq_len}" + (" (x2)" if setting.micro_batches > 1 else ""),
        "yes" if setting.checkpoint else "no",
        attention,
        labels,
        buckets,
    ]


HEADER = [
    "template",
    "ranks",
    "precision",
    "layers",
    "rows x tokens",
    "checkpointing",
    "attention",
    "labels",
    "buckets",
]


def row(setting: Setting) -> str:
    """A line of the table."""
    predicted, measured, _ = compare(setting)
    cells = [*describe(setting), f"{predicted / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{predicted / measured - 1:+.1%}"]
    return "| " + " | ".join(cells) + " |"


def two_gib() -> str:
    """The 2 GiB job and the tutorial's loop, at BERT-base's size."""
    (notebook,) = run_ranks(
        "benchmarks.memory_cases:measure_notebook", 1, {"sizes": {}, "seq_len": BASE["seq_len"]}, timeout=TIMEOUT_S
    )
    _, measured, found = compare(TWO_GIB)
    here, there = predict(TWO_GIB.job()), predict(replace(TWO_GIB.job(), device="cuda"))
    gib = 2**30
    lines = [
        "| BERT-base, batch 1, 512 tokens, a label on each | predicted, GiB | measured on the CPU, GiB |",
        "| --- | --- | --- |",
        f"| the tutorial's loop, fp32 | - | {notebook['peak'] / gib:.2f} |",
        f"| recipes/two_gib.yaml, host and device together | {(here.total + here.total_host) / gib:.2f} | {measured / gib:.2f} |",
        f"| of it on the host | {here.total_host / gib:.2f} | {found['host'] / gib:.2f} |",
        f"| of it on the device | {here.total / gib:.2f} | {(measured - found['host']) / gib:.2f} |",
        f"| the same on a CUDA device, at its peak ({there.moment}) | {there.total / gib:.2f} | not measured |",
    ]
    return "\n".join(lines)


def write(name: str, text: str) -> None:
    """Put ``text`` between the marks of ``name`` in docs/memory.md."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    print(text)
    content = DOCS.read_text()
    assert content.count(begin) == content.count(end) == 1
    DOCS.write_text(re.sub(f"(?s){begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", content))


def main() -> None:
    """Measure, print, and with everything measured write docs/memory.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="settings whose line holds this; nothing is written")
    parser.add_argument("--job", action="store_true", help="the 2 GiB job alone")
    args = parser.parse_args()
    if args.job:
        return write("two gib", two_gib())
    head = "| " + " | ".join([*HEADER, "predicted, MB", "measured, MB", "error"]) + " |"
    lines = [head, "|" + " --- |" * (len(HEADER) + 3)]
    print("\n".join(lines), flush=True)
    for setting in SETTINGS:
        if args.only is None or args.only in " ".join(describe(setting)):
            lines.append(row(setting))
            print(lines[-1], flush=True)
    if args.only is None:
        write("measured", "\n".join(lines))
        write("two gib", two_gib())


if __name__ == "__main__":
    main()
